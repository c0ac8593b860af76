"""Every layout of a synthetic world is read back by its dataset's own reader; its words tell of ratings and of taste."""

import collections
import csv
import gzip
import hashlib
import itertools
import re

import numpy as np
import pytest
from etils import epath

from configs import quickstart
from user_llm.common.files import make_once
from user_llm.config.reader import read_config
from user_llm.data import prepare, synthetic_files
from user_llm.data.audits import audit
from user_llm.data.dataset import find_data
from user_llm.data.splits import leave_last_out
from user_llm.data.synthetic import optimal_ranks, sample_histories
from user_llm.data.synthetic_reviews import ADJECTIVES, write_reviews
from user_llm.data.synthetic_words import PRODUCTS

SIZES = {"num_users": 120, "num_items": 96, "events_per_user": 24}
TINY = {"num_users": 5, "num_items": 40, "events_per_user": 8}


def find(layout, workdir):
    """Find the world as a run does: by its config."""
    config = quickstart.get_config()
    config.data.synthetic.update(layout=layout, **SIZES)
    return find_data(read_config(config), epath.Path(workdir), {})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Return of each layout (world, its histories, what the reader made of it)."""
    found = {}
    for layout in synthetic_files.LAYOUTS:
        workdir = tmp_path_factory.mktemp(layout)
        timelines = prepare.load(find(layout, workdir), workdir / "data")
        world = synthetic_files.write(workdir / "again", layout=layout, seed=0, **SIZES)
        found[layout] = world, sample_histories(world, SIZES["num_users"], SIZES["events_per_user"], 0), timelines
    return found


@pytest.mark.parametrize(
    ("layout", "name", "levels", "columns", "bag"),
    [
        ("movielens", "synthetic", 2, ["rating", "timestamp"], "genres"),
        ("amazon", "amazon-Synthetic", 1, ["rating", "review", "summary", "timestamp"], "categories"),
        ("google_local", "google-local-Synthetic", 1, ["rating", "review", "timestamp"], "categories"),
    ],
)
def test_the_readers_read_what_was_sampled(worlds, layout, name, levels, columns, bag):
    world, histories, timelines = worlds[layout]
    assert timelines.name == name and sorted(timelines.columns) == columns
    events = list(histories.events())
    titles = [timelines.catalogue.titles[item] for item in timelines.item]
    assert titles == [world.items[item].title for _, _, item, _, _ in events]
    np.testing.assert_array_equal(timelines.columns["rating"], [levels * stars for *_, stars, _ in events])
    np.testing.assert_array_equal(timelines.columns["timestamp"], [time for *_, time in events])
    np.testing.assert_array_equal(timelines.lengths, histories.lengths)
    groups = {item.title: set(item.groups) for item in world.items}
    vocab = timelines.catalogue.vocab[bag]
    for title, ids in zip(timelines.catalogue.titles[1:], timelines.catalogue.multi[bag][1:], strict=True):
        assert groups[title] <= {vocab[i] for i in ids}
    facts = audit(timelines, leave_last_out(timelines))
    assert facts["untitled_items"] == facts["duplicates_dropped"] == 0


def test_all_layouts_hold_the_same_events_and_the_same_optimum(worlds):
    ranks = []
    for world, histories, timelines in worlds.values():
        for name in ("items", "stars", "times"):
            np.testing.assert_array_equal(getattr(histories, name), getattr(worlds["movielens"][1], name))
        users, positions = leave_last_out(timelines).targets["test"]
        ranks.append(optimal_ranks(world, timelines, users[:20], positions[:20]))
    np.testing.assert_array_equal(ranks[0], ranks[1])
    np.testing.assert_array_equal(ranks[0], ranks[2])


def test_texts_are_those_that_were_written(worlds):
    world, histories, timelines = worlds["amazon"]
    written = [review for reviews in write_reviews(world, PRODUCTS, histories, 0) for review in reviews]
    assert timelines.columns["summary"].tolist() == [review.summary for review in written]
    assert timelines.columns["review"].tolist() == [review.text for review in written]
    reviews = worlds["google_local"][2].columns["review"]
    assert 0.15 < np.mean(reviews == "") < 0.25
    assert len(set(reviews.tolist())) > 0.5 * len(reviews)


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(("layout", "column"), [("amazon", "summary"), ("amazon", "review"), ("google_local", "review")])
def test_counting_words_tells_the_rating(worlds, layout, column):
    """Naive Bayes, counted on one half of the users and held against the other half."""
    timelines = worlds[layout][2]
    texts, stars = timelines.columns[column].tolist(), timelines.columns["rating"]
    kept = [row for row, text in enumerate(texts) if text]
    train, test = ([row for row in kept if timelines.users_of(row) % 2 == part] for part in (1, 0))
    counts = collections.defaultdict(lambda: np.full(5, 0.1))
    for row in train:
        for word in words_of(texts[row]):
            counts[word][stars[row] - 1] += 1
    documents = np.bincount(stars[train], minlength=6)[1:] + 0.2
    scores = {word: np.log(count / documents) for word, count in counts.items()}

    def guess(text):
        return 1 + np.argmax(np.log(documents) + sum(scores[word] for word in words_of(text) if word in scores))

    accuracy = np.mean([guess(texts[row]) == stars[row] for row in test])
    chance = np.bincount(stars[test]).max() / len(test)
    assert chance < 0.6
    assert accuracy > chance + 0.3


def test_aspects_and_words_are_the_users_own(worlds):
    """The word that a user used most for a rating, and the aspect named first, return in the last review: above chance, far."""
    _, _, timelines = worlds["amazon"]
    aspects = words = same_aspect = same_word = 0
    for user in range(len(timelines)):
        rows = range(timelines.offsets[user], timelines.offsets[user + 1])
        named = [re.search(r"The (\w+) is (\w+)", timelines.columns["review"][row]).groups() for row in rows]
        aspects += 1
        same_aspect += collections.Counter(aspect for aspect, _ in named[:-1]).most_common(1)[0][0] == named[-1][0]
        alike = [
            word
            for (_, word), row in zip(named, rows, strict=True)
            if timelines.columns["rating"][row] == timelines.columns["rating"][rows[-1]]
        ]
        if len(alike) > 3:
            words += 1
            same_word += collections.Counter(alike[:-1]).most_common(1)[0][0] == alike[-1]
    assert same_aspect / aspects > 0.6 and words > 50 and same_word / words > 0.6  # of 8 and 4 choices


def test_the_first_sentence_tells_how_often_the_group_was_chosen(worlds):
    world, histories, _ = worlds["amazon"]
    reviews = write_reviews(world, PRODUCTS, histories, 0)
    seen = set()
    for user, t, item, stars, _ in histories.events():
        main = world.items[item].main
        earlier = [world.items[i].main for i in histories.items[user, :t]]
        text = reviews[user][t].text
        assert text.startswith("My first try at") == (main not in earlier)
        assert text.startswith("As so often") == (main in earlier and earlier.count(main) / len(earlier) >= 0.25)
        assert main in text and reviews[user][t].summary.split()[0].lower() in ADJECTIVES[stars]
        seen.add(text.split()[0])
    assert {"My", "As"} < seen


def test_rows_of_events_are_read_by_their_columns(worlds):
    world, histories, timelines = worlds["events"]
    titles = [timelines.catalogue.titles[item] for item in timelines.item]
    assert titles == [world.items[item].title for _, _, item, _, _ in histories.events()]
    main = {item.title: item.groups[0] for item in world.items}
    bags = timelines.catalogue.multi["categories"][1:, 0]
    assert [timelines.catalogue.vocab["categories"][i] for i in bags] == [
        main[title] for title in timelines.catalogue.titles[1:]
    ]
    assert timelines.schema.names == ("item", "rating", "categories", "gap")


@pytest.mark.parametrize("layout", synthetic_files.LAYOUTS)
def test_the_same_seed_writes_the_same_files(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(gzip.time, "time", itertools.count(1_000_000_000).__next__)  # at another time, too
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        synthetic_files.write(tmp_path / name, layout=layout, seed=seed, **TINY)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(names) == (1 if layout == "events" else 2)
    for file in names:
        one, again, other = ((tmp_path / name / file).read_bytes() for name in ("one", "again", "other"))
        assert one == again != other


def test_the_world_of_films_stays_what_it_was(tmp_path):
    """Published figures were measured on it."""
    synthetic_files.write(tmp_path / "w", layout="movielens", seed=7, num_users=60, num_items=48, events_per_user=14)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in (tmp_path / "w").iterdir()}
    assert digests == {"movies.csv": "316ba6bf5ad8", "ratings.csv": "673cec664ab8"}


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="Unknown data.synthetic.layout 'books': choose one of movielens, amazon, google_local, events"
    ):
        synthetic_files.write(tmp_path / "w", layout="books", seed=0, **TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layout", "broken"), [("movielens", (csv, "writer")), ("amazon", (gzip.GzipFile, "write"))])
def test_an_interrupted_world_leaves_no_directory(tmp_path, monkeypatch, layout, broken):
    with monkeypatch.context() as patch:
        patch.setattr(*broken, lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_once(tmp_path / "w", lambda path: synthetic_files.write(path, layout=layout, seed=0, **TINY))
    assert not (tmp_path / "w").exists()
    (tmp_path / "w.unfinished" / "left").write_text("of another layout")
    make_once(tmp_path / "w", lambda path: synthetic_files.write(path, layout=layout, seed=0, **TINY))
    assert len(list((tmp_path / "w").iterdir())) == 2
