"""Recommend items to all users of event files: `python -m user_llm.recommend --model=RUN/user_llm/model --events=FILES --out=DIR`.

The command writes Parquet files to DIR, one row for each recommended item. The columns are user (the id), rank (from 1), item (the
id), title and score (higher is better).
"""

from absl import flags

from user_llm.serving import command
from user_llm.serving.tables import Recommend

_K = flags.DEFINE_integer("k", 10, "The number of items for each user.", lower_bound=1)
_SEEN = flags.DEFINE_bool("seen", True, "Whether items that the user has had may be recommended.")

if __name__ == "__main__":
    command.run(lambda model: Recommend(model, _K.value, seen=_SEEN.value))
