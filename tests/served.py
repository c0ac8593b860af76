"""A finished phase's model directory alone, against what the run's evaluation had measured."""

import csv
import gzip
import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from etils import epath
from ml_collections import ConfigDict
from somebody_new import away, check_somebody_new

import user_llm
from user_llm.config.check import check
from user_llm.data.dataset import open_dataset
from user_llm.evals.measured import load_measured
from user_llm.evals.transitions import TOGETHER
from user_llm.serving.personalizer import Personalizer


def raw_rows(folder: Path, needed: list[str]) -> list[dict]:
    """Return the rows of the files below a folder that have these columns."""
    found: list[dict] = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        opened = gzip.open if file.suffix == ".gz" else open
        if file.suffix == ".parquet":
            rows = pq.read_table(file).to_pylist()
        else:
            with opened(file, "rt") as lines:
                rows = list(csv.DictReader(lines)) if file.suffix == ".csv" else [json.loads(line) for line in lines]
        if rows and set(needed) <= rows[0].keys():
            found += rows
    return found


def check_served(workdir: Path, config: ConfigDict, elsewhere: Path, phase: str = "user_llm") -> Personalizer:
    """See that a phase's model directory, moved away from its run and data, answers raw events as evaluation did; return the model."""
    read = check(config)
    dataset = open_dataset(read, epath.Path(workdir))
    timelines, split = dataset.timelines, dataset.split
    users, ends = split.targets["test"]
    keys = [timelines.user_keys[user] for user in users]
    targets = [
        (timelines.catalogue.keys[timelines.items(int(user), int(end), int(end) + 1)[0]], int(end))
        for user, end in zip(users, ends, strict=True)
    ]
    counts = np.zeros(timelines.schema.num_items + 1, int)
    for user, stop in enumerate(split.train_stop):
        np.add.at(counts, timelines.items(user, 0, int(stop)), 1)
    trained = {timelines.catalogue.keys[item] for item in np.flatnonzero(counts)}
    measured = {
        name: load_measured(epath.Path(file))[2] for file in (workdir / phase / "values").glob("*.npz") for name in [file.stem]
    }
    samples = json.loads((workdir / phase / "samples.json").read_text())
    folder = next((workdir / "data").glob("world-*"))
    directory = elsewhere / "model"
    shutil.copytree(workdir / phase / "model", directory)
    with away(workdir) as (moved,):
        model = user_llm.load(directory)
        fields = model.vocabulary.fields
        rows = raw_rows(moved / folder.relative_to(workdir), [fields.user, fields.item, fields.time])
        of_user = defaultdict(list)
        for row in rows:
            of_user[str(row[fields.user])].append(row)
        histories, where, orders = {}, [], {}
        for number, (key, (target, end)) in enumerate(zip(keys, targets, strict=True)):
            ordered = _ordered(model, of_user[key])
            assert str(ordered[end][fields.item]) == target
            histories[number], orders[number] = ordered[:end], ordered
            where.append(key)
        # Rankings, and what they are worth: exactly the run's.
        method = read.contextual(phase).method + (TOGETHER if model.predictor.transitions else "")
        ranks = measured.get(f"next_item.{method}")
        assert (ranks is not None) == (model.predictor.ranks and "next_item" in read.contextual(phase).prompts.asked)
        every = sorted(trained)
        together = model.encode_many([row for history in histories.values() for row in history])
        encoded = {number: together[where[number]] for number in histories}
        np.testing.assert_allclose(model.encode(histories[0]).tokens, encoded[0].tokens, atol=1e-5)
        if ranks is not None:
            rankings = model.recommend_many(list(encoded.values()), candidates=model.vocabulary.catalogue.keys[1:])
            for number, ranking in enumerate(rankings):
                ids = [item.id for item in ranking]
                rank = ids.index(targets[number][0]) + 1 if targets[number][0] in every else np.inf
                for cutoff in (1, 5, 10):
                    assert ranks.values[f"recall@{cutoff}"][number] == (rank <= cutoff), (number, rank)
                if np.isfinite(rank):
                    np.testing.assert_allclose(ranks.values["mrr"][number], 1 / rank)
        # Texts and names: those of the run's samples.
        places = {key: number for number, key in enumerate(where)}
        for sample in samples:
            if sample["task"] == "next_item":
                best = model.recommend(encoded[places[timelines.user_keys[sample["user"]]]], 5)
                assert "; ".join(item.title for item in best) == sample["answer"], sample
            elif sample["task"] in ("favorite", "review"):
                number = places[timelines.user_keys[sample["user"]]]
                about = {}
                if sample["task"] == "review":
                    row = orders[number][targets[number][1]]
                    item = str(row[fields.item])
                    title = dict(zip(model.vocabulary.catalogue.keys, model.vocabulary.catalogue.titles, strict=True))[item]
                    about = {"title": title, "rating": int(float(row[fields.numbers["rating"].column]))}
                text = model.generate(task=sample["task"], user=encoded[number], fields=about)
                assert text.strip() == sample["answer"], (sample, text)
        check_somebody_new(model, histories[0])
    return model


def _ordered(model: Personalizer, rows: list[dict]) -> list[dict]:
    """Return a user's raw rows in the order of the model's timelines, those that count once."""
    fields, vocabulary = model.vocabulary.fields, model.vocabulary
    alone = vocabulary.read([{**row, fields.user: str(number)} for number, row in enumerate(rows)]).timelines
    facts = zip(alone.item.tolist(), alone.order[:].tolist(), strict=True)
    place: dict[tuple[int, int], dict] = {}
    for row, fact in zip(rows, facts, strict=True):
        place.setdefault(fact, row)
    whole = vocabulary.read(rows).timelines
    return [place[fact] for fact in zip(whole.item.tolist(), whole.order[:].tolist(), strict=True)]
