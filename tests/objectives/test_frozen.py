"""What opens a frozen model, and what it refuses."""

import jax
import numpy as np
import pytest

from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.objectives import frozen
from visual_tokens import small_vqkd


def opened(changes=(), **options):
    config = small_vqkd()
    with config.unlocked():
        config.teacher.update(dict(changes))
    return frozen.open(config, **options)


def test_it_is_an_objective_without_its_own_teacher():
    found = opened()
    held = jax.eval_shape(lambda: found.state(jax.random.key(0)))
    assert held.keys() == {"teacher"} and held["teacher"].keys() == {"params", "extras"}
    assert {"trunk", "embed", "head"} <= held["teacher"]["params"].keys()
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8)
    assert found.shape("features", {"image": images}).shape == (2, 6)


def test_what_train_loads():
    assert opened().checkpoints == {}  # random
    assert opened({"random": False, "checkpoint": "a/b"}).checkpoints == {"teacher": "a/b"}


def test_one_that_is_not_at_hand():
    """Of a converted checkpoint, which says how many outputs it had; updates need it."""
    config = small_vqkd()
    with config.unlocked():
        config.teacher = {"checkpoint": "", "random": False, "config": {}, "outputs": 7}
    with pytest.raises(UserError, match="config.teacher.checkpoint is empty"):
        frozen.open(config, needs="codes")
    config.steps = 0
    found = frozen.open(config, needs="codes")
    assert found.outputs == 7 and not found.checkpoints and not found.predict
    assert found.state(None) == {"teacher": {"params": {}, "extras": {}}}


def test_it_computes_in_the_dtype_of_teachers():
    config = small_vqkd({"teacher_dtype": "bfloat16"})
    assert config.teacher.config.dtype == "float32"
    assert frozen.open(config).config.dtype == "bfloat16"
    assert config.teacher.config.dtype == "float32"


def test_a_saved_config_does():
    """As JSON has it: with lists for tuples."""
    import json

    saved = json.loads(configs.to_json(small_vqkd()))
    found = frozen.open(configs.from_dict(saved))
    assert found.config.image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"random": False}, "config.teacher.checkpoint is empty; name a checkpoint of a dVAE, or"),
        ({"random": False, "checkpoint": "x", "config": {}}, "config.teacher.config is empty; "),
        ({"config": {"objective": "../evil"}}, "config.teacher.config.objective='../evil'"),
        ({"config": {"objective": "frozen"}}, "config.teacher.config.objective='frozen'"),
    ],
)
def test_what_cannot_be_opened(changes, words):
    config = small_vqkd()
    with config.unlocked():
        for key, value in changes.items():
            if key == "config" and value:
                config.teacher.config.update(value)
            else:
                config.teacher[key] = configs.from_dict(value) if key == "config" else value
    with pytest.raises(UserError, match=words) as caught:
        frozen.open(config, "a dVAE")
    assert "\n" not in str(caught.value)


def test_what_lacks_a_function_is_refused():
    with pytest.raises(UserError, match="one of 'data2vec', which has no 'codes'; name a .* dVAE"):
        opened(what="a dVAE", needs="codes")


def test_views_are_resized():
    found = opened()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    assert frozen.view(found, images) is images
    flat = np.full((2, 32, 32, 3), 200, np.uint8)
    got = frozen.view(found, flat)
    assert got.shape == (2, 16, 16, 3) and got.dtype == np.uint8 and (got == 200).all()
