"""A model is loaded on the devices and in the type that the caller names."""

import jax
import numpy as np
import pytest

import user_llm


def test_a_model_in_another_type_is_another_model(make_model):
    made = make_model("cross")
    user = user_llm.load(made.directory).encode(made.rows(1))
    half = user_llm.load(made.directory, dtype="bfloat16")
    with pytest.raises(ValueError, match="encode their events again"):
        half.recommend(user)
    assert len(half.recommend(half.encode(made.rows(1)), 3)) == 3
    assert user_llm.load(made.directory, dtype="float32").identity == user.model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "no such"}, "device='no such'"),
        ({"mesh": (1, 1)}, r"mesh=\(1, 1\): name the sizes of data, fsdp, tensor"),
        ({"mesh": (3, 1, 1)}, "does not fit 8 devices"),
        ({"mesh": (8, 1, 1), "device": "cpu"}, "device or mesh, and not both"),
    ],
)
def test_devices_that_are_not_there_are_refused(make_model, settings, message):
    with pytest.raises(ValueError, match=message):
        user_llm.load(make_model("cross").directory, **settings)


@pytest.mark.slow
def test_one_device_and_eight_answer_alike(make_model):
    made = make_model("cross")
    one, eight = user_llm.load(made.directory), user_llm.load(made.directory, mesh=(2, 2, 2))
    assert len(jax.devices()) == 8 and eight.predictor.mesh.size == 8
    rows = [row for user in range(5) for row in made.rows(user)]
    answers = [
        {key: [item.score for item in model.recommend(user, candidates=made.timelines.catalogue.keys[1:])] for key, user in model.encode_many(rows).items()}
        for model in (one, eight)
    ]  # fmt: skip
    assert answers[0].keys() == answers[1].keys()
    for key in answers[0]:
        np.testing.assert_allclose(answers[0][key], answers[1][key], atol=1e-5)
