"""What a config may name: the names of the package and those of a caller, told apart."""

import sys
from pathlib import Path

import pytest

from user_llm.config.phases import PHASES
from user_llm.phases.builders import BUILDERS
from user_llm.phases.kinds import TASKS, Kinds

sys.path.insert(0, str(Path(__file__).parents[1]))

import own


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        ({"datasets": {"movielens": own.find_plays}}, "^datasets has 'movielens', which the package has itself"),
        ({"encoders": {"transformer": own.MeanConfig}}, "^encoders has 'transformer', which the package has itself"),
        ({"encoders": {"average": own.MeanConfig}}, "^encoders has 'average', whose own kind is 'mean'"),
        ({"tasks": {"next_item": own.NEXT_GENRE}}, "^tasks has 'next_item', which the package has itself"),
        ({"tasks": {"max_title_tokens": own.NEXT_GENRE}}, "^tasks has 'max_title_tokens', which the package has itself"),
        ({"families": {"llama": own.LAMP}}, "^families has 'llama', which the package has itself"),
        ({"tasks": {"mine": own.find_plays}}, "^tasks has 'mine', which must be a PromptTask, not a function"),
        ({"encoders": {"mine": object}}, "^encoders has 'mine', which must be an EncoderConfig"),
        ({"datasets": {"mine": "plays.tsv"}}, "^datasets has 'mine', which must be a function that returns a Raw, not a str"),
        ({"families": [own.LAMP]}, "^families must be a dict of names, not a list"),
    ],
)
def test_what_cannot_be_told_apart_or_is_none_of_its_kind_is_refused(kinds, sentence):
    with pytest.raises(ValueError, match=sentence):
        Kinds.of(**{"datasets": {}, "tasks": {}, "encoders": {}, "families": {}} | kinds)


def test_all_names_are_the_packages_and_the_callers():
    found = Kinds.of({"plays": own.find_plays}, {"next_genre": own.NEXT_GENRE}, {"mean": own.MeanConfig}, {"lamp": own.LAMP})
    assert [*found.tasks] == [*TASKS, "next_genre"] and {"llama", "lamp"} <= set(found.families)
    assert set(found.datasets) == {"plays"} and set(found.encoders) == {"mean"}
    assert BUILDERS.keys() == PHASES.keys()
