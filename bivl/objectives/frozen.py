"""Frozen models that give an objective its targets: a teacher of VQ-KD, a visual tokenizer.

`config.teacher` is {checkpoint, random, config}: where the parameters lie, whether random ones
shall do instead (smoke runs), and the whole saved config of that checkpoint. A converted checkpoint
has no teacher at hand: `outputs` is then how many classes, or features a patch, it was trained to.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.config import choice, from_dict
from bivl.core.errors import UserError
from bivl.core.objective import PyTree
from bivl.modalities import image


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Another objective, of which only what it can tell is of use."""

    config: Any
    """The config it was trained with; computes in our `teacher_dtype` where we have one."""
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    """key -> params, extras; leaves may be boxed with their logical axes."""
    predict: Mapping[str, Callable]
    """Names to functions of (params, extras, batch)."""
    checkpoints: Mapping[str, str]
    """An objective's `frozen`: where the run finds what it loads as `teacher`."""
    outputs: int = 0
    """Where it is absent: its classes, or features a patch."""

    def state(self, key) -> dict:
        """What an objective keeps as `teacher`: {"teacher": {params, extras}}."""
        return {"teacher": dict(zip(("params", "extras"), self.init(key), strict=True))}

    def tell(self, name: str, teacher, batch):
        """predict[name] of a batch, from what `state` made."""
        held = teacher["teacher"]
        return self.predict[name](held["params"], held["extras"], batch)

    def shape(self, name: str, batch):
        """Shapes of `tell`, from those of the batch; nothing is computed."""
        return jax.eval_shape(
            lambda b: self.tell(name, nn.unbox(self.state(jax.random.key(0))), b), batch
        )


def open(config, what: str = "a pre-trained model", needs: str = "") -> Frozen:
    """The objective that `config.teacher` names. `what` it should be, for messages; `needs`: the
    predict function that it must have.

    UserError where no checkpoint is named, its config is missing, or it cannot serve.
    """
    teacher = config.teacher
    if not (teacher.checkpoint or teacher.random):
        if teacher.get("outputs", 0) and not config.steps:
            return Frozen(config, lambda key: ({}, {}), {}, {}, teacher.outputs)
        raise UserError(
            f"config.teacher.checkpoint is empty; name a checkpoint of {what}, or set "
            "config.teacher.random=True to try without one"
        )
    if not len(teacher.config):
        raise UserError(
            "config.teacher.config is empty; name a checkpoint of "
            f"{what} in config.teacher.checkpoint, which has one"
        )
    theirs = from_dict(teacher.config.to_dict())
    if "teacher_dtype" in config:
        theirs.dtype = config.teacher_dtype
    objective = _module(theirs.objective).make(theirs)
    if needs and needs not in objective.predict:
        raise UserError(
            f"config.teacher.checkpoint is one of {theirs.objective!r}, which has no {needs!r}; "
            f"name a checkpoint of {what}"
        )

    def init(key):
        params, _, extras = objective.init(key)
        return params, extras

    checkpoints = {} if teacher.random else {"teacher": teacher.checkpoint}
    return Frozen(theirs, init, objective.predict, checkpoints)


def _module(name: str):
    """The module of bivl/objectives/ that a saved config names; UserError for any other name."""

    def load(stem):
        return importlib.import_module(f"bivl.objectives.{stem}")

    names = [file.stem for file in Path(__file__).parent.glob("[!_]*.py")]
    if name not in names or not hasattr(load(name), "make"):
        known = [stem for stem in names if hasattr(load(stem), "make")]
        choice("teacher.config.objective", name, known)
    return load(name)


def check_grid(frozen: Frozen, config) -> None:
    """UserError unless the frozen model cuts its images into as many patches as ours."""
    ours, theirs = image.grid(config), image.grid(frozen.config)
    if ours != theirs:
        raise UserError(
            f"config.image_size={config.image_size} makes {ours} patches and the teacher's "
            f"{frozen.config.image_size} {theirs}; choose image_size or model.patch_size to match"
        )


def view(frozen: Frozen, images):
    """uint8 [B, S, S, 3] at the size that the frozen model sees, bicubic where that is another."""
    size = frozen.config.image_size
    if images.shape[1] == size:
        return images
    resized = jax.image.resize(images.astype(jnp.float32), (len(images), size, size, 3), "bicubic")
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
