"""What all phases of a run depend on."""

from configs import quickstart
from user_llm.config.reader import read_config
from user_llm.phases import identities

FILES = {"data/ratings.csv": "r"}


def _config(**changes):
    config = quickstart.get_config()
    config.update_from_flattened_dict(changes)
    return read_config(config)


def test_a_run_depends_on_its_files_dataset_protocol_and_seed():
    found = identities.run_identity(_config(), FILES)
    assert found.inputs == FILES and found.built_on == {}
    assert {key.split(".")[0] for key in found.settings} == {"seed", "data"}
    assert found == identities.run_identity(_config(**{"user_llm.loop.total_steps": 9, "llm.vocab_size": 300}), FILES)
    for other in (_config(seed=1), _config(**{"data.split": "global_time"})):
        assert identities.run_identity(other, FILES).hash != found.hash
    assert identities.run_identity(_config(), {"data/ratings.csv": "x"}).hash != found.hash


def test_a_tokenizer_depends_on_its_size_besides_and_not_on_the_prompts():
    found = identities.tokenizer_identity(_config(), FILES)
    assert found.hash != identities.tokenizer_identity(_config(**{"llm.vocab_size": 300}), FILES).hash
    asked = _config(**{"user_llm.prompts.next_item.instruction": "Next:"})
    assert identities.tokenizer_identity(asked, FILES) == found
