"""Schedules, weight-decay mask and layer-wise rates against recorded numbers; AdamW by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bivl.core import optimizer
from bivl.core.errors import UserError
from configs import common
from golden import data2vec_vision as golden

G = golden.load()
NO_DECAY = common.base().optimizer.no_decay


def options(**changes):
    config = common.base().optimizer
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ("recorded", "changes"),
    [
        ("cosine", {"learning_rate": 2e-3, "warmup_steps": 10, "end_learning_rate": 1e-5}),
        ("cosine_no_floor", {"schedule": "cosine", "learning_rate": 2e-3, "warmup_steps": 10}),
        (
            "tri_stage",
            {"learning_rate": 5e-4, "phases": (0.03, 0.9, 0.07), "final_scale": 0.01},
        ),
        (
            "tri_stage_ctc",
            {
                "schedule": "tri_stage",
                "learning_rate": 3e-5,
                "phases": (0.1, 0.4, 0.5),
                "final_scale": 0.05,
            },
        ),
        ("polynomial", {"learning_rate": 1e-5, "warmup_steps": 6}),
    ],
)
def test_schedule_matches_the_reference(recorded, changes):
    config = options(**{"schedule": recorded} | changes)
    schedule = optimizer.make_schedule(config, 100)
    found = jax.vmap(schedule)(jnp.arange(120))
    np.testing.assert_allclose(found, G[f"schedule/{recorded}"], rtol=2e-5, atol=1e-10)


def test_constant_schedule():
    config = options(schedule="constant", learning_rate=2.0, warmup_steps=4)
    schedule = optimizer.make_schedule(config, 10)
    found = [float(schedule(n)) for n in (0, 1, 2, 4, 5, 1000)]
    assert found == [0.0, 0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", sorted(optimizer.SCHEDULES))
@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (1, 0), (3, 10)])
def test_schedules_are_finite_in_short_runs(name, steps, warmup):
    config = options(schedule=name, learning_rate=1.0, warmup_steps=warmup)
    found = jax.vmap(optimizer.make_schedule(config, steps))(jnp.arange(12))
    assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "cosin"}, "config.optimizer.schedule='cosin'"),
        ({"schedule": "tri_stage", "phases": (0.5, 0.5)}, "config.optimizer.phases"),
        ({"schedule": "tri_stage", "phases": (0.5, 0.5, 0.5)}, "config.optimizer.phases"),
        ({"schedule": "tri_stage", "final_scale": 0.0}, "final_scale=0"),
    ],
)
def test_bad_schedules_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        optimizer.make_schedule(options(**changes), 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_decay": "("}, "no_decay"),
        ({"beta1": 1.0}, "config.optimizer.beta1"),
        ({"beta2": 1.5}, "config.optimizer.beta2"),
    ],
)
def test_bad_optimizers_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        optimizer.make_optimizer(options(**changes), lambda step: 1.0)


def recorded_tree(key):
    """Our parameter tree, each leaf filled with the number recorded for its BEiT name."""
    numbers = dict(zip(G["names"].tolist(), G[key].tolist(), strict=True))
    return golden.tree(lambda name: np.full(G[f"params/{name}"].shape, numbers[name], np.float32))


def test_decay_mask_matches_the_reference():
    params = recorded_tree("weight_decay_mask")
    mask = optimizer.decay_mask(params, NO_DECAY)
    jax.tree.map(lambda used, x: np.testing.assert_array_equal(x, float(used)), mask, params)
    assert mask["embed"]["mask_token"]["value"] and not mask["embed"]["cls_token"]["value"]
    assert len(set(jax.tree.leaves(mask))) == 2


def test_layer_scales_match_the_reference():
    params = recorded_tree("rate_factors")
    scales = optimizer.layer_scales(params, 0.65)

    def compare(scale, x):
        np.testing.assert_allclose(np.broadcast_to(scale, x.shape), x, rtol=1e-6)

    jax.tree.map(compare, scales, params)
    assert len({round(float(s), 5) for x in jax.tree.leaves(scales) for s in x.ravel()}) == 5


def test_one_update_by_hand():
    """Adam's first step is the gradient's sign; decay is decoupled, masked and scaled by layer."""
    config = options(weight_decay=0.1, layer_decay=0.5, no_decay="bias", eps=0.0)
    tx = optimizer.make_optimizer(config, lambda step: 0.01)
    params = {
        "embed": {"kernel": jnp.full((2,), 3.0)},
        "trunk": {"blocks": {"kernel": jnp.full((2, 2), 3.0)}},
        "head": {"kernel": jnp.full((2,), 3.0), "bias": jnp.full((2,), 3.0)},
    }
    grads = jax.tree.map(lambda x: jnp.full(x.shape, -7.0), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    decayed = 0.01 * (1 - 0.1 * 3)
    np.testing.assert_allclose(updates["head"]["bias"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"], decayed, rtol=1e-5)
    np.testing.assert_allclose(updates["embed"]["kernel"], decayed / 8, rtol=1e-5)
    blocks = updates["trunk"]["blocks"]["kernel"]
    np.testing.assert_allclose(blocks, [[decayed / 4] * 2, [decayed / 2] * 2], rtol=1e-5)


@pytest.mark.parametrize(("clip_norm", "length"), [(0.0, 50.0), (5.0, 5.0), (100.0, 50.0)])
def test_clipping_by_global_norm_and_without(clip_norm, length):
    tx = optimizer.make_optimizer(options(clip_norm=clip_norm, beta1=0.5), lambda step: 1.0)
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    _, state = tx.update(grads, tx.init(grads), grads)
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.5 * length)
