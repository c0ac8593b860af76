"""Metrics of written texts: by hand, by published examples, and their bounds."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from user_llm.evals import texts


def test_the_mean_of_sentences_is_not_the_score_of_a_corpus():
    targets, written = ["the cat sat on the mat", "a b c d e"], ["the cat sat on the mat", "a b c d x"]
    means, corpus = texts.sentence_scores(targets, written), texts.corpus_scores(targets, written)
    # BLEU by hand: of 11 words 10 are right, of 9 pairs 8, of 7 triples 6, of 5 quadruples 4; both texts are as long as their targets.
    np.testing.assert_allclose(corpus["bleu/corpus"], (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25)
    np.testing.assert_allclose(means["bleu"], [1, (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25])
    assert means["chrf"][0] == 1 > corpus["chrf/corpus"] > means["chrf"][1] > 0
    nothing = texts.sentence_scores(["a cat"], [""])
    assert nothing["bleu"] == nothing["chrf"] == 0


def test_grams_and_their_cosine_by_hand():
    assert texts.gram_counts(["A  bc"]) == Counter({"a b": 1, " bc": 1, "a bc": 1})
    assert texts.gram_counts(["ab", ""]) == Counter()
    one, other = texts.gram_counts(["aaaa"]), texts.gram_counts(["aaa"])  # {aaa: 2, aaaa: 1} and {aaa: 1}
    np.testing.assert_allclose(texts.cosine(one, other), 2 / math.sqrt(5))
    assert texts.cosine(one, one) == pytest.approx(1) and texts.cosine(one, Counter()) == 0
    assert texts.cosine(one, texts.gram_counts(["bbbb"])) == 0


def test_a_text_is_nearer_to_whoever_writes_like_that():
    loud, dry = ["WOW!!! so good!!!", "so good, WOW!!!"], ["A competent instalment.", "The plot is competent."]
    found = texts.nearer_to_author(
        ["so so good!!!", "so so good!!!", "xyz", "so good!!!"], [loud, dry, loud, loud], [dry, loud, dry, loud]
    )
    assert found.tolist() == [1, 0, 0.5, 0.5]
    assert texts.nearer_to_author(["so good!!!"] * 3, [loud, [], []], [[], loud, []]).tolist() == [0.5] * 3


def test_meteor_is_left_out_where_wordnet_is_missing_and_says_so_once(monkeypatch, caplog):
    from nltk.translate import meteor_score as module

    def missing(*_):
        raise LookupError("wordnet")

    monkeypatch.setattr(module, "meteor_score", missing)
    texts._meteor.cache_clear()
    with caplog.at_level("INFO", logger="absl"):
        assert texts.meteor(["a"], ["a"]) == texts.meteor(["b"], ["b"]) == {}
    assert caplog.text.count("METEOR is left out") == 1
    monkeypatch.setattr(module, "meteor_score", lambda targets, words: len(set(targets[0]) & set(words)) / len(words))
    texts._meteor.cache_clear()
    assert texts.meteor(["a cat."], ["A cat."])["meteor"].tolist() == [2 / 3]
    texts._meteor.cache_clear()


def _save_bert(directory, positions, **limit):
    """Save a small BERT of random weights; return its tokenizer, which reads five words, and the model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("bert_score")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "strap", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **limit, **special).save_pretrained(directory)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=positions, **sizes)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(directory)
    return tokenizer, model


def test_bert_score_is_the_f_measure_of_the_most_alike_words(tmp_path):
    tokenizer, model = _save_bert(tmp_path, 512, model_max_length=64)
    import torch

    def vectors(text):
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            state = model(ids).last_hidden_state[0]
        return torch.nn.functional.normalize(state, dim=-1)

    target, written = "a good strap", "strap bad"
    alike = vectors(target) @ vectors(written).T
    # A word may be nearest to [CLS] or [SEP], whose own nearest words do not count.
    recall, precision = alike[1:-1].max(1).values.mean(), alike[:, 1:-1].max(0).values.mean()
    expected = float(2 * recall * precision / (recall + precision))
    assert expected < 0.99
    found = texts.bert_score([target, "a", "good"], [written, " ", "good"], str(tmp_path))["bert_score"]
    np.testing.assert_allclose(found, [expected, 0, 1], atol=1e-5)
    assert texts.bert_score(["a"], [""], str(tmp_path))["bert_score"].tolist() == [0]


def test_bert_score_cuts_a_text_to_the_positions_of_the_model_and_builds_one_scorer(tmp_path, monkeypatch):
    _save_bert(tmp_path, 16)
    settings = tmp_path / "tokenizer_config.json"
    named = json.loads(settings.read_text())
    named.pop("model_max_length", None)
    settings.write_text(json.dumps(named))
    import bert_score

    built, build = [], bert_score.BERTScorer
    monkeypatch.setattr(bert_score, "BERTScorer", lambda **how: built.append(how) or build(**how))
    read = ["good", "bad", "a"] * 4  # 12 words, [CLS] and [SEP] fill all but two positions
    target = " ".join(read + ["good"] * 30)
    for written, same in ((read + ["strap"] * 30, True), (read[:-1] + ["strap"] * 31, False)):
        score = texts.bert_score([target], [" ".join(written)], str(tmp_path))["bert_score"][0]
        assert (abs(score - 1) < 1e-5) == same, written
    assert len(built) == 1


def test_a_model_of_bert_score_that_cannot_be_loaded_is_refused(tmp_path):
    pytest.importorskip("bert_score")
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"^eval.bert_score: no config of '{missing}' can be loaded: [^.]*[.]$"):
        texts.check_bert_score(missing)


def test_bert_score_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="eval.bert_score needs the package bert-score"):
        texts.check_bert_score("roberta-large")
