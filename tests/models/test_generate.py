import numpy as np
import pytest

from user_llm.models import generate as module
from user_llm.models.generate import generate, stream
from user_llm.models.sampling import Sampling

SEEDS = [11, 12, 13]
DRAWN = {"sampling": Sampling(1.5, top_k=9, top_p=0.97, min_p=0.001), "seeds": SEEDS}


def _greedy(tiny, row, steps, stop_ids=()):
    tokens = []
    while len(tokens) < steps and (not tokens or tokens[-1] not in stop_ids):
        tokens.append(int(tiny.log_probs(row, tokens)[-1].argmax()))
    return tokens


def test_greedy_equals_argmax_of_full_forwards(tiny):
    expected = [_greedy(tiny, row, 8) for row in range(3)]
    written = generate(*tiny.model, tiny.prompts, max_tokens=8, user=tiny.user)
    assert written.tokens.tolist() == written.rows() == expected

    # Tokens that some rows write early end those rows and no others.
    stop_ids = [expected[0][2], expected[1][4]]
    stopped = [_greedy(tiny, row, 8, stop_ids) for row in range(3)]
    assert len({len(row) for row in stopped}) > 1
    written = generate(*tiny.model, tiny.prompts, max_tokens=8, stop_ids=stop_ids, user=tiny.user)
    assert written.rows() == stopped and written.lengths.tolist() == [len(row) for row in stopped]
    assert not written.tokens[np.arange(8) >= written.lengths[:, None]].any()


def test_prompts_may_come_as_embeddings(tiny):
    expected = generate(*tiny.model, tiny.prompts, max_tokens=8, user=tiny.user)
    embedded = np.asarray(tiny.params["embed"])[tiny.padded]
    written = generate(*tiny.model, embedded, lengths=tiny.lengths, max_tokens=8, user=tiny.user)
    np.testing.assert_array_equal(written.tokens, expected.tokens)


@pytest.mark.slow
def test_a_row_draws_the_same_wherever_it_stands_and_whatever_is_beside_it(tiny):
    alone = [
        generate(
            *tiny.model, [tiny.prompts[row]], max_tokens=9, sampling=DRAWN["sampling"], seeds=[SEEDS[row]],
            user=tiny.user._replace(k=tiny.user.k[:, [row]], v=tiny.user.v[:, [row]], mask=tiny.user.mask[[row]]),
        ).rows()[0]
        for row in range(3)
    ]  # fmt: skip
    assert generate(*tiny.model, tiny.prompts, max_tokens=9, user=tiny.user, **DRAWN).rows() == alone

    # In another order, beside a greedy row whose long prompt pads the others further.
    order = [2, 0, 1, 0]
    user = tiny.user._replace(k=tiny.user.k[:, order], v=tiny.user.v[:, order], mask=tiny.user.mask[order])
    prompts = [tiny.prompts[2], tiny.prompts[0], tiny.prompts[1], [5] * 70]
    written = generate(
        *tiny.model, prompts, max_tokens=9, user=user, sampling=[DRAWN["sampling"]] * 3 + [Sampling()], seeds=[13, 11, 12, 0]
    )
    assert written.rows()[:3] == [alone[2], alone[0], alone[1]]
    # Another seed draws otherwise.
    assert generate(*tiny.model, tiny.prompts, max_tokens=9, user=tiny.user, **DRAWN | {"seeds": [1, 2, 3]}).rows() != alone


@pytest.mark.parametrize("how", [{}, DRAWN], ids=["greedy", "sampled"])
def test_a_stream_holds_the_same_tokens(tiny, how):
    first = generate(*tiny.model, tiny.prompts, max_tokens=10, user=tiny.user, **how)
    for stop_ids in ([], [int(first.tokens[0, 3])]):
        arguments = {"max_tokens": 10, "stop_ids": stop_ids, "user": tiny.user, **how}
        whole = generate(*tiny.model, tiny.prompts, **arguments)
        for chunk in (1, 4):
            pieces = list(stream(*tiny.model, tiny.prompts, **arguments, chunk=chunk))
            rows = [sum((piece.rows()[row] for piece in pieces), []) for row in range(3)]
            assert rows == whole.rows()
            assert len(pieces) == -(-whole.lengths.max() // chunk)


@pytest.mark.slow
def test_a_stream_ends_with_its_rows(tiny):
    (piece,) = stream(*tiny.model, tiny.prompts, max_tokens=50, stop_ids=range(tiny.vocab), user=tiny.user)
    assert piece.tokens.shape == (3, 1) and piece.lengths.tolist() == [1, 1, 1]


def test_other_lengths_and_settings_compile_nothing_anew(tiny):
    programs = lambda: (module._start._cache_size(), module._decode._cache_size())  # noqa: E731
    generate(*tiny.model, tiny.prompts, max_tokens=3, stop_ids=[4], user=tiny.user, **DRAWN)
    before = programs()
    others = {"sampling": [Sampling(0.3), Sampling(), Sampling(2.0, min_p=0.5)], "seeds": [4, 5, 6]}
    list(stream(*tiny.model, [[3], [4] * 64, [5] * 9], max_tokens=7, stop_ids=[9], user=tiny.user, chunk=2, **others))
    generate(*tiny.model, tiny.prompts, max_tokens=64, stop_ids=[5], user=tiny.user)
    assert programs() == before


def test_the_user_matters_where_there_is_one(tiny):
    sampled = {"max_tokens": 12, "sampling": Sampling(temperature=1.0), "seeds": [1, 2, 3]}
    written, without = (generate(*tiny.model, tiny.prompts, user=user, **sampled).rows() for user in (tiny.user, None))
    assert [a == b for a, b in zip(written, without, strict=True)] == [False, True, False]


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"max_tokens": 4, "chunk": 0}])
def test_counts_below_one_are_refused(tiny, changes):
    with pytest.raises(ValueError, match="must be at least 1"):
        stream(*tiny.model, tiny.prompts, **changes)


def test_a_stream_refuses_bad_input_before_it_is_read(tiny):
    with pytest.raises(ValueError, match="K/V of 3 users for 1 prompts"):
        stream(*tiny.model, [[3]], max_tokens=2, user=tiny.user)
    with pytest.raises(ValueError, match="needs `seeds`"):
        stream(*tiny.model, [[3]], max_tokens=2, sampling=Sampling(1.0))
