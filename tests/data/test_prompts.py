"""Rows of text: answer positions, truncation, and what is refused."""

import numpy as np
import pytest

from user_llm.data.prompts import NextItemPrompts, pad_rows
from user_llm.data.tokenizer import Tokenizer, train_bpe

TITLES = ["", "Emma (1996)", "The Matrix (1999)", "Amélie (2001)", "A Very, Very Long Title of a Film (1987)"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_bpe(TITLES, 300, tmp_path_factory.mktemp("bpe") / "tokenizer")


def build(tokenizer, *, max_tokens=200, max_title_tokens=60, instruction="Films in order:"):
    return NextItemPrompts(tokenizer, TITLES, instruction=instruction, max_tokens=max_tokens, max_title_tokens=max_title_tokens)


def read(tokenizer, row):
    """Return the row's lines, and the text after each answer position up to the next newline."""
    text = tokenizer.decode(row.ids)
    assert text.endswith("\n")
    return text.split("\n")[:-1], [tokenizer.decode(row.ids[a + 1 :]).split("\n")[0] for a in row.answers]


@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_answers_stand_on_the_newline_before_each_title_to_predict(tokenizer, given):
    prompts = build(tokenizer)
    items = [2, 3, 1]
    row = prompts.row(items, given)
    lines, answered = read(tokenizer, row)
    assert lines == ["Films in order:", *(TITLES[i] for i in items)]
    assert answered == [TITLES[i] for i in items[given:]]
    np.testing.assert_array_equal(row.items, items[given:])
    assert (row.ids[row.answers] == prompts.end_id).all()
    assert row.ids[0] == tokenizer.bos_id and list(row.ids).count(tokenizer.bos_id) == 1


def test_a_prompt_is_the_row_up_to_its_answer(tokenizer):
    prompts = build(tokenizer)
    row = prompts.row([2, 3, 1], 2)
    np.testing.assert_array_equal(prompts.prompt([2, 3]), row.ids[: row.answers[0] + 1])
    np.testing.assert_array_equal(prompts.prompt([]), prompts.instruction)
    np.testing.assert_array_equal(prompts.row([1], 0).answers, [len(prompts.instruction) - 1])


def test_tokens_of_the_target_follow_its_prompt(tokenizer):
    prompts = build(tokenizer)
    targets = prompts.targets()
    assert sorted(targets) == [1, 2, 3, 4]
    for item in targets:
        row = prompts.row([2, item], 1)
        assert [*prompts.prompt([2]), *targets[item]] == row.ids.tolist()


def test_no_start_token_where_the_model_has_none(tokenizer):
    prompts = build(Tokenizer(tokenizer.backend, None, 2, 0))
    assert tokenizer.decode(prompts.instruction) == "Films in order:\n"
    assert len(prompts.instruction) == len(build(tokenizer).instruction) - 1


def test_the_oldest_titles_are_left_out_of_long_rows(tokenizer):
    longest = len(tokenizer.encode(TITLES[4]))
    whole = build(tokenizer).row([4, 2, 3, 1], 3)
    row = build(tokenizer, max_tokens=len(whole.ids) - 1, max_title_tokens=longest).row([4, 2, 3, 1], 3)
    lines, answered = read(tokenizer, row)
    assert lines == ["Films in order:", TITLES[2], TITLES[3], TITLES[1]]
    assert answered == [TITLES[1]]
    np.testing.assert_array_equal(row.items, [1])
    fits = build(tokenizer, max_tokens=len(whole.ids), max_title_tokens=longest)
    np.testing.assert_array_equal(fits.row([4, 2, 3, 1], 3).ids, whole.ids)


def test_truncation_that_reaches_the_answers_keeps_items_and_answers_together(tokenizer):
    whole = build(tokenizer).row([1, 2, 3], 1)
    instruction = len(build(tokenizer).instruction)
    last = len(tokenizer.encode(TITLES[3]))
    prompts = build(tokenizer, max_tokens=instruction + last + 1, max_title_tokens=last)
    row = prompts.row([1, 2, 3], 1)
    assert len(row.ids) <= prompts.max_tokens < len(whole.ids)
    assert read(tokenizer, row) == (["Films in order:", TITLES[3]], [TITLES[3]])
    np.testing.assert_array_equal(row.items, [3])


def test_long_titles_are_cut_in_rows_but_never_in_ranking_targets(tokenizer):
    prompts = build(tokenizer, max_title_tokens=5)
    row = prompts.row([4], 0)
    assert row.ids[len(prompts.instruction) :].tolist() == [*tokenizer.encode(TITLES[4])[:5], prompts.end_id]
    assert tokenizer.decode(prompts.targets()[4]) == TITLES[4] + "\n"


def test_an_instruction_that_leaves_no_room_is_refused(tokenizer):
    need = len(build(tokenizer).instruction) + 20 + 1
    build(tokenizer, max_tokens=need, max_title_tokens=20)
    with pytest.raises(ValueError, match=f"do not fit {need - 1} tokens: raise max_tokens"):
        build(tokenizer, max_tokens=need - 1, max_title_tokens=20)


def test_rows_are_padded_on_the_right():
    np.testing.assert_array_equal(
        pad_rows([np.array([5, 6]), np.array([], int), np.array([7])], 3), [[5, 6, 0], [0, 0, 0], [7, 0, 0]]
    )
