import pytest

from user_llm.common.errors import naming


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("A schedule.", "user_llm: A schedule."),
        ("optimizer.b2=1: too slow.", "user_llm.optimizer.b2=1: too slow."),
        ("prompts.review: no text.", "user_llm.prompts.review: no text."),
        ("no text: none.", "user_llm: no text: none."),
        ("user_llm: known.", "user_llm: known."),
        ("user_llm.loop.mode=1: known.", "user_llm.loop.mode=1: known."),
        ("user_llm_lora.x=1: another.", "user_llm.user_llm_lora.x=1: another."),
    ],
)
def test_a_key_stands_in_front_once(message, named):
    with pytest.raises(ValueError) as error, naming("user_llm"):
        raise ValueError(message)
    assert str(error.value) == named


def test_other_errors_pass_as_they_are():
    with pytest.raises(OSError, match="^gone$"), naming("user_llm"):
        raise OSError("gone")
    with naming("user_llm"):
        pass
