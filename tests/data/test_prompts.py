"""Rows of text: answer positions, truncation, the tasks' targets by hand, and what is refused."""

import dataclasses

import numpy as np
import pytest

from user_llm.data.prompts.base import Lines, Question, pad_rows
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.splits import Split, leave_last_out
from user_llm.data.timelines import Catalogue, Timelines
from user_llm.data.tokenizer import Tokenizer, train_bpe
from user_llm.tasks.favorite import FavoriteExamples, Labels, OfFuture, OfHistory
from user_llm.tasks.next_item import NextItemExamples
from user_llm.tasks.review import ReviewExamples

TITLES = ["", "Emma (1996)", "The Matrix (1999)", "Amélie (2001)", "A Very, Very Long Title of a Film (1987)"]
GENRES = ["", "Action", "Comedy", "Drama"]
BAGS = np.array([[0, 0], [2, 3], [1, 0], [2, 0], [0, 0]])
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_bpe(TITLES, 300, tmp_path_factory.mktemp("bpe") / "tokenizer")


@pytest.fixture
def timelines(make_timelines) -> Timelines:
    """Three users of the films above, and what the first wrote about theirs."""
    made = make_timelines([[2, 3, 1, 4], [4, 4, 4], [1, 1, 3, 2, 2]])
    catalogue = Catalogue(titles=TITLES, keys=TITLES, multi={"genres": BAGS}, vocab={"genres": GENRES})
    written = np.array(["so loud", "", "dear Emma", "too long", *[""] * 8], np.dtypes.StringDType())
    columns = {"rating": np.array([1, 2, 5, 3] + 8 * [4]), "review": written}
    return dataclasses.replace(made, catalogue=catalogue, columns=columns)


def make_lines(tokenizer, timelines, text_items, max_title_tokens=60, history="titles"):
    return Lines(tokenizer, timelines.catalogue, max_title_tokens=max_title_tokens, history=history, text_items=text_items)


def build(tokenizer, timelines, text_items=0, *, max_tokens=200, instruction="Films in order:", **options):
    lines = make_lines(tokenizer, timelines, text_items, **options)
    template = NextItem(lines, instruction=instruction, max_tokens=max_tokens)
    return NextItemExamples(template, timelines, leave_last_out(timelines))


def read(tokenizer, row):
    """Return the row's lines, and the text after each answer position up to the next newline."""
    text = tokenizer.decode(row.ids)
    assert text.endswith("\n")
    return text.split("\n")[:-1], [tokenizer.decode(row.ids[a + 1 :]).split("\n")[0] for a in row.answers]


@pytest.mark.parametrize("text_items", [0, 1, 2, 3])
def test_the_answer_stands_on_the_newline_before_the_next_title(tokenizer, timelines, text_items):
    prompts = build(tokenizer, timelines, text_items)
    row = prompts.row(0, 2)
    lines, answered = read(tokenizer, row)
    assert lines == ["Films in order:", *[TITLES[2], TITLES[3]][2 - min(text_items, 2) :], TITLES[1]]
    assert answered == [TITLES[1]]
    np.testing.assert_array_equal(row.items, [1])
    assert prompts.answer(0, 2) == TITLES[1]
    assert (row.ids[row.answers] == prompts.template.lines.end_id).all()
    assert row.ids[0] == tokenizer.bos_id and list(row.ids).count(tokenizer.bos_id) == 1


def test_in_a_stretch_every_title_after_the_first_is_an_answer(tokenizer, timelines):
    row = build(tokenizer, timelines, 2).stretch(0, 0, 3, RNG)
    lines, answered = read(tokenizer, row)
    assert lines == ["Films in order:", *(TITLES[i] for i in (2, 3, 1, 4))]
    assert answered == [TITLES[i] for i in (3, 1, 4)]
    np.testing.assert_array_equal(row.items, [3, 1, 4])


def test_a_prompt_is_the_row_up_to_its_answer(tokenizer, timelines):
    prompts = build(tokenizer, timelines, 2)
    row = prompts.row(0, 2)
    np.testing.assert_array_equal(prompts.prompt(0, 2), row.ids[: row.answers[0] + 1])
    np.testing.assert_array_equal(prompts.prompt(0, 0), prompts.template.instruction)
    np.testing.assert_array_equal(prompts.row(0, 0).answers, [len(prompts.template.instruction) - 1])
    assert prompts.template.shared_tokens == len(prompts.template.instruction) - 1


def test_tokens_of_the_target_follow_its_prompt(tokenizer, timelines):
    prompts = build(tokenizer, timelines, 1)
    targets = prompts.template.lines.titles_as_targets()
    assert sorted(targets) == [1, 2, 3, 4]
    for end, item in enumerate((2, 3, 1, 4)):
        assert [*prompts.prompt(0, end), *targets[item]] == prompts.row(0, end).ids.tolist()


def test_no_start_token_where_the_model_has_none(tokenizer, timelines):
    prompts = build(Tokenizer(tokenizer.backend, None, 2, 0), timelines)
    assert tokenizer.decode(prompts.template.instruction) == "Films in order:\n"
    assert len(prompts.template.instruction) == len(build(tokenizer, timelines).template.instruction) - 1


