"""Schedules, weight-decay mask and layer-wise rates against recorded numbers; AdamW by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bivl.core import config as configs
from bivl.core import optimizer
from bivl.core.errors import UserError
from bivl.objectives import classify
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


def test_what_is_fast_moves_further():
    """Its weight decay with it, as a rate of its own does in torch.optim.AdamW."""
    config = options(weight_decay=0.1, eps=0.0, fast="^head/(fc|norm)/", fast_rate=20.0)
    tx = optimizer.make_optimizer(config, lambda step: 0.01)
    params = {"head": {name: {"kernel": jnp.full((2,), 3.0)} for name in ("fc", "pooler")}}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, -7.0), params)
    updates = tx.update(grads, tx.init(params), params)[0]["head"]
    np.testing.assert_allclose(updates["pooler"]["kernel"], 0.01 * (1 - 0.1 * 3), rtol=1e-5)
    np.testing.assert_allclose(updates["fc"]["kernel"], 0.2 * (1 - 0.1 * 3), rtol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "config.optimizer.fast='\\(' is no regex"),
        ("", "fast='' finds 1 of 1 parameters; write a regex of those that shall have the rate"),
        ("tail", "fast='tail' finds 0 of 1 parameters"),
    ],
)
def test_all_or_nothing_cannot_be_fast(pattern, words):
    with pytest.raises(UserError, match=words):
        config = options(fast=pattern, fast_rate=2.0)
        optimizer.make_optimizer(config, lambda step: 1.0).init({"head": jnp.ones(2)})


@pytest.mark.parametrize(("clip_norm", "length"), [(0.0, 50.0), (5.0, 5.0), (100.0, 50.0)])
def test_clipping_by_global_norm_and_without(clip_norm, length):
    tx = optimizer.make_optimizer(options(clip_norm=clip_norm, beta1=0.5), lambda step: 1.0)
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    _, state = tx.update(grads, tx.init(grads), grads)
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.5 * length)


def test_layer_decay_may_spare_the_embedding():
    """As fairseq's `mae_image_classification.py`: block i of N at decay^(N - i), the rest at 1."""
    params = {
        "embed": {"patch": jnp.ones(2), "relative_position": jnp.ones(2)},
        "trunk": {"blocks": {"kernel": jnp.ones((3, 2))}, "input_norm": jnp.ones(2)},
        "head": {"kernel": jnp.ones(2)},
    }
    spared = optimizer.layer_scales(params, 0.5, embed=False)
    np.testing.assert_allclose(spared["trunk"]["blocks"]["kernel"].ravel(), [1 / 8, 1 / 4, 1 / 2])
    rest = (*spared["embed"].values(), spared["trunk"]["input_norm"], spared["head"]["kernel"])
    assert [float(scale) for scale in rest] == [1.0] * 4
    usual = optimizer.layer_scales(params, 0.5)
    assert float(usual["embed"]["patch"]) == 1 / 16
    assert float(usual["embed"]["relative_position"]) == 1.0


@pytest.mark.parametrize("positions", ["relative", "relative_layers"])
def test_a_table_of_its_own_moves_with_its_block(positions):
    """BEiT's layer ids: `blocks.i.attn.relative_position_bias_table` is of block i, the shared
    `rel_pos_bias` of the rest."""
    config = configs.load("configs/finetune/data2vec_image.py:smoke")
    configs.override(config, [("model.positions", positions)])
    params = nn.unbox(jax.eval_shape(classify.make(config).init, jax.random.key(0))[0])
    for embed in (True, False):
        scales = optimizer.layer_scales(params, 0.5, embed=embed)
        found = scales["embed"]["relative_position"]["table"]["value"]
        if positions == "relative":
            assert found.shape == () and found == 1.0
        else:
            assert found.shape == (4, 1, 1)
            np.testing.assert_allclose(found.ravel(), [1 / 16, 1 / 8, 1 / 4, 1 / 2])


FROZEN = {"freeze": "^(embed|trunk)/", "freeze_steps": 3}


