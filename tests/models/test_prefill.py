import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from user_llm.ahead.collectives import KINDS
from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.models.decoder import Decoder
from user_llm.models.prefill import bucket, check_user, lane_mask, lane_positions, pad_prompts, prefill


def test_buckets_are_few_and_not_much_too_long():
    lengths = range(1, 4097)
    buckets = [bucket(length) for length in lengths]
    assert buckets == sorted(buckets) and len(set(buckets)) == 20
    for length, rounded in zip(lengths, buckets, strict=True):
        assert 0 <= rounded - length <= max(63, length / 4)
        assert bucket(rounded) == rounded
    assert [bucket(length) for length in (1, 64, 65, 512, 513, 1025)] == [64, 64, 128, 512, 640, 1280]


def test_prompts_are_padded_on_the_right_to_their_bucket():
    table, lengths = pad_prompts([[3, 4], [5] * 65], None, 6)
    assert table.shape == (2, 128)
    np.testing.assert_array_equal(lengths, [2, 65])
    np.testing.assert_array_equal(table[0], [3, 4] + [0] * 126)
    for zeros in (np.zeros, jnp.zeros):
        embedded, lengths = pad_prompts(zeros((2, 65, 7)), [1, 65], 6)
        assert embedded.shape == (2, 128, 7)
        np.testing.assert_array_equal(lengths, [1, 65])


@pytest.mark.parametrize(
    ("prompts", "lengths", "message"),
    [
        ([], None, "at least one token"),
        ([[3], []], None, "at least one token"),
        ([[3], [5, 6]], None, "^6 is no token: there are 0 to 5"),
        ([[-1]], None, "^-1 is no token"),
        ([[2**32 + 1]], None, "^4294967297 is no token"),
        ([[3]], [1], "lengths` with embeddings alone"),
        (np.zeros((2, 5, 3)), None, "need 2 lengths from 1 to 5"),
        (np.zeros((2, 5, 3)), [1], "need 2 lengths"),
        (np.zeros((2, 5, 3)), [1, 6], "need 2 lengths"),
        (np.zeros((2, 5, 3)), [0, 5], "need 2 lengths"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompts, lengths, message):
    with pytest.raises(ValueError, match=message):
        pad_prompts(prompts, lengths, 6)


def test_users_of_other_rows_are_refused(tiny):
    check_user(None, 7)
    check_user(tiny.user, 3)
    with pytest.raises(ValueError, match="K/V of 3 users for 2 prompts"):
        check_user(tiny.user, 2)


def test_lanes_by_hand():
    lengths, past = jnp.array([2, 3]), jnp.array([[[1, 0, -1], [1, 1, -1]], [[-1, -1, -1], [0, 1, 0]]])
    mask = np.asarray(lane_mask(lengths, 3, past, 2)).astype(int)
    assert mask.tolist() == [
        [[1, 1, 0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0, 0]],
        [[1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1, 0]],
    ]
    assert lane_positions(lengths, 3, 3, 2).tolist() == [[0, 1, 2, 2, 2, 3, 3, 4, 4], [0, 1, 2, 3, 3, 4, 4, 5, 5]]


@pytest.mark.parametrize("unroll", [True, False])
def test_prompts_spread_over_devices_fill_caches_of_their_own(tiny, mesh_of, unroll):
    """Left to the compiler, each layer's cache was collected on all devices."""
    config = dataclasses.replace(trees.merge(*tiny.model).config, unroll=unroll)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    mesh = mesh_of(4, 2)
    prompts = jnp.asarray(np.random.default_rng(0).integers(3, tiny.vocab, (16, 8)))
    lengths = jnp.arange(1, 17) % 8 + 1

    @jax.jit
    def read(params, prompts, lengths):
        return prefill(trees.merge(graphdef, params), prompts, lengths, None, 4)

    expected = read(tiny.params, prompts, lengths)
    spread = jax.device_put((prompts, lengths), meshes.by_row(mesh))
    with jax.set_mesh(mesh):
        program = read.lower(tiny.params, *spread).compile()
        found = program(jax.device_put(tiny.params, meshes.replicated(mesh)), *spread)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert found[1].k.sharding.shard_shape(found[1].k.shape)[1] == 2
    assert not any(f" {kind}(" in program.as_text() for kind in KINDS)
