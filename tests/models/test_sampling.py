import jax
import numpy as np
import pytest

from user_llm.models.sampling import Sampling, by_row, choose, filter_logits

_filter, _choose = jax.jit(filter_logits), jax.jit(choose)
SETTINGS = [
    Sampling(1.0, top_k=3),
    Sampling(1.0, top_k=99),
    Sampling(1.0, top_p=0.47),
    Sampling(1.0, top_p=0.001),
    Sampling(1.0, top_p=0.999),
    Sampling(1.0, min_p=0.13),
    Sampling(1.0, min_p=1.0),
    Sampling(1.0, top_k=9, top_p=0.83, min_p=0.06),
    Sampling(1.0, top_k=4, top_p=0.6),
    Sampling(1.0),
]


def _kept_by_hand(logits, setting):
    """The tokens that stay, by walking down the likeliest, those of one logit together."""
    logits = np.asarray(logits, np.float64)
    kept = set(range(len(logits)))
    if setting.top_k:
        last = sorted(logits, reverse=True)[: setting.top_k][-1]
        kept = {i for i in kept if logits[i] >= last}
    if setting.top_p < 1:
        mass = sum(np.exp(logits[i]) for i in kept)
        reached, inside = 0.0, set()
        for value in sorted({logits[i] for i in kept}, reverse=True):
            if reached >= setting.top_p:
                break
            tied = {i for i in kept if logits[i] == value}
            reached += len(tied) * np.exp(value) / mass
            inside |= tied
        kept = inside
    likeliest = max(np.exp(logits))
    return {i for i in kept if np.exp(logits[i]) >= setting.min_p * likeliest}


@pytest.mark.parametrize("tied", [False, True])
def test_filters_equal_a_walk_by_hand(tied):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 20)) * 2
    logits = np.asarray(np.round(logits) if tied else logits, np.float32)
    for setting in SETTINGS:
        rows = by_row(setting, [0] * 200, 200)
        filtered = np.asarray(_filter(logits, rows.top_k, rows.top_p, rows.min_p))
        for before, after in zip(logits, filtered, strict=True):
            kept = np.flatnonzero(after > -np.inf)
            assert set(kept.tolist()) == _kept_by_hand(before, setting), setting
            np.testing.assert_array_equal(after[kept], before[kept])


def test_filters_equal_those_of_transformers():
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(1).normal(size=(100, 30)).astype(np.float32) * 3
    for setting in SETTINGS:
        expected = torch.tensor(logits)
        if setting.top_k:
            expected = processors.TopKLogitsWarper(setting.top_k)(None, expected)
        if setting.top_p < 1:
            expected = processors.TopPLogitsWarper(setting.top_p)(None, expected)
        if setting.min_p:
            expected = processors.MinPLogitsWarper(setting.min_p)(None, expected)
        rows = by_row(setting, [0] * 100, 100)
        np.testing.assert_array_equal(_filter(logits, rows.top_k, rows.top_p, rows.min_p), expected)


def test_each_row_is_filtered_by_its_own_setting():
    logits = np.random.default_rng(2).normal(size=(len(SETTINGS), 20)).astype(np.float32)
    rows = by_row(SETTINGS, [0] * len(SETTINGS), len(SETTINGS))
    filtered = np.asarray(_filter(logits, rows.top_k, rows.top_p, rows.min_p))
    for setting, before, after in zip(SETTINGS, logits, filtered, strict=True):
        assert set(np.flatnonzero(after > -np.inf).tolist()) == _kept_by_hand(before, setting)


def test_tokens_are_drawn_as_often_as_the_tempered_softmax_says():
    logits, count = np.array([1.0, 0.0, -1.0, 2.0], np.float32), 20_000
    rows = by_row(Sampling(0.7, top_k=3), list(range(count)), count)
    tokens = np.asarray(_choose(np.broadcast_to(logits, (count, 4)), 5, rows))
    expected = np.exp(logits / 0.7) * (logits > -1)
    expected /= expected.sum()
    share = np.bincount(tokens, minlength=4) / count
    # Five standard deviations of a share.
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_a_draw_depends_on_seed_and_step_alone():
    logits = np.zeros((4, 1000), np.float32)
    draw = lambda seeds, step, rows=4: np.asarray(_choose(logits[:rows], step, by_row(Sampling(1.0), seeds, rows)))  # noqa: E731
    first = draw([5, 6, 5, 2**32 - 1], 0)
    assert first[0] == first[2] and len(set(first.tolist())) == 3
    np.testing.assert_array_equal(draw([6, 5], 0, rows=2), first[[1, 0]])
    assert (draw([5, 6, 5, 2**32 - 1], 1) != first).all()


def test_temperature_zero_is_greedy_beside_rows_that_are_not():
    logits = np.random.default_rng(3).normal(size=(50, 40)).astype(np.float32) * 0.1
    mixed = [Sampling(0.0, top_k=2) if row % 2 else Sampling(1.0) for row in range(50)]
    tokens = np.asarray(_choose(logits, 0, by_row(mixed, list(range(50)), 50)))
    np.testing.assert_array_equal(tokens[1::2], logits.argmax(1)[1::2])
    assert (tokens[::2] != logits.argmax(1)[::2]).mean() > 0.8
    # Nearly zero is greedy in the limit, and neither overflows nor divides by 0.
    cold = _choose(logits * 1e6, 0, by_row(Sampling(1e-38), list(range(50)), 50))
    np.testing.assert_array_equal(cold, logits.argmax(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1 must be"),
        ({"top_k": 2.5}, "top_k 2.5 must be"),
        ({"top_p": 0.0}, "top_p 0.0 must be"),
        ({"top_p": 1.1}, "top_p 1.1 must be"),
        ({"min_p": -0.1}, "min_p -0.1 must be"),
        ({"min_p": 1.5}, "min_p 1.5 must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("sampling", "seeds", "message"),
    [
        (Sampling(1.0), None, "needs `seeds`"),
        (Sampling(1.0), [1], "2 prompts need 2 seeds"),
        (Sampling(), [1, -1], "from 0 to 2\\^32 - 1"),
        (Sampling(), [1, 2**32], "from 0 to 2\\^32 - 1"),
        ([Sampling()] * 3, None, "3 sampling settings for 2 prompts"),
    ],
)
def test_settings_that_fit_no_row_are_refused(sampling, seeds, message):
    with pytest.raises(ValueError, match=message):
        by_row(sampling, seeds, 2)
