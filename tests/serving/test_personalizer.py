"""A model out of its directory: what it answers is what evaluation inside a run measures, for users it has never seen."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import variants

import user_llm
from user_llm.common import trees
from user_llm.models.generate import generate
from user_llm.serving import batch as batching
from user_llm.serving.user import User
from user_llm.tasks.favorite import best_classes


@pytest.mark.parametrize("made", variants("cross", "titles"), indirect=True)
def test_a_ranking_is_the_one_that_evaluation_has(made, model):
    """Of every test user, from raw events in any order, one at a time and all together."""
    users, ends = made.asking.data.split.targets["test"]
    every = made.timelines.catalogue.keys[1:]
    rows = [row for user, end in zip(users, ends, strict=True) for row in made.rows(user, end)]
    together = model.encode_many(rows[::-1])
    for indices, batch in made.asking.batches(users, ends):
        if model.predictor.ranks:
            expected = np.asarray(made.asking.score("next_item", batch))
        for place, index in enumerate(indices):
            user, end = int(users[index]), int(ends[index])
            for known in (model.encode(made.rows(user, end)[::-1]), together[made.timelines.user_keys[user]]):
                ranking = model.recommend(known, candidates=every)
                scores = {item.id: item.score for item in ranking}
                assert [item.score for item in ranking] == sorted(scores.values(), reverse=True)
                if model.predictor.ranks:
                    assert len(ranking) == len(every)
                    np.testing.assert_allclose([scores[key] for key in every], expected[place, 1:10], atol=1e-5)
                else:
                    titles = made.asking.choose("next_item", batch, model.ranker.titles, 10)[place]
                    assert [item.id for item in ranking] == [every[n - 1] for n in titles if n]


def test_a_favorite_is_the_one_that_evaluation_has(made, model):
    users, ends = made.asking.examples["favorite"].targets("test")
    best = best_classes(made.asking, "favorite", users, ends)
    known = [model.encode(made.rows(int(user), int(end))) for user, end in zip(users, ends, strict=True)]
    names = made.timelines.catalogue.vocab["genres"]
    assert model.generate_many([None] * len(known), known, task="favorite") == [names[n] for n in best]


def test_an_update_equals_encoding_all(made, model):
    user = 2  # with more events than the encoder reads
    whole = model.encode(made.rows(user))
    for split in (0, 1, 5, 10):
        late = model.update(model.encode(made.rows(user, split)), made.rows(user, start=max(split - 1, 0)))
        np.testing.assert_allclose(late.tokens, whole.tokens, atol=1e-6)
        np.testing.assert_array_equal(late.events, whole.events)
        assert (late.count, late.last_time) == (whole.count, whole.last_time)


def test_a_user_without_events_is_answered_as_by_the_bare_llm(made, model):
    nobody = model.encode([])
    assert (nobody.count, nobody.last_time, len(nobody.tokens)) == (0, None, 0)
    assert model.generate("Next:", nobody, max_tokens=6) == model.generate("Next:", max_tokens=6)
    np.testing.assert_array_equal(model.score("Next:", ["Film", "x"], nobody), model.score("Next:", ["Film", "x"]))
    assert len(model.recommend(nobody, 3)) == 3


def test_a_text_is_what_the_decoder_writes_whole_or_in_pieces(made, model):
    user = model.encode(made.rows(1))
    text = model.generate("Next:", user, max_tokens=20)
    assert "".join(model.generate("Next:", user, max_tokens=20, stream=True)) == text
    other = model.encode(made.rows(4))
    texts = model.generate_many(["Next:", "The Film", "Next:"], [user, None, other], max_tokens=20)
    assert texts == [text, model.generate("The Film", max_tokens=20), model.generate("Next:", other, max_tokens=20)]
    decoder = trees.split(trees.merge(model.predictor.graphdef, model.predictor.params).decoder)
    ids = [*model.lines.start.tolist(), *model.tokenizer.encode("The Film")]
    bare = generate(*decoder, [ids], max_tokens=20, stop_ids=model.tokenizer.stop_ids).rows()[0]
    assert texts[1] == model.tokenizer.decode(bare)
    if made.written.predictor.config.encoder is not None:
        assert not np.array_equal(model.score("Next:", ["Film"], user), model.score("Next:", ["Film"]))


def test_many_texts_are_written_in_batches(made, model):
    users = [model.encode(made.rows(user)) for user in (0, 1, 2, 3, 4, 0)]  # more than a batch
    one_by_one = [model.generate("Next:", user, max_tokens=6) for user in users]
    assert model.generate_many(["Next:"] * 6, users, max_tokens=6) == one_by_one
    assert model.generate_many([]) == []
    drawn = model.generate_many(["Next:"] * 6, users, max_tokens=6, temperature=1.0, seed=3)
    assert drawn == [model.generate("Next:", user, max_tokens=6, temperature=1.0, seed=3 + n) for n, user in enumerate(users)]


def test_writing_stops_at_a_text(model):
    text = model.generate("Next:", max_tokens=24)
    for start in (0, 3, len(text) - 2):
        stop = text[start : start + 2]
        expected = text[: text.index(stop)]
        assert model.generate("Next:", max_tokens=24, stop=[stop]) == expected
        assert "".join(model.generate("Next:", max_tokens=24, stop=[stop, "zzz"], stream=True)) == expected
    assert model.generate("Next:", max_tokens=24, stop=["no such text"]) == text


def test_who_draws_with_a_seed_draws_the_same_again(model):
    drawn = [model.generate("Next:", max_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_may_be_recommended_is_said_by_ids(made, model):
    user = model.encode(made.rows(1))
    every = {item.id for item in model.recommend(user, 100)}
    had = {row["item"] for row in made.rows(1)}
    assert had & every
    assert not {item.id for item in model.recommend(user, 100, seen=False)} & had
    assert [item.id for item in model.recommend(user, 5, allow=["10", "20"])] == [
        item.id for item in model.recommend(user, 100) if item.id in ("10", "20")
    ]
    assert "10" not in {item.id for item in model.recommend(user, 100, deny=["10"])}
    assert model.recommend(user, candidates=[]) == [] == model.recommend(user, allow=np.array([], str))
    last = [item.id for item in model.recommend(user, 100)][-2:]
    assert {item.id for item in model.recommend(user, candidates=last)} == set(last)  # whatever their ranks are
    assert len(model.recommend(user, 3, seen=False)) == 3
    top = model.recommend(user, 1)[0]
    assert top.title == dict(zip(made.timelines.catalogue.keys, made.timelines.catalogue.titles, strict=True))[top.id]


def test_unknown_items_are_counted_left_out_and_said_once(made, model, caplog):
    rows = made.rows(1)
    strange = [*rows[:2], {**rows[2], "item": "no such"}, *rows[2:], {**rows[-1], "item": "nor this"}]
    user, expected = model.encode(strange), model.encode(rows)
    assert (user.unknown, user.count) == (2, expected.count)
    np.testing.assert_array_equal(user.events, expected.events)
    assert sum("2 events are left out" in record.getMessage() for record in caplog.records) <= 1
    again = model.update(model.update(user, strange), strange[:4])
    assert (again.unknown, again.count) == (user.unknown, user.count)
    alone = model.encode([{**rows[0], "item": "no such"}])
    assert (alone.unknown, alone.count) == (1, 0)


def test_explaining_shows_what_the_user_tokens_look_at(made, model):
    user = model.encode(made.rows(2))
    if made.written.predictor.config.resampler is None:
        with pytest.raises(ValueError, match="has no resampler"):
            model.explain(user)
        return
    seen = model.explain(user)
    weights = [one.weight for one in seen]
    assert len(seen) == 6 and weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1
    assert sorted(one.events_ago for one in seen) == [1, 2, 3, 4, 5, 6]
    last = next(one for one in seen if one.events_ago == 1)
    assert last.id == made.rows(2)[-1]["item"]
    events, lengths = batching.histories(model.predictor, [user], 50)
    np.testing.assert_allclose(last.weight, model.predictor.attended(events, lengths)[0][5], rtol=1e-5)
    assert model.explain(user, 2) == seen[:2]


def test_stored_bytes_answer_as_the_user_does(made, model):
    user = model.encode(made.rows(2))
    again = User.from_bytes(user.to_bytes())
    scores = [{item.id: item.score for item in model.recommend(one, 100)} for one in (user, again)]
    assert scores[0].keys() == scores[1].keys() or not model.predictor.ranks
    if model.predictor.ranks:
        spread = max(scores[0].values()) - min(scores[0].values())
        assert max(abs(scores[0][key] - scores[1][key]) for key in scores[0]) < 0.05 * spread
    np.testing.assert_array_equal(model.update(again, made.rows(2)).tokens, user.tokens)


def test_what_does_not_fit_is_one_sentence(made, model):
    user = model.encode(made.rows(1))
    other = dataclasses.replace(user, model="another")
    for call, message in (
        (lambda: model.recommend(other), "encoded by the model another"),
        (lambda: model.update(other, []), "encoded by the model another"),
        (lambda: model.generate("x", other), "encoded by the model another"),
        (lambda: model.recommend(made.rows(1)), "list is no user"),
        (lambda: model.recommend(user, 0), "k=0 must be at least 1"),
        (lambda: model.recommend(user, deny=["7777"]), "No item has the id '7777'"),
        (lambda: model.recommend(user, allow="10"), "'10' is one id: pass a list"),
        (lambda: model.recommend(user, allow=["10"], candidates=["10"]), "candidates or allow"),
        (lambda: model.explain(user, 0), "k=0 must be at least 1"),
        (lambda: model.update(user, made.rows(2)), "events are of another user"),
        (lambda: model.generate("x", stop="END"), "pass a list of texts"),
        (lambda: model.generate("x", stop=[""]), "pass a list of texts"),
        (lambda: model.score("x", "abc"), "'abc' is one text: pass a list"),
        (lambda: model.encode(made.rows(0) + made.rows(1)), "events of 2 users"),
        (lambda: model.update(user, made.rows(0) + made.rows(1)), "events of 2 users"),
        (lambda: model.encode([{"item": "10"}]), "timestamp"),
        (lambda: model.encode([{**made.rows(1)[0], "timestamp": "soon"}]), "row 1"),
        (lambda: model.generate(), "Give one of a prompt, a task and a chat"),
        (lambda: model.generate("x", task="favorite"), "Give one of a prompt, a task and a chat"),
        (lambda: model.generate(task="review"), "not trained for the task 'review', but for next_item, favorite"),
        (lambda: model.generate("x", temperature=-1), "temperature -1"),
        (lambda: model.generate(chat=[{"role": "user", "content": "Hi"}]), "no chat template"),
        (lambda: model.generate_many(["x"], [user, user]), "1 prompts for 2 users"),
        (lambda: model.score("x", [""]), "empty candidate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_model_in_another_type_is_another_model(make_model):
    made = make_model("cross")
    user = user_llm.load(made.directory).encode(made.rows(1))
    half = user_llm.load(made.directory, dtype="bfloat16")
    with pytest.raises(ValueError, match="encode their events again"):
        half.recommend(user)
    assert user_llm.load(made.directory, dtype="float32").identity == user.model


@pytest.mark.slow
def test_a_model_in_half_precision_answers(make_model):
    made = make_model("cross")
    half = user_llm.load(made.directory, dtype="bfloat16")
    assert len(half.recommend(half.encode(made.rows(1)), 3)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "no such"}, "device='no such'"),
        ({"mesh": (1, 1)}, r"mesh=\(1, 1\): name the sizes of data, fsdp, tensor"),
        ({"mesh": (3, 1, 1)}, "does not fit 8 devices"),
        ({"mesh": (8, 1, 1), "device": "cpu"}, "device or mesh, and not both"),
    ],
)
def test_devices_that_are_not_there_are_refused(make_model, settings, message):
    with pytest.raises(ValueError, match=message):
        user_llm.load(make_model("cross").directory, **settings)


@pytest.mark.slow
def test_one_device_and_eight_answer_alike(make_model):
    made = make_model("cross")
    one, eight = user_llm.load(made.directory), user_llm.load(made.directory, mesh=(2, 2, 2))
    assert len(jax.devices()) == 8 and eight.predictor.mesh.size == 8
    rows = [row for user in range(5) for row in made.rows(user)]
    answers = [
        {key: [item.score for item in model.recommend(user, candidates=made.timelines.catalogue.keys[1:])] for key, user in model.encode_many(rows).items()}
        for model in (one, eight)
    ]  # fmt: skip
    assert answers[0].keys() == answers[1].keys()
    for key in answers[0]:
        np.testing.assert_allclose(answers[0][key], answers[1][key], atol=1e-5)
