"""Encode all users of event files: `python -m user_llm.encode --model=RUN/user_llm/model --events=FILES --out=STATES`.

STATES gets Parquet files of the columns user, state (bytes of `user_llm.User`), events, unknown and last_time.
"""

from user_llm.serving import command
from user_llm.serving.tables import Encode

if __name__ == "__main__":
    command.run(Encode)
