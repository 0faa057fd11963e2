"""What the tests of data2vec on text and speech share: recorded numbers, configs and runs."""

import dataclasses
import functools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bivl.core import config as configs
from bivl.core import ema, optimizer
from bivl.core import step as steps
from bivl.core.state import State
from golden import sequence_files
from golden.sequence_trees import TREES

SIZES = {"width": 32, "depth": 3, "num_heads": 4, "mlp_dim": 64}
RATES = ("dropout", "attention_dropout", "activation_dropout", "layer_drop", "drop_path")
METRICS = ("loss", "grad_norm", "learning_rate", "ema_decay")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Ids without a vocabulary; by default those of the recorded models."""

    size: int = 40
    mask: int = 39
    bos: int = 0
    pad: int = 1
    eos: int = 2
    unk: int = 3
    kind: str = "lent"

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


def whole_teacher(name: str) -> dict:
    """The recorded teacher with all that it uses, its copies of the student's parts too."""
    return jax.tree.map(jnp.asarray, tree(name, "teacher_param", "param"))


def models(name: str, objective) -> tuple[dict, dict]:
    """Recorded student, and of the recorded teacher what the objective's teacher has."""
    params = jax.tree.map(jnp.asarray, tree(name, "param"))
    shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))

    def pick(part, like):
        return {key: pick(part[key], like[key]) for key in like} if isinstance(like, dict) else part

    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes[0])
    return params, pick(whole_teacher(name), shapes[1])


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


class Run(NamedTuple):
    """What a model made of a batch: embedding, encoder, and {module of the embedding, by its path:
    (its first argument, its output)}."""

    tokens: Any
    encoded: Any
    seen: dict


def observed(model, params, batch, masked: bool) -> Run:
    """One run of a model's encoder, every layer and every part of the embedding kept."""
    seen = {}

    def watch(call, args, kwargs, context):
        out, path = call(*args, **kwargs), "/".join(context.module.path)
        if context.method_name == "__call__" and path.startswith("embed/"):
            seen[path] = (args[0] if args else None, out)
        return out

    options = {"collect": ("layers", "ffn"), "method": "encode"}
    with nn.intercept_methods(watch):
        return Run(*model.apply({"params": params}, batch, masked, **options), seen)


def forward(objective, model, models, batch, shown=lambda batch: batch, noise=(None,)):
    """All that is recorded of a forward pass, from one program; a list, one for each of `noise`.

    `student` and `teacher` are Runs, `targets` and `loss` the objective's, `output` the model's.
    `shown`: batch -> what the teacher sees. `noise`: arrays [B M, L, D] for the masked places.
    """

    def run(params, teacher, batch, noise):
        key, rngs = jax.random.key(0), {"dropout": jax.random.key(0)}
        batch = objective.prepare(batch)
        with mock.patch.object(jax.random, "normal", lambda key, shape: noise):
            targets = objective.targets(params, teacher, {}, batch, key)
            loss, aux = objective.loss(params, {}, batch, targets, key)
            output = model.apply({"params": params}, batch, rngs=rngs)
        stds = {name: aux["metrics"][name] for name in ("target_std", "prediction_std")}
        return {
            "student": observed(model, params, batch, True),
            "teacher": observed(model, ema.completed(teacher, params), shown(batch), False),
            "output": output,
            "targets": targets["values"],
            "loss": loss,
            "weight": aux["weight"],
        } | stds

    compiled = jax.jit(run)
    return [compiled(*models, batch, x) for x in noise]


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (updates,) * 2)


def take_steps(config, objective, models, batch, updates: int):
    """Two full steps from a fresh optimizer -> ([state, metrics] after each), gradient first."""
    schedule = optimizer.make_schedule(config.optimizer, updates)
    tx = optax.chain(keep_gradients(), optimizer.make_optimizer(config.optimizer, schedule))
    options = {"objective": objective, "tx": tx, "schedule": schedule, "seed": 0}

    @jax.jit
    def step(state, batch, n):  # other metrics would only be compiled
        state, metrics = steps.train_step(state, batch, n, accumulate=1, **options)
        return state, {name: metrics[name] for name in METRICS}

    state, history = State(jnp.int32(0), *models, {}, tx.init(models[0])), []
    for n in range(2):
        state, metrics = step(state, batch, n + 1)
        history.append((state, metrics))
    return history


def initial(objective) -> dict:
    """Fresh parameters."""
    params = jax.jit(lambda key: nn.unbox(objective.init(key)[0]))(jax.random.key(0, impl="rbg"))
    return jax.tree.map(np.asarray, params)
