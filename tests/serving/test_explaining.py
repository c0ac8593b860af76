"""What the user tokens look at."""

import numpy as np
import pytest

from user_llm.serving import batch as batching


def test_explaining_shows_what_the_user_tokens_look_at(made, model):
    user = model.encode(made.rows(2))
    if made.written.predictor.config.resampler is None:
        with pytest.raises(ValueError, match="has no resampler"):
            model.explain(user)
        return
    seen = model.explain(user)
    weights = [one.weight for one in seen]
    assert len(seen) == 6 and weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1
    assert sorted(one.events_ago for one in seen) == [1, 2, 3, 4, 5, 6]
    last = next(one for one in seen if one.events_ago == 1)
    assert last.id == made.rows(2)[-1]["item"]
    events, lengths = batching.histories(model.predictor, [user], 50)
    np.testing.assert_allclose(last.weight, model.predictor.attended(events, lengths)[0][5], rtol=1e-5)
    assert model.explain(user, 2) == seen[:2]
