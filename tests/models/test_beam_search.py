import functools

import numpy as np
import pytest
from flax import nnx

from user_llm.common import trees
from user_llm.data.titles import unique_titles
from user_llm.models.beam_search import beam_generate, beam_search
from user_llm.models.decoder import Decoder
from user_llm.models.pretrained import decoder_config, load_decoder
from user_llm.models.trie import Trie

END = 2


# --- free text ---


def _texts_by_hand(tiny, row, *, beams, max_tokens, stop_ids, penalty):
    """Beam search over lists: a text that stops among the best `beams` is done, the best `beams` others go on."""
    live, done = [(0.0, [])], []
    for length in range(1, max_tokens + 1):
        candidates = []
        for score, tokens in live:
            step = tiny.log_probs(row, tokens)[-1]
            candidates += [(score + step[token], [*tokens, token]) for token in range(tiny.vocab)]
        candidates.sort(reverse=True)
        stops = lambda candidate: candidate[1][-1] in stop_ids or length == max_tokens  # noqa: B023, E731
        done += [(score / length**penalty, tokens) for score, tokens in filter(stops, candidates[:beams])]
        done = sorted(done, reverse=True)[:beams]
        live = [candidate for candidate in candidates if candidate[1][-1] not in stop_ids][:beams]
        if len(done) == beams and live[0][0] / length**penalty <= done[-1][0]:
            break
    return done


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("stops", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_equal_a_beam_search_by_hand(tiny, stops, penalty):
    settings = {"beams": 4, "max_tokens": 7, "stop_ids": []}
    # Stop at tokens that beams do write, early and late.
    free = beam_generate(*tiny.model, tiny.prompts, **settings, length_penalty=penalty, user=tiny.user)
    settings["stop_ids"] = free.tokens[[0, 1, 2], 0, [3, 1, 2]][:stops].tolist()
    found = beam_generate(*tiny.model, tiny.prompts, **settings, length_penalty=penalty, user=tiny.user)
    lengths = set()
    for row in range(3):
        expected = _texts_by_hand(tiny, row, **settings, penalty=penalty)
        texts = [text[:length].tolist() for text, length in zip(found.tokens[row], found.lengths[row], strict=True)]
        assert texts == [tokens for _, tokens in expected]
        np.testing.assert_allclose(found.scores[row], [score for score, _ in expected], atol=2e-5)
        assert not found.tokens[row][np.arange(7) >= found.lengths[row][:, None]].any()
        lengths |= {len(text) for text in texts}
    if stops and penalty < 2:  # which favours the longest
        assert len(lengths) > 1


@pytest.mark.slow
def test_all_texts_are_found_by_as_many_beams(tiny):
    # Of two tokens there are 1 + 11 * 12 texts where one stops: more beams than that find each, by score.
    found = beam_generate(*tiny.model, tiny.prompts, beams=140, max_tokens=2, stop_ids=[4], length_penalty=0.0, user=tiny.user)
    for row in range(3):
        first = tiny.log_probs(row, [])[-1]
        expected = {(4,): first[4]}
        for token in set(range(tiny.vocab)) - {4}:
            second = tiny.log_probs(row, [token])[-1]
            expected |= {(token, other): first[token] + second[other] for other in range(tiny.vocab)}
        count = len(expected)
        texts = [tuple(text[:length].tolist()) for text, length in zip(found.tokens[row], found.lengths[row], strict=True)]
        assert set(texts[:count]) == set(expected)
        np.testing.assert_allclose(found.scores[row, :count], [expected[text] for text in texts[:count]], atol=2e-5)
        assert (found.scores[row, count:] == -np.inf).all() and not found.lengths[row, count:].any()
        assert (np.diff(found.scores[row, :count]) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_texts_equal_those_of_transformers(tmp_path, penalty):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40,
        tie_word_embeddings=False, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    reference.save_pretrained(tmp_path)
    config = decoder_config(tmp_path)
    graphdef, _ = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    params = load_decoder(tmp_path, config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 40, length).tolist() for length in (4, 9, 6, 5)]
    settings = {"beams": 3, "max_tokens": 10, "length_penalty": penalty}
    # Stop at tokens that beams do write, early and late.
    free = beam_generate(graphdef, params, prompts, **settings)
    stop_ids = free.tokens[[0, 1, 2], 0, [2, 4, 6]].tolist()
    found = beam_generate(graphdef, params, prompts, **settings, stop_ids=stop_ids)
    for row, prompt in enumerate(prompts):
        expected = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=3, num_return_sequences=3,
            max_new_tokens=10, do_sample=False, length_penalty=penalty, eos_token_id=stop_ids, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        theirs = expected.sequences[:, len(prompt) :].numpy()
        # It fills up with a stop token; that the lengths agree is in the scores.
        written = np.arange(theirs.shape[1]) < found.lengths[row][:, None]
        np.testing.assert_array_equal(found.tokens[row][:, : theirs.shape[1]], np.where(written, theirs, 0))
        np.testing.assert_allclose(found.scores[row], expected.sequences_scores, atol=1e-4)
    assert len(set(found.lengths.flatten().tolist())) > 2


@pytest.mark.slow
def test_texts_of_prompts_as_embeddings_are_the_same(tiny):
    settings = {"beams": 3, "max_tokens": 5, "stop_ids": [4], "user": tiny.user}
    expected = beam_generate(*tiny.model, tiny.prompts, **settings)
    embedded = np.asarray(tiny.params["embed"])[tiny.padded]
    found = beam_generate(*tiny.model, embedded, lengths=tiny.lengths, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_counts_below_one_are_refused(tiny):
    for counts in ({"beams": 0, "max_tokens": 4}, {"beams": 2, "max_tokens": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            beam_generate(*tiny.model, tiny.prompts, **counts)


# --- titles of a catalogue ---


def _title_score(tiny, row, title):
    return tiny.log_probs(row, title[:-1])[np.arange(len(title)), title].sum()


def test_as_many_beams_as_titles_is_exhaustive_scoring(tiny, random_titles):
    titles = random_titles(25, seed=2, most=4) | {26: [9, 10, 11, 9, 10, END], 27: [9, 10, 11, 9, END]}
    items, scores = beam_search(*tiny.model, tiny.padded, tiny.lengths, Trie.build(titles), beams=30, user=tiny.user)
    for row in range(3):
        expected = {item: _title_score(tiny, row, title) for item, title in titles.items()}
        ranked = sorted(expected, key=expected.get, reverse=True)
        assert items[row, :27].tolist() == ranked
        np.testing.assert_allclose(scores[row, :27], [expected[item] for item in ranked], atol=2e-5)
        # There are more beams than titles.
        assert (items[row, 27:] == 0).all() and (scores[row, 27:] == -np.inf).all()


def _titles_by_hand(tiny, row, titles, beams):
    live = [(0.0, ())]
    while any(tokens[-1:] != (END,) for _, tokens in live):
        candidates = []
        for score, tokens in live:
            if tokens[-1:] == (END,):
                candidates.append((score, tokens))
                continue
            step = tiny.log_probs(row, tokens)[-1]
            allowed = {t[len(tokens)] for t in titles.values() if tuple(t[: len(tokens)]) == tokens}
            candidates += [(score + step[token], (*tokens, token)) for token in allowed]
        live = sorted(candidates, reverse=True)[:beams]
    item = {tuple(title): item for item, title in titles.items()}
    return [item[tokens] for _, tokens in live], [score for score, _ in live]


def test_few_beams_equal_a_beam_search_by_hand(tiny, random_titles):
    titles = random_titles(60, seed=3)
    items, scores = beam_search(*tiny.model, tiny.padded, tiny.lengths, Trie.build(titles), beams=4, user=tiny.user)
    for row in range(3):
        expected_items, expected_scores = _titles_by_hand(tiny, row, titles, 4)
        assert items[row].tolist() == expected_items
        np.testing.assert_allclose(scores[row], expected_scores, atol=2e-5)


def test_the_user_matters(tiny):
    trie = Trie.build({1: [3, END]})
    scores = [
        np.asarray(beam_search(*tiny.model, tiny.padded, tiny.lengths, trie, beams=1, user=user)[1])
        for user in (tiny.user, tiny.user._replace(v=-tiny.user.v))
    ]
    moved = np.abs(scores[0] - scores[1])[:, 0] > 1e-3
    np.testing.assert_array_equal(moved, [True, False, True])  # the second row's user is empty


# --- titles that the item head guides to ---


def _shared_titles():
    """Items of which five share one title, as a dataset numbers them, and titles that others begin with."""
    names = unique_titles(["ab", "a", "ab", "abc", "ab", "b", "ab", "ba", "ab", "c", "abc", "cab"])
    assert names[2] == "ab [2]" and len(set(names)) == 12
    return {item: [*(3 + "abc []23456".index(letter) % 9 for letter in name), END] for item, name in enumerate(names, 1)}


@pytest.mark.parametrize("seed", [5, 6, None])
def test_the_guide_alone_finds_its_best_items_with_as_many_beams(tiny, random_titles, seed):
    """Whatever the scores are, and also where titles begin with others."""
    titles = random_titles(60, seed) if seed else _shared_titles()
    trie, rng = Trie.build(titles), np.random.default_rng(0)
    for scale in (0.1, 1.0, 100.0):
        scores = rng.normal(size=(3, 1 + len(titles))).astype(np.float32) * scale
        scores[:, 0] = 1000  # PAD is no item
        items, found = beam_search(
            *tiny.model, tiny.padded, tiny.lengths, trie, beams=4, user=tiny.user, guide=scores, weight=1.0
        )  # fmt: skip
        best = np.argsort(-scores[:, 1:], axis=1)[:, :4] + 1
        np.testing.assert_array_equal(items, best)
        np.testing.assert_array_equal(found, np.take_along_axis(scores, best, axis=1))


def test_a_guided_search_weighs_both_scores(tiny, random_titles):
    titles = random_titles(25, seed=2, most=4)
    scores = np.random.default_rng(0).normal(size=(3, 26)).astype(np.float32)
    scores[0, 5:] = -np.inf  # never written
    trie = Trie.build(titles)
    search = functools.partial(
        beam_search, *tiny.model, tiny.padded, tiny.lengths, trie, beams=30, user=tiny.user, guide=scores
    )
    for weight in (0.0, 0.3):
        items, found = search(weight=weight)
        for row in range(3):
            expected = {
                item: (1 - weight) * _title_score(tiny, row, title) + weight * scores[row, item]
                for item, title in titles.items()
                if scores[row, item] > -np.inf
            }
            ranked = sorted(expected, key=expected.get, reverse=True)
            assert items[row, : len(ranked)].tolist() == ranked and not items[row, len(ranked) :].any()
            assert (found[row, len(ranked) :] == -np.inf).all()
            np.testing.assert_allclose(found[row, : len(ranked)], [expected[item] for item in ranked], atol=2e-5)
    of_all = search(guide=scores[:1].repeat(3, axis=0), weight=0.3)
    for one, other in zip(search(guide=scores[:1], weight=0.3), of_all, strict=True):  # one row is everybody's
        np.testing.assert_array_equal(one, other)
