"""data2vec 1.0 on images against numbers recorded from an independent PyTorch computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from bivl.core import optimizer, sharding
from bivl.core import step as steps
from bivl.core.state import State
from bivl.modalities import image
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec, distillation
from golden import data2vec_vision as golden

G = golden.load()
PIPELINES = {  # recorded name: layer norms, norms of the mean, activation
    "dv": (("layer",), ("layer",), "layers"),
    "mean": ((), (), "layers"),
    "ln": (("layer",), (), "layers"),
    "in": (("instance",), (), "layers"),
    "bn": (("batch",), (), "layers"),
    "gn": (("group",), (), "layers"),
    "final_in": ((), ("instance",), "layers"),
    "in_final_ln": (("instance",), ("layer",), "layers"),
    "bn_in_ln": (("batch", "instance", "layer"), (), "layers"),
    "final_ln_in": ((), ("layer", "instance"), "layers"),
    "all": (("batch", "instance", "group", "layer"), ("layer", "instance"), "layers"),
    "ffn_in_final_ln": (("instance",), ("layer",), "ffn"),
}


def params(prefix="params"):
    return jax.tree.map(jnp.asarray, golden.tree(lambda name: G[f"{prefix}/{name}"]))


def batch():
    return {"image": jnp.asarray(G["images"]), "mask": jnp.asarray(G["mask"], bool)}


def recorded_config():
    """The sizes that the numbers were recorded with."""
    sizes = {"model.depth": "3", "model.mlp_dim": "128", "batch_size": "4", "top_k_layers": "2"}
    return runs.tiny(sizes)


@pytest.fixture
def config():
    return recorded_config()


@functools.cache
def encoded(prefix, masked):
    c = recorded_config()
    model = data2vec.Data2Vec(image.make_embed(c, "float32"), EncoderConfig.of(c.model, "float32"))
    collect = {"collect": ("layers", "ffn"), "method": "encode"}
    encode = jax.jit(lambda p, b: model.apply({"params": p}, b, masked, **collect)[1])
    return encode(params(prefix), batch()), model


def test_layers_match_the_reference():
    out, _ = encoded("teacher_params", False)
    np.testing.assert_allclose(np.stack(out.layers), G["teacher/layers"], atol=1e-5)
    np.testing.assert_allclose(np.stack(out.ffn)[:, :, 1:], G["teacher/ffn"], atol=1e-5)
    np.testing.assert_allclose(out.tokens, G["teacher/tokens"], atol=1e-5)


def test_masked_student_matches_the_reference():
    out, model = encoded("params", True)
    np.testing.assert_allclose(np.stack(out.layers), G["student/layers"], atol=1e-5)
    prediction = jax.jit(model.apply)({"params": params()}, batch())
    np.testing.assert_allclose(prediction, G["student/prediction"], atol=1e-5)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_targets_match_the_reference(name):
    layer_norms, norms, source = PIPELINES[name]
    if source == "layers":
        values = [jnp.asarray(x[:, 1:]) for x in G["teacher/layers"][-2:]]
    else:
        values = [jnp.asarray(x) for x in G["teacher/ffn"][-2:]]
    got = distillation.average_targets(values, layer_norms, norms)
    np.testing.assert_allclose(got, G[f"targets/{name}"], atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("beta", [0, 2])
def test_losses_match_the_reference(config, reduction, beta):
    config.loss.reduction, config.loss.beta = reduction, float(beta)
    objective = data2vec.make(config)
    targets = {"values": jnp.asarray(G["targets/dv"]), "metrics": {}}
    key = jax.random.key(0)
    name = f"{reduction}_beta{beta}"
    loss, aux = jax.jit(objective.loss)(params(), {}, batch(), targets, key)
    np.testing.assert_allclose(loss, G[f"loss/{name}"], rtol=1e-5)
    np.testing.assert_allclose(aux["metrics"]["target_std"], G["target_std"], rtol=1e-5)
    np.testing.assert_allclose(aux["metrics"]["prediction_std"], G["prediction_std"], rtol=1e-5)
    assert aux["weight"] == G["mask"].sum()
    if name == "mean_beta2":
        differentiate = jax.jit(jax.grad(objective.loss, has_aux=True))
        grads, _ = differentiate(params(), {}, batch(), targets, key)
        wanted = golden.tree(lambda n: G[f"grads/{n}"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_full_steps_match_the_reference(config, count):
    """Clip active, decay masked, rate and teacher decay on their schedules."""
    config.ema_decay_start, config.ema_decay_end, config.ema_anneal_steps = 0.5, 0.875, 4
    o = config.optimizer
    o.learning_rate, o.end_learning_rate, o.warmup_steps = 2.0**-8, 1e-5, {1: 0, 3: 2}[count]
    o.weight_decay, o.clip_norm = 0.5, 0.8
    objective = data2vec.make(config)
    schedule = optimizer.make_schedule(o, 8)
    tx = optimizer.make_optimizer(o, schedule)
    state = State(jnp.int32(0), params(), params("teacher_params"), {}, tx.init(params()))
    step = jax.jit(
        functools.partial(
            steps.train_step, objective=objective, tx=tx, schedule=schedule, seed=0, accumulate=1
        )
    )
    recorded = f"step{count}"
    for n in range(count):
        state, metrics = step(state, batch(), n + 1)
        for name in ("loss", "grad_norm", "learning_rate", "ema_decay", "target_std"):
            wanted = G[f"{recorded}/{name}"][n]
            np.testing.assert_allclose(metrics[name], wanted, rtol=2e-5, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, state.params, golden.tree(lambda n: G[f"{recorded}/params/{n}"]))
    jax.tree.map(close, state.teacher, golden.tree(lambda n: G[f"{recorded}/teacher/{n}"]))


def test_accumulation_changes_no_mean(config):
    """Micro-batches with different numbers of masked patches average to the whole batch."""
    objective = data2vec.make(config)
    tx = optimizer.make_optimizer(config.optimizer, optimizer.make_schedule(config.optimizer, 8))
    state = State(jnp.int32(0), params(), params("teacher_params"), {}, tx.init(params()))
    accumulated = jax.jit(functools.partial(steps._accumulated, objective), static_argnums=3)
    results = [accumulated(state, batch(), jax.random.key(0), accumulate) for accumulate in (1, 4)]
    for aux, grads in results[1:]:
        np.testing.assert_allclose(
            aux["metrics"]["loss"], results[0][0]["metrics"]["loss"], rtol=1e-6
        )
        close = functools.partial(np.testing.assert_allclose, atol=1e-7)
        jax.tree.map(close, grads, results[0][1])


def test_initial_statistics_match_the_reference(tiny_config):
    import json

    recorded = json.loads(golden.FILE.with_name("init_data2vec_vision.json").read_text())
    c = recorded["config"]
    with tiny_config.unlocked():
        tiny_config.model.update({"width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 256})
        tiny_config.model.layer_scale = 1e-4
    assert (c["width"], c["depth"]) == (64, 4)
    from flax import linen as nn

    objective = data2vec.make(tiny_config)
    init = jax.vmap(lambda seed: nn.unbox(objective.init(jax.random.key(seed))[0]))
    ours = jax.jit(init)(jnp.arange(8))
    stats = {name: entry for name, entry in recorded["parameters"].items()}

    def filled(key):
        return golden.tree(lambda n: np.full(stats[n]["shape"], stats[n][key]), 4, 4)

    def check(path, x, std, low, high):
        by_layer = "blocks" in jax.tree_util.keystr(path)
        for i in range(x.shape[1] if by_layer else 1):
            values = np.asarray(x[:, i] if by_layer else x)
            s, lo, hi = (float(np.ravel(a[i] if by_layer else a)[0]) for a in (std, low, high))
            assert lo - 1e-3 <= values.min() and values.max() <= hi + 1e-3, path
            np.testing.assert_allclose(values.std(), s, rtol=0.12, atol=1e-7, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, ours, filled("std"), filled("min"), filled("max"))


def test_born_sharded_state_is_the_same_on_every_mesh(config):
    from bivl import train
    from bivl.core import state as states

    leaves = []
    for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        with config.unlocked():
            config.batch_size = 8
            config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
        devices = jax.devices()[: int(np.prod(sizes))]
        program = train.build(config, devices)
        with sharding.use(program.mesh):
            state = states.create(program.objective, program.tx, program.mesh, 3)
        leaves.append([np.asarray(x) for x in jax.tree.leaves(state)])
    for other in leaves[1:]:
        for a, b in zip(leaves[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
