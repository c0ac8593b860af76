"""Google Local Review in the layout of 2021 (Li, Shang and McAuley 2022; Yan et al. 2023).

review-<State>_10.json.gz (or the whole review-<State>.json.gz) and meta-<State>.json.gz, a JSON object each line, gzipped or not;
several states make one dataset. A place without metadata keeps its id as its title, and the audit counts it.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from user_llm.data.raw import Raw, clean
from user_llm.data.reviews import Layout, existing, of_lines
from user_llm.data.values import identifier, names_of, text_of

REVIEWS = ("review-{}_10.json", "review-{}.json")
PLACES = ("meta-{}.json",)
LAYOUTS = (Layout("user_id", "gmap_id", "rating", "time", ("text",), per_second=1000),)
STATES_IN_NAME = 8  # more are counted, for folders are named by them


def find(directory: epath.PathLike, states: Sequence[str], *, bad_rows: str = "refuse") -> Raw:
    """Return the reviews of one or several states.

    Args:
      bad_rows: `refuse`, or `skip` to leave lines out that cannot be read.

    Raises:
      ValueError: no state named, or one whose reviews or places are not in `directory`. A bad line is refused when it is read.
    """
    folder = epath.Path(directory)
    if not states:
        raise ValueError("No state named: set --config.data.states=\"('Vermont',)\" to those whose files you have.")
    reviews: list[epath.Path] = []
    places: list[epath.Path] = []
    for state in states:
        for found, patterns in ((reviews, REVIEWS), (places, PLACES)):
            files = existing(folder, patterns, state)
            if not files:
                raise ValueError(f"{folder} has no {patterns[0].format(state)}.gz: download it, or leave {state} out.")
            found.append(files[0])
    names = "-".join(states) if len(states) <= STATES_IN_NAME else f"{len(states)}-states"
    return of_lines(f"google-local-{names}", (reviews, LAYOUTS), (places, _place), texts=("review",), bad_rows=bad_rows)


def _place(line: dict[str, Any]) -> tuple[str, str, list[str]]:
    names = list(filter(None, dict.fromkeys(map(clean, names_of(line.get("category"))))))
    return identifier(line["gmap_id"], "gmap_id"), clean(text_of(line.get("name"))), names
