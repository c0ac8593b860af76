"""A GGUF file is the checkpoint that it was made of."""

import errno
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from user_llm.common import trees
from user_llm.data.tokenizer import load_tokenizer, train_bpe
from user_llm.models import gguf_file
from user_llm.models.config_json import config_from_settings
from user_llm.models.families import table
from user_llm.models.gguf_file import LAYER, OUTER
from user_llm.models.pretrained import decoder_config, find_checkpoint, load_decoder

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

NAMES = {theirs: ours for ours, theirs in (LAYER | OUTER).items()}
LINES = ["The Silent Harbor (1987)\n", "The Last River (1999)\n"] * 9


def _stored(name):
    """Return what a GGUF file calls a tensor."""
    *before, kind = name.split(".")
    if "layers" in before:
        return f"blk.{before[2]}.{NAMES['.'.join(before[3:])]}.{kind}"
    return f"{NAMES['.'.join(before)]}.{kind}"


@pytest.fixture
def written(tmp_path):
    """Return `write(kind, pre, quantised)`: a tiny model as a checkpoint and as a GGUF file of it."""

    def write(kind="llama", pre="gpt-2", quantised=False, **facts):
        tokenizer = train_bpe(LINES, 290, tmp_path / "checkpoint")
        settings = {
            "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": tokenizer.vocab_size, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "head_dim": 8,
            "tie_word_embeddings": kind == "llama", "max_position_embeddings": 64,
        }  # fmt: skip
        (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(settings))
        rng, writer = np.random.default_rng(0), gguf.GGUFWriter(tmp_path / "model.gguf", kind)
        tensors = {}
        for t in table(config_from_settings(settings, "")):
            name = t.name if t.path == "head" else f"model.{t.name}"
            tensor = rng.normal(size=t.theirs).astype(np.float32)
            kept, part = tensor, _stored(name)
            heads = {"attn_q": 4, "attn_k": 2}.get(part.split(".")[-2], 0)
            if heads and kind == "llama":  # as llama.cpp stores them: the two halves of a head in turn
                kept = tensor.reshape(heads, 2, 4, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
            if quantised and tensor.ndim == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(part, gguf.quants.quantize(kept, q8), raw_dtype=q8)
                tensor = gguf.quants.dequantize(gguf.quants.quantize(tensor, q8), q8).astype(ml_dtypes.bfloat16)
            else:
                writer.add_tensor(part, np.ascontiguousarray(kept))
            tensors[name] = tensor
        save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
        for key, value in {
            "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4,
            "attention.head_count_kv": 2, "attention.key_length": 8, "context_length": 64,
        }.items():  # fmt: skip
            writer.add_uint32(f"{kind}.{key}", value)
        writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32(f"{kind}.rope.freq_base", 500.0)
        for key, value in facts.items():
            writer.add_string(f"{kind}.{key.replace('__', '.')}", value)
        stored = json.loads((tmp_path / "checkpoint" / "tokenizer.json").read_text())["model"]
        words = sorted(stored["vocab"], key=stored["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words)
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(words))])
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in stored["merges"]])
        writer.add_pad_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "checkpoint", tmp_path / "model.gguf"

    return write


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantised", [False, True])
def test_settings_and_weights_are_the_checkpoints(written, kind, quantised):
    checkpoint, file = written(kind, quantised=quantised)
    found = find_checkpoint(file)
    config = decoder_config(found)
    assert config == decoder_config(checkpoint)
    theirs, ours = (trees.flatten(load_decoder(path, config)) for path in (checkpoint, found))
    assert theirs.keys() == ours.keys()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf)
    assert find_checkpoint(file) == found  # as it was made


