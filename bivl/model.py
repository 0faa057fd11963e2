"""`bivl.load`: a trained model for notebooks and other people's code."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core import checkpoint, sharding
from bivl.core.errors import UserError
from bivl.core.objective import Objective


def make_objective(config) -> Objective:
    """The objective module that `config.objective` names, made."""
    for kind in ("objective", "modality"):
        if not str(config.get(kind, "")).isidentifier():
            raise UserError(f"config.{kind}={config.get(kind)!r} is not a module name")
        package = "objectives" if kind == "objective" else "modalities"
        if importlib.util.find_spec(f"bivl.{package}.{config[kind]}") is None:
            raise UserError(
                f"config.{kind}={config[kind]!r}: there is no bivl/{package}/ file of it"
            )
    return importlib.import_module(f"bivl.objectives.{config.objective}").make(config)


def restore(step_dir, config, devices=None):
    """A step's folder -> objective, mesh, params, extras; the optimizer and teacher stay on disk."""
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

        With `layers`, also `layers`: depth + 1 arrays [B, L, D], the input of block 0 and the output
        of every block, before the final norm.
        """
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

    Computes in `dtype`, on the first device. Raises UserError where there is no readable checkpoint.
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
    return Model(config, params, objective.preprocess, predict)