def frozen_updates(count, grads, **changes):
    """Updates of `count` steps: an optimizer with FROZEN and `changes` on two parameters of 2."""
    config = options(**(FROZEN | {"eps": 1e-3} | changes))
    tx = optimizer.make_optimizer(config, lambda step: 0.1)
    params = {"embed": {"kernel": jnp.full(2, 2.0)}, "head": {"kernel": jnp.full(2, 2.0)}}
    state, found = tx.init(params), []
    for step in range(count):
        given = {name: {"kernel": jnp.asarray(g(step))} for name, g in grads.items()}
        updates, state = tx.update(given, state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found, params


def growing(step):
    return np.float32([1.0 + step, -0.3])


def test_frozen_parameters_stand_still():
    """Weight decay does not move them either."""
    grads = {"embed": growing, "head": growing}
    found, params = frozen_updates(3, grads, weight_decay=0.1, no_decay="^$")
    np.testing.assert_array_equal(params["embed"]["kernel"], [2.0, 2.0])
    assert all((np.asarray(u["head"]["kernel"]) != 0).all() for u in found)
    found, _ = frozen_updates(4, grads, weight_decay=0.1, no_decay="^$")
    assert (np.asarray(found[3]["embed"]["kernel"]) != 0).all()


def test_what_begins_to_move_begins_adam_anew():
    """As if it had never been there: moments and the correction of their bias start from zero."""
    grads = {"embed": growing, "head": growing}
    found, _ = frozen_updates(6, grads)
    tx = optimizer.make_optimizer(options(eps=1e-3), lambda step: 0.1)
    alone = jnp.full(2, 2.0)
    state = tx.init(alone)
    for step in range(3, 6):
        update, state = tx.update(jnp.asarray(growing(step)), state, alone)
        np.testing.assert_allclose(found[step]["embed"]["kernel"], update, rtol=1e-5)
    state = tx.init(alone)
    for step in range(6):
        update, state = tx.update(jnp.asarray(growing(step)), state, alone)
        np.testing.assert_allclose(found[step]["head"]["kernel"], update, rtol=1e-5)


def test_frozen_gradients_do_not_count_for_clipping():
    huge = lambda step: np.float32([1e6, 1e6])  # noqa: E731
    small = lambda step: np.float32([0.03, 0.04])  # noqa: E731
    clipped, _ = frozen_updates(3, {"embed": huge, "head": small}, clip_norm=1.0)
    alone, _ = frozen_updates(3, {"embed": lambda step: np.zeros(2), "head": small})
    for a, b in zip(clipped, alone, strict=True):
        np.testing.assert_allclose(a["head"]["kernel"], b["head"]["kernel"], rtol=1e-5)
    moving, _ = frozen_updates(4, {"embed": huge, "head": small}, clip_norm=1.0)
    before, after = (abs(float(u["head"]["kernel"][0])) for u in moving[2:])
    assert after < 0.9 * before  # now they do: the head's gradient is clipped to almost nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": "("}, "config.optimizer.freeze='\\(' is no regex"),
        ({"freeze": ""}, "freeze='' finds 2 of 2 parameters; write a regex"),
        ({"freeze": "^encoder/"}, "freeze='\\^encoder/' finds 0 of 2 parameters"),
    ],
)
def test_freezing_everything_or_nothing_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        frozen_updates(0, {}, **changes)


def test_a_frozen_state_is_sharded_like_its_parameters():
    """optax.tree.map_params, which places moments with their parameters, knows this optimizer."""
    tx = optimizer.make_optimizer(options(**FROZEN, layer_decay=0.5), lambda step: 0.1)
    params = {"embed": {"w": jnp.ones((3, 2))}, "head": {"w": jnp.ones(4)}}
    mapped = optax.tree.map_params(
        tx, lambda x, p: p.shape, tx.init(params), params, transform_non_params=lambda x: None
    )
    assert optax.tree.get(mapped, "mu") == {"embed": {"w": (3, 2)}, "head": {"w": (4,)}}