def test_the_tokenizer_is_the_one_that_the_file_describes(written):
    checkpoint, file = written()
    theirs, ours = load_tokenizer(checkpoint), load_tokenizer(find_checkpoint(file))
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, 2, theirs.vocab_size)
    assert ours.stop_ids == theirs.stop_ids == (2,)
    for text in ("The Silent Harbor", "Rivers, 1987 or 1999?", "an <eos> inside", "完全"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.chat([{"role": "user", "content": "The River"}]) == [1, *theirs.encode("The River")]


def test_digits_are_cut_as_the_file_says(written):
    _, file = written(pre="smollm")
    tokenizer = load_tokenizer(find_checkpoint(file))
    digits = [tokenizer.encode(digit)[0] for digit in "1987"]
    assert tokenizer.encode("1987") == digits


def test_texts_end_at_each_token_that_the_file_calls_an_end(written, monkeypatch):
    """Of a document, of a turn and of a message; and at <|endoftext|>, which files of Qwen leave out beside <|im_end|>."""
    add = gguf.GGUFWriter.add_token_list
    words = []

    def add_token_list(writer, given):
        words[:] = [*given[:1], "<|endoftext|>", *given[2:]]
        add(writer, words)
        writer.add_eot_token_id(words.index("a"))
        writer.add_eom_token_id(words.index("b"))

    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", add_token_list)
    assert load_tokenizer(find_checkpoint(written()[1])).stop_ids == (2, words.index("a"), words.index("b"), 1)


def test_prompts_of_qwen_begin_with_no_token_of_their_own(written):
    """Llama.cpp's files of these models name a first token; their tokenizers in Hugging Face layout say that there is none."""
    assert load_tokenizer(find_checkpoint(written("qwen2", "qwen2")[1])).bos_id is None


def test_what_is_not_read_is_refused_by_name(written, tmp_path):
    with pytest.raises(ValueError, match=r"cuts texts like 'tekken' is not read from GGUF, only 'gpt2' with gpt-2, smollm"):
        find_checkpoint(written(pre="tekken")[1])
    with pytest.raises(ValueError, match=r"scaled rotary positions are not read from GGUF: bring"):
        find_checkpoint(_anew(tmp_path, written, rope__scaling__type="linear"))
    file = _anew(tmp_path, written)
    find_checkpoint(file)
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(ValueError, match=r"was made from another model\.gguf: delete the folder"):
        find_checkpoint(file)
    (tmp_path / "junk.gguf").write_bytes(b"GGUFjunk")
    with pytest.raises(ValueError, match=r"junk\.gguf is truncated or no GGUF file"):
        find_checkpoint(tmp_path / "junk.gguf")


ODD = {  # what is written in another form, by the writer's method
    "add_token_merges": lambda merges: [*merges, "zz qq"],  # of words that are not there
    "add_token_types": lambda kinds: kinds[:-1],
    "add_tensor": lambda name: "plain" if name == "output_norm.weight" else name,
    "add_uint32": lambda key: "other" if key == "llama.attention.head_count" else key,
}


@pytest.mark.parametrize("method", ODD)
def test_odd_files_end_in_a_sentence_that_names_them(written, method, monkeypatch):
    before = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(
        gguf.GGUFWriter, method, lambda self, first, *more, **others: before(self, ODD[method](first), *more, **others)
    )
    _, file = written()
    with pytest.raises(ValueError) as error:
        find_checkpoint(file)
    assert str(error.value).startswith(str(file)) and str(error.value).endswith(
        "bring the model in Hugging Face layout instead."
    )
    assert "\n" not in str(error.value) and not file.with_name("model.gguf.checkpoint").exists()


def test_a_file_that_does_not_say_how_texts_are_cut_is_refused(written, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda self, pre: None)
    with pytest.raises(ValueError, match="of kind 'gpt2' that does not say how it cuts texts is not read from GGUF, only"):
        find_checkpoint(written()[1])


def test_a_folder_that_cannot_be_written_is_named(written, monkeypatch):
    def full(folder, make):
        raise OSError(errno.EROFS, "Read-only file system", "/models/.lock")

    monkeypatch.setattr(gguf_file, "make_once", full)
    with pytest.raises(
        OSError, match=r"model\.gguf\.checkpoint cannot be written \(Read-only file system\): copy model\.gguf to"
    ):
        find_checkpoint(written()[1])


def _anew(folder, written, **facts):
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    (folder / "checkpoint").rmdir()
    return written(**facts)[1]
