"""How well items are recommended that no training event names: recall by how often training has seen the target's item.

    python launch/benchmark_items.py --set=union --data=DIR --workdir=runs/items_union

DIR holds the real sets. A tenth of the items that train, drawn by the seed, is taken out: all their events leave the training part. The
encoder is pretrained on what is left. Then all items without a training event are added by their titles and categories.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Bool, Int

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from configs import amazon_encoder, events_encoder, movielens_encoder  # noqa: E402
from user_llm.common import trees  # noqa: E402
from user_llm.common.mesh import make_mesh  # noqa: E402
from user_llm.common.trees import Params  # noqa: E402
from user_llm.config.check import check  # noqa: E402
from user_llm.data.dataset import Dataset, open_dataset  # noqa: E402
from user_llm.data.pipeline import history_batches  # noqa: E402
from user_llm.data.schema import Schema  # noqa: E402
from user_llm.data.timelines import Catalogue, Timelines  # noqa: E402
from user_llm.evals.ranking import target_ranks  # noqa: E402
from user_llm.models.content import Content  # noqa: E402
from user_llm.models.user_encoder import UserEncoderConfig  # noqa: E402
from user_llm.phases import pretrain_encoder  # noqa: E402
from user_llm.phases.run import Run  # noqa: E402
from user_llm.training import loop  # noqa: E402

PHASE = "pretrain_encoder"
# Among all items, among those that the user has not had, and among the added ones of these.
METRICS = ("recall@10", "recall@10/unseen", "recall@10/added")
RANKS = jax.jit(target_ranks)
# Each set: its config, and what it changes.
SETS = {
    "union": (movielens_encoder, {"data.dir": "movielens/ml-latest-union"}),
    "gift_cards": (amazon_encoder, {"data.dir": "amazon", "data.category": "Gift_Cards"}),
    "video_games": (
        events_encoder,
        {
            "data.dir": "events/video_games.parquet",
            "data.name": "video_games",
            "data.columns.order": "position",
            "data.columns.title": "title",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Parted:
    """A dataset whose items are numbered anew: those that train come first.

    Attributes:
      whole: the dataset with all items and events.
      train: the dataset without the other items and their events.
      drawn: which items, by their new numbers, were drawn to be taken out.
    """

    whole: Dataset
    train: Dataset
    drawn: Bool[np.ndarray, " V"]


def parted(data: Dataset, share: float, seed: int) -> Parted:
    """Take a share of the items that train out of the training part, and with them the items that have no training event."""
    counts = data.train_counts
    known = np.flatnonzero(counts > 0)
    drawn = np.zeros(len(counts), bool)
    drawn[np.random.default_rng(seed).choice(known, round(share * len(known)), replace=False)] = True
    cold = drawn | (counts == 0)
    cold[0] = False
    order = np.argsort(cold, kind="stable")
    whole = dataclasses.replace(data, timelines=_renumbered(data.timelines, order))
    return Parted(whole, _without(whole, int((~cold).sum())), drawn[order])


def _renumbered(timelines: Timelines, order: Int[np.ndarray, " V"]) -> Timelines:
    """Return the same timelines; item n is what was item order[n]."""
    new, old = np.argsort(order).astype(np.int32), timelines.catalogue
    catalogue = Catalogue(
        titles=[old.titles[n] for n in order],
        keys=[old.keys[n] for n in order],
        multi={name: bag[order] for name, bag in old.multi.items()},
        vocab=old.vocab,
    )
    return dataclasses.replace(timelines, item=new[timelines.item[:]], catalogue=catalogue)


def _without(data: Dataset, known: int) -> Dataset:
    """Return a dataset of the items below `known` alone; the events of the others are left out."""
    timelines, split = data.timelines, data.split
    kept = timelines.item[:] < known
    before = np.concatenate([[0], np.cumsum(kept)])  # events that are kept before each event
    place = lambda users, positions: (  # noqa: E731
        before[timelines.offsets[users] + positions] - before[timelines.offsets[users]]
    )
    old, first = timelines.catalogue, timelines.schema.features[0]
    catalogue = Catalogue(
        old.titles[:known], old.keys[:known], {name: bag[:known] for name, bag in old.multi.items()}, old.vocab
    )
    fewer = dataclasses.replace(
        timelines,
        offsets=before[timelines.offsets],
        item=timelines.item[:][kept],
        columns={name: column[:][kept] for name, column in timelines.columns.items()},
        ticks=None if timelines.ticks is None else timelines.ticks[:][kept],
        words={name: column[:][kept] for name, column in timelines.words.items()},
        schema=Schema((dataclasses.replace(first, size=known), *timelines.schema.features[1:])),
        catalogue=catalogue,
    )
    targets = {}
    for part, (users, positions) in split.targets.items():
        chosen = kept[timelines.offsets[users] + positions]
        users, positions = users[chosen], positions[chosen]
        positions = place(users, positions)
        targets[part] = users[positions > 0], positions[positions > 0]
    stop = place(np.arange(len(timelines)), split.train_stop)
    return Dataset(fewer, dataclasses.replace(split, train_stop=stop, targets=targets))


def grown(config: UserEncoderConfig, params: Params, data: Parted) -> tuple[UserEncoderConfig, Params]:
    """Return the encoder with rows for all items; those that training has not seen are placed by their contents."""
    known, catalogue = len(data.train.timelines.catalogue.keys), data.whole.timelines.catalogue
    config = dataclasses.replace(config, schema=data.whole.timelines.schema, trained_items=known - 1)
    table = np.zeros((config.table_rows, config.width), np.float32)
    table[:known] = np.asarray(params["item"])[:known]
    content = Content.fit(catalogue, table[:known], data.train.train_counts)
    table[known : len(catalogue.keys)] = content.place(catalogue, known)
    params = params | {"item": jnp.asarray(table)}
    if config.has_tower:
        features = jnp.asarray(pretrain_encoder.item_catalogue(data.whole.timelines, config))
        params["tower"] = params["tower"] | {"catalogue": features}
    return config, params


def hits(
    config: UserEncoderConfig, params: Params, data: Dataset, first: int, max_events: int
) -> tuple[np.ndarray, Bool[np.ndarray, "3 n"]]:
    """Return the item of each test target, and whether the target is among the first 10 by each of METRICS.

    Args:
      first: the number of the first item that training has not seen.
    """
    graphdef, _ = trees.abstract(lambda: config.build(nnx.Rngs(params=0)))
    timelines, (users, positions) = data.timelines, data.split.targets["test"]
    found = np.zeros((len(METRICS), len(users)), bool)
    item = np.arange(config.table_rows)
    every = item <= timelines.schema.num_items
    for indices, batch in history_batches(timelines, users, positions, max_events=max_events, batch_size=64):
        scores = pretrain_encoder.score_next(graphdef, params, batch.events, batch.lengths)
        for row, (exclude, valid) in enumerate(((None, every), (batch.seen, every), (batch.seen, every & (item >= first)))):
            found[row, indices] = np.asarray(RANKS(scores, batch.targets, exclude, valid))[: batch.count] <= 10
    return timelines.item[timelines.offsets[users] + positions], found


def table(data: Parted, config: UserEncoderConfig, params: Params, max_events: int) -> list[dict]:
    """Return recall@10 of the test targets by the training events of their items, before and after the items are added.

    Before, an item that training has not seen is in no history and in no ranking, and its targets are missed.
    """
    counts = np.zeros(len(data.whole.timelines.catalogue.keys), int)
    counts[: len(data.train.train_counts)] = data.train.train_counts
    rows, first = [], len(data.train.timelines.catalogue.keys)
    for name, (items, found) in (
        ("before", hits(config, params, data.train, first, max_events)),
        ("added", hits(*grown(config, params, data), data.whole, first, max_events)),
    ):
        groups = {
            "taken out": data.drawn[items], "no event": (counts[items] == 0) & ~data.drawn[items],
            "1 to 5 events": (counts[items] > 0) & (counts[items] <= 5), "more events": counts[items] > 5,
        }  # fmt: skip
        for group, chosen in groups.items():
            recalls = [float(hit[chosen].mean()) if chosen.any() else 0.0 for hit in found]
            rows.append({"items": name, "targets": group, "n": int(chosen.sum()), **dict(zip(METRICS, recalls, strict=True))})
    return rows


def main() -> None:
    """Train, add the items, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("--data", required=True, help="the folder of the real sets")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="steps of pretraining; 0 for those of the config")
    parser.add_argument("--share", type=float, default=0.1, help="of the items that are taken out")
    args = parser.parse_args()
    module, changes = SETS[args.set]
    config = module.get_config("small")
    config.update_from_flattened_dict(changes | {"data.dir": f"{args.data}/{changes['data.dir']}", "seed": args.seed})
    if args.steps:
        config[PHASE].loop.total_steps = args.steps
    read = check(config)
    run = Run(read, epath.Path(args.workdir), make_mesh(**vars(read.mesh)))
    encoder = read.encoder_of(PHASE)
    data = parted(open_dataset(read, run.workdir).select(encoder.features), args.share, args.seed)
    task = pretrain_encoder.build(PHASE, run, data.train)
    section = read.sections[PHASE]
    params, _ = loop.run(
        task, loop.LoopConfig(**vars(section.loop)), run.optimizer_config(PHASE), run.mesh, run.workdir / PHASE, args.seed
    )
    model = pretrain_encoder.encoder_config(encoder, data.train.timelines.schema, {})
    for row in table(data, model, params, section.eval.max_events):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
