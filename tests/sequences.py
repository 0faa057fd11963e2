"""What the tests of data2vec on text and speech share: recorded numbers, runs and comparisons."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.core import config as configs
from bivl.core import ema, optimizer
from bivl.core import step as steps
from bivl.core.state import State
from golden import sequence_files
from golden.sequence_trees import TREES

SIZES = {"width": 32, "depth": 3, "num_heads": 4, "mlp_dim": 64}
RATES = ("dropout", "attention_dropout", "activation_dropout", "layer_drop", "drop_path")
EXACT = 1e-5  # float32 against the recorded float64, on numbers about 1
TARGETS = 2.5e-5  # recorded activations are multiples of 2^-18, and targets divide by their spread
KEY_BIASES = 2e-4  # after steps: their gradients are rounding noise, which Adam makes steps of


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Ids without a vocabulary; by default those of the recorded models."""

    size: int = 40
    mask: int = 39
    bos: int = 0
    pad: int = 1
    eos: int = 2
    unk: int = 3

    @property
    def special(self):
        return self.bos, self.pad, self.eos, self.unk, self.mask


@functools.cache
def load(name: str) -> dict:
    """The arrays of tests/golden/NAME.npz."""
    return sequence_files.load(name)


def tree(name: str, group: str, fallback: str = "") -> dict:
    """A recorded group of parameters as our tree; what the group lacks is the fallback's."""
    arrays = load(name)

    def get(parameter):
        key = f"{group}/{parameter}"
        return arrays[key if key in arrays else f"{fallback}/{parameter}"]

    return TREES[name](get)


def models(name: str, objective) -> tuple[dict, dict]:
    """Recorded student, and of the recorded teacher what the objective's teacher has."""
    params = jax.tree.map(jnp.asarray, tree(name, "param"))
    whole = jax.tree.map(jnp.asarray, tree(name, "teacher_param", "param"))
    shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))

    def pick(part, like):
        return {key: pick(part[key], like[key]) for key in like} if isinstance(like, dict) else part

    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes[0])
    return params, pick(whole, shapes[1])


def recorded_config(spec: str, **changes):
    """A shipped config (`file:options`) at the recorded sizes, without any dropout.

    `changes`: dotted keys, `__` for the dots.
    """
    config = configs.load(f"configs/pretrain/{spec}")
    with config.unlocked():
        config.batch_size, config.top_k_layers = 2, 2
        config.model.update(SIZES | dict.fromkeys(RATES, 0.0) | {"scan": True})
        for name, value in changes.items():
            *groups, last = name.split("__")
            node = functools.reduce(lambda node, key: node[key], groups, config)
            node[last] = value
        config.ema_decay_start, config.ema_decay_end, config.ema_anneal_steps = 0.5, 0.875, 4
    return config


def observed(model, params, batch, masked: bool):
    """One run of a model's encoder: (Tokens, Encoded, {module: (its first argument, output)}).

    Modules are those of the embedding, by their paths.
    """

    def run(params):
        seen = {}

        def watch(call, args, kwargs, context):
            out, path = call(*args, **kwargs), "/".join(context.module.path)
            if context.method_name == "__call__" and path.startswith("embed/"):
                seen[path] = (args[0] if args else None, out)
            return out

        options = {"collect": ("layers", "ffn"), "method": "encode"}
        with nn.intercept_methods(watch):
            return *model.apply({"params": params}, batch, masked, **options), seen

    return jax.jit(run)(params)


def assert_layers(encoded, arrays, name: str) -> None:
    """Input of block 0, every block's output and every FFN's are the recorded ones."""
    for part in ("layers", "ffn"):
        got = np.stack(getattr(encoded, part))
        np.testing.assert_allclose(got, arrays[f"{name}/{part}"], atol=EXACT, err_msg=part)


def by_layer(tree) -> dict:
    """A tree -> {path: array}, with stacked layers apart."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(key.key for key in path)
        if "blocks" in name:
            flat |= {f"{name}/{i}": np.asarray(part) for i, part in enumerate(leaf)}
        else:
            flat[name] = np.asarray(leaf)
    return flat


def assert_gradients(got, wanted, share: float = 1e-3) -> None:
    """Every parameter's within `share` of the recorded one's largest element."""
    got, wanted = by_layer(got), by_layer(wanted)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        atol = max(share * np.abs(value).max(), 1e-7)
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol, err_msg=name)


def assert_parameters(got, wanted, loose: dict | None = None) -> None:
    """After steps; places that were not recorded (NaN) are left out.

    `loose`: parts of paths -> their own tolerance.
    """
    loose = {"k_bias": KEY_BIASES} | (loose or {})
    got, wanted = by_layer(got), by_layer(wanted)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        there = np.isfinite(value)
        assert there.any()
        atol = next((atol for part, atol in loose.items() if part in name), EXACT)
        np.testing.assert_allclose(
            got[name][there], value[there], rtol=0, atol=atol, err_msg=name
        )


def take_steps(config, objective, params, teacher, batch, updates: int, count: int = 2):
    """`count` full steps from a fresh optimizer -> (final state, metrics of each)."""
    schedule = optimizer.make_schedule(config.optimizer, updates)
    tx = optimizer.make_optimizer(config.optimizer, schedule)
    options = {"objective": objective, "tx": tx, "schedule": schedule, "seed": 0}
    step = jax.jit(functools.partial(steps.train_step, accumulate=1, **options))
    state, history = State(jnp.int32(0), params, teacher, {}, tx.init(params)), []
    for n in range(count):
        state, metrics = step(state, batch, n + 1)
        history.append(metrics)
    return state, history


def assert_steps(name: str, loss: str, result, loose: dict | None = None, rtol=2e-5) -> None:
    """Numbers of both recorded steps, and with them both models where `loss` is the first one."""
    arrays, (state, history) = load(name), result
    wanted = {"loss": arrays[f"step/{loss}/loss"], "grad_norm": arrays[f"step/{loss}/grad_norm"]}
    wanted |= {key: arrays[f"step/{key}"] for key in ("learning_rate", "ema_decay")}
    for key, values in wanted.items():
        got = [metrics[key] for metrics in history]
        np.testing.assert_allclose(got, values, rtol=rtol, err_msg=key)
    assert_parameters(state.params, tree(name, "step2/param"), loose)
    whole = ema.completed(state.teacher, state.params)
    wanted = tree(name, "step2/teacher_param", "step2/param")
    assert_parameters(whole, wanted, loose)
