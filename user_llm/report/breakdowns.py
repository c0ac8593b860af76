"""Results broken down by what is known of each target: the history before it, its popularity, ties at the split boundary."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool

from user_llm.evals.measured import Measured
from user_llm.report import plots
from user_llm.report.markdown import Markdown, picture, say, table
from user_llm.report.runs import Measurements

METRICS = ("recall@10", "recall@10/unseen", "ndcg@10")
# Of each number its title, what it counts, and the upper ends of its buckets; histories of 10, 50, 100 and 200 events are the paper's.
BUCKETS = {
    "history_length": ("By history length", "events in the history", (10, 20, 50, 100, 200, 500)),
    "item_popularity": ("By item popularity", "events of the target in training", (3, 10, 30, 100, 300, 1000)),
}
Part = dict[str, float] | None  # n and the metrics of the targets chosen, over all seeds; None where there are none


def breakdown_sections(found: Measurements, pictures: dict[str, bytes]) -> list[Markdown]:
    """Return a section for each number that targets have, and put its plot among the pictures."""
    several = len({dataset for dataset, _, _ in found}) > 1
    methods = {
        (f"{dataset}: " if several else "") + method: [one for _, one in sorted(seeds.items()) if one.numbers]
        for (dataset, _, _), group in found.items()
        for method, seeds in group.items()
    }
    sections: list[Markdown] = []
    for name, (title, number, ends) in BUCKETS.items():
        known = _with(methods, name)
        if known:
            sections += [say("## {}", title), *_buckets(pictures, name, number, ends, known)]
    if tied := _with(methods, "boundary_tie"):
        rows = []
        for method, seeds in tied.items():
            for label, value in (("tied", 1), ("untied", 0)):
                if part := _part(seeds, (one.numbers["boundary_tie"] == value for one in seeds)):
                    rows.append([method, label, *part.values()])
        sections += [
            say("## Ties at the split boundary"),
            say("Tied: the target shares its timestamp with the event before it."),
            table(["method", "targets", "n", *METRICS], rows),
        ]
    return sections


def _with(methods: dict[str, list[Measured]], name: str) -> dict[str, list[Measured]]:
    chosen = {
        method: [one for one in seeds if name in one.numbers and one.values.keys() >= set(METRICS)]
        for method, seeds in methods.items()
    }
    return {method: seeds for method, seeds in chosen.items() if seeds}


def _buckets(
    pictures: dict[str, bytes], name: str, number: str, ends: Sequence[int], methods: dict[str, list[Measured]]
) -> list[Markdown]:
    """Return recall@10 by bucket of a number, 0 to the first end and so on; buckets without any target are left out."""
    places = {method: [np.searchsorted(ends, one.numbers[name]) for one in seeds] for method, seeds in methods.items()}
    filled = np.unique(np.concatenate([place for seeds in places.values() for place in seeds]))
    starts = (0, *(end + 1 for end in ends))
    labels = [f"{starts[b]}-{ends[b]}" if b < len(ends) else f"{starts[b]}+" for b in filled]
    parts = {m: [_part(seeds, (place == b for place in places[m])) for b in filled] for m, seeds in methods.items()}
    pictures[f"{name}.png"] = plots.plot_buckets(number, labels, parts)
    return [
        picture(f"{name}.png", f"recall@10 by {number}"),
        say("recall@10, nothing filtered (targets, over all seeds), by {}:", number),
        table(
            ["method", *labels],
            [[m, *(f"{p['recall@10']:.4f} ({p['n']})" if p else "" for p in found)] for m, found in parts.items()],
        ),
    ]


def _part(seeds: Sequence[Measured], chosen: Iterable[Bool[np.ndarray, " n"]]) -> Part:
    masks = list(chosen)
    total = sum(int(mask.sum()) for mask in masks)
    if not total:
        return None
    values = {m: np.concatenate([one.values[m][mask] for one, mask in zip(seeds, masks, strict=True)]) for m in METRICS}
    return {"n": total, **{metric: float(array.mean()) for metric, array in values.items()}}
