import json

import pytest
import tokenizers

from user_llm.data.tokenizer import MIN_BPE_VOCAB, load_tokenizer, train_bpe

NAMES = ("Silent Harbor", "Silent River", "Last Harbor", "Last River")
TITLES = [f"The {name} ({year})\n" for name in NAMES for year in (1987, 1999)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer"
    return train_bpe(TITLES * 3, MIN_BPE_VOCAB + 40, path), path


@pytest.mark.parametrize(
    "text",
    ["The Silent Harbor (1987)", " Amélie | Comédie\n\n The", "完全 🎬\tx\r\n", "", "an <eos> inside", "  two  "],
)
def test_any_text_survives_a_round_trip(trained, text):
    tokenizer, _ = trained
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_come_first_and_are_not_added(trained):
    tokenizer, _ = trained
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert not {0, 1, 2} & set(tokenizer.encode("The Last <eos> River"))
    assert tokenizer.decode([1, *tokenizer.encode("River"), 2, 0]) == "River"


def test_a_newline_is_one_token_of_its_own(trained):
    tokenizer, _ = trained
    (newline,) = tokenizer.encode("\n")
    ids = tokenizer.encode("River\n\n \nHarbor )\n")
    assert ids.count(newline) == 4
    parts = [part for text in ("River", " ", "Harbor )") for part in tokenizer.encode(text)]
    assert [i for i in ids if i != newline] == parts


def test_training_merges_what_is_frequent_and_is_reproducible(trained, tmp_path):
    tokenizer, path = trained
    assert len(tokenizer.encode("The Silent Harbor")) < 10
    assert tokenizer.vocab_size <= MIN_BPE_VOCAB + 40
    train_bpe(TITLES * 3, MIN_BPE_VOCAB + 40, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == (path / "tokenizer.json").read_text()


def test_a_saved_tokenizer_loads_equal_here_and_in_transformers(trained):
    tokenizer, path = trained
    loaded = load_tokenizer(path)
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, 2, tokenizer.vocab_size)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for text in TITLES:
        assert loaded.encode(text) == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def test_what_cannot_be_trained_or_loaded_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=f"vocab_size 100 is too small.*{MIN_BPE_VOCAB}"):
        train_bpe(TITLES, 100, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="exists already: delete it"):
        train_bpe(TITLES, 300, trained[1])
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No tokenizer at .*empty"):
        load_tokenizer(tmp_path / "empty")


def test_added_tokens_written_as_objects_are_understood(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text((trained[1] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>", "special": True}}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, 2, 0)


def test_stories260k(models_dir):
    tokenizer = load_tokenizer(models_dir / "stories260K")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    ids = tokenizer.encode("Once upon a time")
    assert ids == [403, 407, 261, 378] and tokenizer.decode([1, *ids]) == "Once upon a time"
    directly = tokenizers.Tokenizer.from_file(str(models_dir / "stories260K" / "tokenizer.json"))
    assert directly.encode("Once upon a time").ids == [1, *ids]


def test_a_tokenizer_without_tokenizer_json_is_read_by_transformers(models_dir):
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(models_dir / "qwen3-tokenizer")
    assert tokenizer.vocab_size == 151669
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 151645, 151643)
    assert tokenizer.decode(tokenizer.encode("The Matrix (1999)\n")) == "The Matrix (1999)\n"
