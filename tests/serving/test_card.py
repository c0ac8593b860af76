"""The model card, which people and the hub read."""

import json

from user_llm.serving.card import card


def test_a_card_names_the_llm_of_the_hub_alone(make_model):
    """The hub refuses a card that is based on a directory."""
    settings = json.loads((make_model("cross").directory / "user_llm.json").read_text())
    for llm, named in (("org/llm", True), ("/data/llm", False), ("../llm", False)):
        text = card(settings | {"facts": settings["facts"] | {"llm": llm}})
        assert (f"base_model: {llm}" in text) == named


FACTS = {"dataset": "toy", "users": 5000, "events": 20, "items": 9, "columns": ["item"], "command": "none"}


def test_a_card_shows_results_with_intervals_and_no_text_that_breaks_its_table():
    rows = [
        {"task": "next_item", "method": "a|b", "metric": "recall@10", "value": 0.25, "interval": [0.2, 0.3], "n": 1234},
        {"task": "review", "method": "a\nb", "metric": "rouge1", "value": None, "n": 1},
    ]
    lines = card({"identity": "0123", "facts": FACTS | {"rows": rows}}).splitlines()
    assert r"| next_item | a\|b | recall@10 | 0.2500 | 0.2000 to 0.3000 | 1,234 |" in lines
    assert "| review | a b | rouge1 |  |  | 1 |" in lines
    assert any("5,000 users" in line for line in lines) and any("`0123`" in line for line in lines)
