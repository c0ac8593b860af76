"""Encode all users of event files: `python -m user_llm.encode --model=RUN/user_llm/model --events=FILES --out=STATES`.

The command writes Parquet files to STATES, one row a user. The columns are user (the id), state (the bytes of a `user_llm.User`),
events (their number), unknown (the number of events whose item the model does not know) and last_time (seconds since 1970).
"""

from user_llm.serving import command
from user_llm.serving.tables import Encode

if __name__ == "__main__":
    command.run(Encode)
