"""The small LLM's words: what it learns from, and its tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from user_llm.config import experiments
from user_llm.config.reader import read_config
from user_llm.data.dataset import Dataset
from user_llm.data.splits import make_split
from user_llm.data.tokenizer import train_bpe
from user_llm.phases import llm
from user_llm.phases.run import Run


@pytest.fixture
def data(make_timelines):
    """Two users who wrote of every event: user u of event t "u t"; nothing of event 0."""
    timelines = make_timelines([[1, 2, 3], [2, 3, 1, 1]])
    texts = np.array(["", "0 1", "0 2", "", "1 1", "1 2", "1 3"], np.dtypes.StringDType())
    timelines = dataclasses.replace(timelines, columns=timelines.columns | {"review": texts})
    return Dataset(timelines, make_split(timelines, "leave_last_out"))


def test_the_corpus_is_the_catalogue_and_what_users_wrote_in_training(data, monkeypatch):
    catalogue = ["Film 1 (2000) | Comedy\n", "Film 2 (2000) | Drama, War\n", "Film 3 (2000) | Action\n"]
    assert llm.catalogue_lines(data.timelines) == catalogue
    # The last two events of each user are validation and test.
    assert llm.corpus(data, 0) == [*catalogue, "1 1\n"]
    everything = dataclasses.replace(data, split=dataclasses.replace(data.split, train_stop=data.timelines.lengths))
    written = ["0 1\n", "0 2\n", "1 1\n", "1 2\n", "1 3\n"]
    assert sorted(llm.corpus(everything, 0)[3:]) == written
    monkeypatch.setattr(llm, "CORPUS_TEXTS", 2)
    drawn = [llm.corpus(everything, seed)[3:] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and all(len(set(some)) == 2 and set(some) <= set(written) for some in drawn)
    assert len({tuple(sorted(some)) for some in drawn}) > 1  # another seed draws others


def test_a_tokenizer_is_made_once_and_knows_the_prompts(data, tmp_path, mesh_of):
    config = experiments.experiment("movielens", "xattn", "small")
    config.user_llm.prompts.next_item.instruction = "Zebra crossing:"
    config.llm.vocab_size = 300
    run = Run(read_config(config), epath.Path(tmp_path), mesh_of())
    assert llm.sentences(run.config)[0] == "Zebra crossing:"
    first = llm.tokenizer(run, data)
    made = (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert len(first.encode("Zebra crossing:")) < len(first.encode("gnissorc arbeZ:"))  # its words are tokens
    assert llm.tokenizer(run, data).vocab_size == first.vocab_size <= 300
    assert (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == made
    assert (tmp_path / "tokenizer" / "identity.json").exists()


def test_the_small_llm_has_the_sizes_that_the_config_says(tmp_path, mesh_of):
    config = experiments.experiment("movielens", "xattn", "small")
    config.llm.update(num_layers=3, unroll=False, attention_kernel="reference")
    found = llm.decoder_config(Run(read_config(config), epath.Path(tmp_path), mesh_of()), 333)
    assert (found.vocab_size, found.num_layers, found.unroll) == (333, 3, False)
    assert found.block.width == config.llm.block.width and found.block.attention_kernel == "reference"


def test_a_checkpoint_whose_tokenizer_has_more_tokens_than_its_table_is_refused(data, tmp_path, mesh_of):
    size = train_bpe(["Emma"], 300, tmp_path / "llm").vocab_size
    settings = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = experiments.experiment("movielens", "xattn", "small")
    config.llm.checkpoint = str(tmp_path / "llm")
    run = Run(read_config(config), epath.Path(tmp_path), mesh_of())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | {"vocab_size": size}))
    assert llm.tokenizer(run, data).vocab_size == size
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | {"vocab_size": size - 1}))
    with pytest.raises(ValueError, match=rf"llm: the tokenizer has {size} tokens, and the LLM's table {size - 1}"):
        llm.tokenizer(run, data)


def test_experts_are_kept_in_no_codes(tmp_path, mesh_of):
    settings = {
        "model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 30, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 8, "norm_topk_prob": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = experiments.experiment("movielens", "xattn", "small")
    config.llm.update(checkpoint=str(tmp_path), quantize="int8")
    config.user_llm.strategy = "lora"
    for name in ("text_prompt_10", "text_prompt_50"):
        config[name].strategy = "lora"
    run = Run(read_config(config), epath.Path(tmp_path), mesh_of())
    with pytest.raises(ValueError, match="llm.quantize=int8: the weights of experts"):
        llm.decoder_config(run, 30)
    config.llm.quantize = ""
    assert llm.decoder_config(dataclasses.replace(run, config=read_config(config)), 30).block.experts.count == 2
