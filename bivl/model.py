"""`bivl.load`: a trained model for notebooks and other people's code."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core import checkpoint, sharding
from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective

DTYPES = ("float32", "bfloat16", "float16")  # what layers may compute in


def module(key: str, name: str, package: str, function: str = "make"):
    """The module of bivl/PACKAGE/ that config.KEY names; UserError for any other name.

    Such modules are told from their helpers by what every one of them has: the named function.
    """
    stems = [file.stem for file in (Path(__file__).parent / package).glob("[!_]*.py")]

    def load(stem):
        return importlib.import_module(f"bivl.{package}.{stem}")

    if name not in stems or not hasattr(load(name), function):
        choice(key, name, [stem for stem in stems if hasattr(load(stem), function)])
    return load(name)


def read_teacher(config) -> None:
    """Writes the config of the checkpoint that `config.teacher` names, if any, into
    `config.teacher.config`, so that our own checkpoints say all that they need."""
    teacher = config.get("teacher")
    if teacher and teacher.checkpoint and not teacher.config:
        theirs = checkpoint.read_config(checkpoint.find(teacher.checkpoint))
        with config.unlocked():
            teacher.config = theirs


def make_objective(config) -> Objective:
    """The objective module that `config.objective` names, made."""
    module("modality", config.modality, "modalities", "make_embed")
    for key in ("dtype", "teacher_dtype"):
        if key in config:
            choice(key, config[key], DTYPES)
    return module("objective", config.objective, "objectives").make(config)


def restore(step_dir, config, devices=None):
    """A step's folder -> objective, mesh, params, extras; optimizer and teacher stay on disk."""
    objective = make_objective(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    boxed = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    params, _, extras = sharding.tree_shardings(boxed, mesh)
    shapes, _, extra_shapes = nn.unbox(boxed)
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        {"params": shapes, "extras": extra_shapes},
        {"params": params, "extras": extras},
    )
    checkpoint.check_shapes(step_dir, wanted, "")
    wanted = {name: tree for name, tree in wanted.items() if jax.tree.leaves(tree)}
    state = checkpoint.restore_part(step_dir, wanted)
    return objective, mesh, state["params"], state.get("extras", {})


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint ready to use; all functions take and give batches of any size."""

    config: Any
    params: Any
    preprocess: Callable[..., dict]
    """image=[...] (uint8 HWC arrays, PIL images or paths), ... -> numpy batch."""
    predict: Mapping[str, Callable[[Mapping], Any]]
    """Names to jitted functions of a batch: `features`, `encode`, ... as the objective has them."""

    def encode(self, batch, layers: bool = False) -> dict:
        """batch -> {tokens [B, L, D] after the final norm, special tokens included; pooled [B, D]}.

        With `layers`, also `layers`: depth + 1 arrays [B, L, D], the input of block 0 and the
        output of every block, before the final norm.
        """
        counts = {name: len(batch[name]) for name in ("image", "tokens") if name in batch}
        if len(set(counts.values())) > 1:
            raise UserError(
                f"encode reads each image with its text, but got {counts['image']} images and "
                f"{counts['tokens']} texts; pass as many of each, or one kind a call"
            )
        out = dict(self.predict["encode"](batch))
        if not layers:
            del out["layers"]
        return out

    def embed(self, batch) -> jax.Array:
        """batch -> unit vectors [B, E]: the projection of a dual encoder, else `pooled`."""
        if "embeddings" in self.predict:
            return self.predict["embeddings"](batch)
        pooled = self.encode(batch)["pooled"].astype(jnp.float32)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def load(directory, step: int | None = None, dtype: str = "float32") -> Model:
    """Loads a workdir, its `checkpoints/`, or one step's folder, saved on any device count.

    Computes in `dtype`, on the first device. UserError where there is no readable checkpoint.
    """
    step_dir = checkpoint.find(directory, step)
    config = checkpoint.read_config(step_dir)
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1})
    config.dtype = dtype
    devices = jax.local_devices()[:1]
    objective, _, params, extras = restore(step_dir, config, devices)

    def bound(function):
        compiled = jax.jit(function)
        return lambda batch: compiled(params, extras, batch)

    predict = {name: bound(function) for name, function in objective.predict.items()}
    return Model(config, params, _named(objective.preprocess), predict)


def _named(preprocess: Callable[..., dict]) -> Callable[..., dict]:
    """`preprocess` with a UserError for inputs that this model does not take."""
    signature = inspect.signature(preprocess)
    takes = ", ".join(f"{name}=[...]" for name in signature.parameters)

    def ops(*args, **kwargs):
        if unknown := [name for name in kwargs if name not in signature.parameters]:
            raise UserError(f"preprocess got {unknown[0]}, but this model takes {takes}")
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"preprocess: {error}; this model takes {takes}") from error
        return preprocess(*given.args, **given.kwargs)

    return ops
