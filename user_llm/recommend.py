"""Recommend items to all users of event files: `python -m user_llm.recommend --model=RUN/user_llm/model --events=FILES --out=DIR`.

DIR gets Parquet files of the columns user, rank (from 1), item, title and score.
"""

from absl import flags

from user_llm.serving import command
from user_llm.serving.tables import Recommend

_K = flags.DEFINE_integer("k", 10, "Items for each user.", lower_bound=1)
_SEEN = flags.DEFINE_bool("seen", True, "Whether items of the history may be among them.")

if __name__ == "__main__":
    command.run(lambda model: Recommend(model, _K.value, seen=_SEEN.value))
