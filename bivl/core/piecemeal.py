"""Checkpoints written and read array by array, for models that need not be in memory as a whole.

The folder is what `bivl.core.checkpoint` writes and reads.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from bivl.core import checkpoint

CHUNK = 2**24  # bytes of a file on disk, and of what is compressed at a time


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that is made, or read from its file, whenever `read` is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Orbax's writer of NumPy arrays, given one at a time: the next is made when one is on disk."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [None] * len(infos), strict=True):
            for written in await super().serialize([value.read()], [info], arg and [arg]):
                written.result()
        return []


def save(step_dir: Path, state, config) -> None:
    """Writes a step's folder: a tree of `Deferred` and a config.

    In memory is one array and what is being compressed of it. Whatever a `read` raises is passed
    on; nothing is at `step_dir` then.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Deferred, _OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns without one
    )
    arrays = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=CHUNK),
        config=ocp.args.JsonSave(config.to_dict()),
    )
    parts = {"state": arrays, "config": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**parts)) as saver:
        saver.save(step_dir, args=args)


def stored(step_dir: Path, path: str, shape: tuple[int, ...]) -> Deferred:
    """The float32 array at `path` of a saved state; UserError from `read` if it is damaged."""
    dtype = np.dtype(np.float32)

    def read() -> np.ndarray:
        wanted = jax.ShapeDtypeStruct(shape, dtype)
        for key in reversed(path.split("/")):
            wanted = {key: wanted}
        found = checkpoint.restore_part(step_dir, wanted)
        for key in path.split("/"):
            found = found[key]
        return np.asarray(found)

    return Deferred(shape, dtype, read)
