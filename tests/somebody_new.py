"""What a model that is alone on a machine answers for a user whom no training saw."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import user_llm
from user_llm.serving.personalizer import Personalizer


@contextmanager
def away(*folders: Path) -> Iterator[list[Path]]:
    """Move folders to where no model can expect them, and back at the end; yield where they are."""
    moved = [folder.rename(folder.with_name(f"{folder.name}.gone")) for folder in folders]
    try:
        yield moved
    finally:
        for folder, place in zip(folders, moved, strict=True):
            place.rename(folder)


def check_somebody_new(model: Personalizer, history: list[dict[str, Any]]) -> None:
    """See that all functions answer for a user whom no training saw, with an item that no training saw.

    Args:
      history: raw events of one user, in the columns of the training data.
    """
    fields, resampled = model.vocabulary.fields, model.predictor.config.resampler is not None
    rows = [{**row, fields.user: "somebody new"} for row in history[:5]]
    rows.append({**rows[0], fields.item: "an item of tomorrow"})
    user = model.encode(rows)
    assert (user.count, user.unknown) == (len({(row[fields.item], row[fields.time]) for row in rows}) - 1, 1)
    assert np.isfinite(user.tokens).all() and (len(user.tokens) > 0) == (model.predictor.config.encoder is not None)
    for again in (model.update(model.encode(rows[:3]), rows[3:]), model.update(user, rows)):
        np.testing.assert_allclose(again.tokens, user.tokens, atol=1e-5)
        assert (again.count, again.unknown, again.last_time) == (user.count, user.unknown, user.last_time)
    ranking = model.recommend(user, 3, seen=False)
    assert len(ranking) == 3 and all(item.title for item in ranking)
    assert not {item.id for item in ranking} & {str(row[fields.item]) for row in rows}
    assert [item.id for item in model.recommend(user, candidates=[ranking[1].id])] == [ranking[1].id]
    prompt = f"Write a review of {ranking[0].title}."
    text = model.generate(prompt, user=user, max_tokens=4)
    assert "".join(model.generate(prompt, user=user, max_tokens=4, stream=True)) == text
    scores = model.score(prompt, ["x", "yz"], user=user)
    assert (scores < 0).all()
    if resampled:
        assert len(model.explain(user, 2)) == 2
    many = model.encode_many([*rows, *({**row, fields.user: "another"} for row in rows[:2])])
    both = [many["somebody new"], many["another"]]
    np.testing.assert_allclose(both[0].tokens, user.tokens, atol=1e-5)
    assert [item.id for item in model.recommend_many(both, 3, seen=False)[0]] == [item.id for item in ranking]
    assert model.generate_many([prompt], [user], max_tokens=4) == [text]
    data = user.to_bytes()
    assert len(data) < 8192 and user_llm.User.from_bytes(data).count == user.count
    with pytest.raises(ValueError, match="encode their events again"):
        model.recommend(dataclasses.replace(user, model="another"))