def test_the_oldest_titles_are_left_out_of_long_rows(tokenizer, timelines):
    longest = len(tokenizer.encode(TITLES[4]))
    whole = build(tokenizer, timelines, 3).row(0, 3)
    row = build(tokenizer, timelines, 3, max_tokens=len(whole.ids) - 1, max_title_tokens=longest).row(0, 3)
    assert read(tokenizer, row) == (["Films in order:", TITLES[3], TITLES[1], TITLES[4]], [TITLES[4]])
    np.testing.assert_array_equal(row.items, [4])
    fits = build(tokenizer, timelines, 3, max_tokens=len(whole.ids), max_title_tokens=longest)
    np.testing.assert_array_equal(fits.row(0, 3).ids, whole.ids)


def test_truncation_that_reaches_the_answers_keeps_items_and_answers_together(tokenizer, timelines):
    whole = build(tokenizer, timelines).stretch(0, 0, 3, RNG)
    instruction = len(build(tokenizer, timelines).template.instruction)
    last = len(tokenizer.encode(TITLES[4]))
    prompts = build(tokenizer, timelines, max_tokens=instruction + last + 1, max_title_tokens=last)
    row = prompts.stretch(0, 0, 3, RNG)
    assert len(row.ids) <= prompts.template.max_tokens < len(whole.ids)
    assert read(tokenizer, row) == (["Films in order:", TITLES[4]], [TITLES[4]])
    np.testing.assert_array_equal(row.items, [4])


def test_long_titles_are_cut_in_rows_but_never_in_ranking_targets(tokenizer, timelines):
    prompts = build(tokenizer, timelines, max_title_tokens=5)
    row = prompts.row(0, 3)
    assert row.ids[len(prompts.template.instruction) :].tolist() == [
        *tokenizer.encode(TITLES[4])[:5],
        prompts.template.lines.end_id,
    ]
    assert tokenizer.decode(prompts.template.lines.titles_as_targets()[4]) == TITLES[4] + "\n"


def test_an_instruction_that_leaves_no_room_is_refused(tokenizer, timelines):
    need = len(build(tokenizer, timelines).template.instruction) + 20 + 1
    build(tokenizer, timelines, max_tokens=need, max_title_tokens=20)
    with pytest.raises(ValueError, match=f"must fit {need - 1} tokens: raise max_tokens"):
        build(tokenizer, timelines, max_tokens=need - 1, max_title_tokens=20)
    with pytest.raises(ValueError, match="Unknown kind of history 'poem': choose titles or summary"):
        build(tokenizer, timelines, history="poem")


def test_a_summary_counts_all_events_and_names_the_last(tokenizer, timelines):
    prompts = build(tokenizer, timelines, 2, history="summary")
    lines, answered = read(tokenizer, prompts.row(2, 4))
    assert lines[1:-1] == [
        "4 events; genres: Comedy 3, Drama 2, Action 1; most often: Emma (1996) 2 times; last: The Matrix (1999), Amélie (2001)"
    ]
    assert answered == [TITLES[2]]
    np.testing.assert_array_equal(prompts.stretch(2, 1, 4, RNG).ids, prompts.row(2, 4).ids)
    assert read(tokenizer, prompts.row(2, 0))[0] == ["Films in order:", TITLES[1]]


@pytest.mark.parametrize(
    ("user", "stop", "single", "whole"),
    [
        (0, 1, "Action", "Action"),
        (0, 2, "Comedy", "Comedy"),  # one each: the most recent
        (0, 3, "Comedy", "Comedy|Drama"),
        (0, 4, "Comedy", "Comedy|Drama"),  # an event without genres counts for nothing
        (1, 3, "", ""),
        (2, 2, "Comedy", "Comedy|Drama"),  # both twice, both last in the same event: by name
        (2, 5, "Comedy", "Action"),  # whole: two of two kinds, of which the last
    ],
)
def test_the_favorite_is_the_most_frequent_class_and_then_the_most_recent(timelines, user, stop, single, whole):
    for together, expected in ((False, single), (True, whole)):
        labels = Labels(timelines, feature="genres", whole=together)
        assert labels.names[labels.favorite(user, 0, stop)] == expected


def make_favorite(kind, tokenizer, timelines, split, text_items=0, whole=False):
    lines, labels = make_lines(tokenizer, timelines, text_items), Labels(timelines, feature="genres", whole=whole)
    template = Question(lines, instruction="", question="Favorite?", max_tokens=60, max_target_tokens=20)
    return FavoriteExamples(template, kind(labels, split))


