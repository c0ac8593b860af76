"""How batches of prompts and histories are answered, however they are padded."""

import dataclasses

import jax
import numpy as np
import pytest

from user_llm.common import mesh as meshes
from user_llm.models.trie import Trie
from user_llm.nn.rotary import RopeScaling


@pytest.fixture
def predictor(make_model):
    return make_model("both, by event").written.predictor


def prompts_of(*sizes):
    return [np.arange(3, 3 + size, dtype=np.int32) for size in sizes]


def test_prompts_that_are_alike_are_not_padded_and_others_to_one_of_few_widths(predictor, make_model):
    assert predictor.padded("next_item", prompts_of(5, 5))[0].shape == (2, 5)
    text, lengths = predictor.padded("next_item", prompts_of(5, 9))
    assert text.shape == (2, 64) and lengths.tolist() == [5, 9] and not text[0, 5:].any()
    whole = dataclasses.replace(predictor, pad_whole=True)
    assert whole.padded("next_item", prompts_of(5, 9))[0].shape == (2, whole.templates["next_item"].max_tokens)
    with_titles = make_model("titles").written.predictor  # equal by chance: another batch is not
    assert with_titles.padded("next_item", prompts_of(5, 5))[0].shape == (2, 64)


def test_prompts_longer_than_the_decoder_is_read_for_are_refused(predictor):
    """The user's soft prompt counts, which has a token for each event here, and padding does not."""
    scaling = RopeScaling("longrope", 2.0, factors=(1.0, 1.5, 2.0), original_length=15)
    decoder = predictor.config.decoder
    decoder = dataclasses.replace(decoder, block=dataclasses.replace(decoder.block, rope_scaling=scaling))
    short = dataclasses.replace(predictor, config=dataclasses.replace(predictor.config, decoder=decoder))
    events = np.zeros((2, 6, predictor.config.encoder.schema.width), np.int32)
    trie = Trie.build({1: [3, 4, 2], 2: [4, 2]})  # of texts of 3 tokens, of which 2 are read
    with jax.set_mesh(predictor.mesh):
        users, alone = short.users(events, np.array([0, 4])), None
        for sizes, user, more in (((15, 11), users, 0), ((15, 15), alone, 0), ((13, 9), users, 2), ((13, 5), alone, 2)):
            ask = ask_for(short, user, trie if more else None)
            assert len(ask(sizes)) == 2
            for row in np.flatnonzero(np.add(sizes, [0, 4 * (user is not None)]) + more == 15):
                longer = np.add(sizes, np.arange(2) == row).tolist()
                with pytest.raises(ValueError, match="^A text of 16 tokens is asked for, .* texts of at most 15: make"):
                    ask(longer)


def ask_for(predictor, user, trie):
    """Return what scores items after prompts of some sizes, or with a trie chooses among its texts."""
    if trie is None:
        return lambda sizes: predictor.score("next_item", prompts_of(*sizes), user)
    return lambda sizes: predictor.choose("next_item", prompts_of(*sizes), user, trie, 2)[0]


def test_padding_changes_no_score(predictor):
    """Of histories, of prompts, and of users beside each other in a batch."""
    rng, width = np.random.default_rng(0), predictor.config.encoder.schema.width
    events, lengths = np.zeros((2, 6, width), np.int32), np.array([4, 2])
    events[0, :4], events[1, :2] = 1 + rng.integers(0, 3, (4, width)), 1 + rng.integers(0, 3, (2, width))
    prompt = prompts_of(7, 4)
    with jax.set_mesh(predictor.mesh):
        both = meshes.fetch(predictor.score("next_item", prompt, predictor.users(events, lengths)))
        alone = meshes.fetch(predictor.score("next_item", prompt[1:], predictor.users(events[1:, :2], lengths[1:])))
        bare = meshes.fetch(predictor.score("next_item", prompt[1:], None))
    both, alone, bare = (scores[:, 1 : predictor.config.num_items + 1] for scores in (both, alone, bare))
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)
    assert np.abs(alone - bare).max() > 1e-3


def test_a_soft_prompt_stands_after_the_instruction_or_before_it(predictor):
    template = predictor.templates["next_item"]
    assert predictor.leading("next_item") == template.shared_tokens > 0
    assert dataclasses.replace(predictor, after_instruction=False).leading("next_item") == 0