def test_favorite_asks_for_the_history_and_favorite_future_for_what_follows_it(tokenizer, timelines):
    split = leave_last_out(timelines)  # trains on 2, 1 and 3 events
    past, future = (make_favorite(kind, tokenizer, timelines, split) for kind in (OfHistory, OfFuture))
    assert read(tokenizer, past.row(2, 2)) == (["Favorite?", "Comedy"], ["Comedy"])
    assert read(tokenizer, future.row(2, 2)) == (["Favorite?", "Comedy"], ["Comedy"])  # of event 2 alone, not of the withheld
    # At the end of training the future is what is withheld.
    assert future.answer(2, 3) == "Action"
    assert past.row(1, 2) is None  # nothing to name
    row = past.row(2, 2)
    assert not row.items.any() and tokenizer.decode(row.ids[: row.answers[0] + 1]).endswith("Favorite?\n")
    np.testing.assert_array_equal(past.prompt(2, 2), row.ids[: row.answers[0] + 1])


def test_favorite_reads_titles_where_there_is_no_encoder(tokenizer, timelines):
    past = make_favorite(OfHistory, tokenizer, timelines, leave_last_out(timelines), text_items=2)
    assert read(tokenizer, past.row(2, 3))[0] == [TITLES[1], TITLES[3], "Favorite?", "Comedy"]
    ends = {len(read(tokenizer, past.stretch(2, 0, 4, np.random.default_rng(i)))[0]) for i in range(20)}
    assert ends == {3, 4}  # one title or two: a random end


def test_targets_are_the_split_s_and_of_the_future_each_user_is_in_one_part(tokenizer, make_timelines):
    timelines = make_timelines([[1, 2, 3, 4, 1, 2]] * 50)
    catalogue = Catalogue(titles=TITLES, keys=TITLES, multi={"genres": BAGS}, vocab={"genres": GENRES})
    timelines = dataclasses.replace(timelines, catalogue=catalogue)
    split = leave_last_out(timelines)
    past, future = (make_favorite(kind, tokenizer, timelines, split) for kind in (OfHistory, OfFuture))
    for part in ("validation", "test"):
        np.testing.assert_array_equal(past.asked.targets(part), split.targets[part])
    parts = [future.asked.targets(part) for part in ("validation", "test")]
    assert 3 < len(parts[0][0]) < 20
    assert sorted(np.concatenate([users for users, _ in parts])) == list(range(50))
    assert all((ends == 4).all() for _, ends in parts)


def test_a_user_with_nothing_withheld_has_no_future(tokenizer, timelines):
    split = Split("none", timelines.lengths, {})
    future = make_favorite(OfFuture, tokenizer, timelines, split)
    assert all(not len(future.asked.targets(part)[0]) for part in ("validation", "test"))


def make_review(tokenizer, timelines, column="review", **changes):
    options = {
        "instruction": "", "question": "On {title}, rated {rating}:", "max_tokens": 80, "max_target_tokens": 20,
    } | changes  # fmt: skip
    template = Question(make_lines(tokenizer, timelines, 0), **options)
    return ReviewExamples(template, timelines, leave_last_out(timelines), column=column)


def test_review_knows_whether_its_longest_question_leaves_room_for_the_answer(tokenizer, timelines):
    """The items of the longest titles decide: with a token less than theirs takes, a prompt about one of them would be refused."""
    review = make_review(tokenizer, timelines)
    questions = [len(review.template.ask(**review.fields(item, 10))) for item in range(1, len(timelines.catalogue.titles))]
    assert max(questions) > min(questions)
    least = len(review.template.instruction) + max(questions) + review.template.max_target_tokens + 1
    make_review(tokenizer, timelines, max_tokens=least).check_room()
    with pytest.raises(ValueError, match="raise max_tokens"):
        make_review(tokenizer, timelines, max_tokens=least - 1).check_room()


def test_review_asks_about_the_event_at_the_end(tokenizer, timelines):
    review = make_review(tokenizer, timelines)
    assert read(tokenizer, review.row(0, 2)) == (["On Emma (1996), rated 5:", "dear Emma"], ["dear Emma"])
    assert review.row(0, 1) is None  # nothing was written
    users, ends = review.targets("test")
    assert (users.tolist(), ends.tolist()) == ([0], [3])
    assert review.answer(0, 3) == "too long"
    cut = make_review(tokenizer, timelines, max_target_tokens=2).row(0, 2)
    assert cut.ids[cut.answers[0] + 1 :].tolist() == [*tokenizer.encode("dear Emma")[:2], review.template.lines.end_id]


def test_what_a_dataset_does_not_have_is_refused(tokenizer, timelines):
    with pytest.raises(ValueError, match=r"no text 'summary' to write: its texts are review"):
        make_review(tokenizer, timelines, column="summary")
    with pytest.raises(ValueError, match=r"asks for \{price\}: it may name \{title\} and \{rating\}"):
        make_review(tokenizer, timelines, question="{price}?")
    with pytest.raises(ValueError, match=r"no 'colors' to be a favourite: set labels.feature to one of its own \(genres\)"):
        Labels(timelines, feature="colors", whole=False)
    with pytest.raises(ValueError, match="do not fit 10 tokens: raise max_tokens"):
        make_review(tokenizer, timelines, max_tokens=10).prompt(0, 2)


def test_rows_are_padded_on_the_right():
    np.testing.assert_array_equal(
        pad_rows([np.array([5, 6]), np.array([], int), np.array([7])], 3), [[5, 6, 0], [0, 0, 0], [7, 0, 0]]
    )
