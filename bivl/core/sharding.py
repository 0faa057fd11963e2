"""Where arrays live: the mesh, one table of rules from logical axes to mesh axes, and batches.

Data parallelism, FSDP and tensor parallelism are sizes of the mesh, never code paths.
"""

import contextlib
import math

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bivl.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
GATHER = ("update", "layer")  # when what is divided over fsdp is made whole, see core/step.py

# Logical axis (written by models/layers.py) -> mesh axis. Axes that are not named stay whole.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("layers", None),
    ("length", None),
    ("act_embed", None),
)


def make_mesh(sizes, devices=None) -> Mesh:
    """Mesh with axes data, fsdp, tensor. `sizes` maps them to ints; one may be -1 (the rest).

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes[axis]) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh sizes {dict(sizes)} must be positive, with at most one -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // -math.prod(shape), 1)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices but "
            f"there are {len(devices)}; set config.mesh.data=-1 to use what is left"
        )
    return Mesh(arrange(tuple(shape), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: tuple[int, int, int], devices) -> np.ndarray:
    """Devices [data, fsdp, tensor], neighbours in a mesh axis near each other in the machine.

    TPU slices are joined by the data centre's network, a tenth as fast as the links within one or
    less: `data` alone goes over them. UserError where it cannot.
    """
    slices = (
        len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    )
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, **options)
    if shape[0] % slices:
        raise UserError(
            f"config.mesh.data={shape[0]} is not a multiple of the {slices} slices, which only "
            "data goes over; set it so"
        )
    inside = shape[0] // slices, *shape[1:]
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), **options)


def resolve(axes: tuple, shape: tuple, mesh: Mesh, name: str) -> PartitionSpec:
    """Logical axes of one array -> PartitionSpec.

    flax drops a rule in silence when two axes of one array claim the same mesh axis, and jit fails
    far away when a size does not divide; both are a UserError here that names the parameter.
    """
    table, spec, used = dict(RULES), [], set()
    for axis, size in zip(axes, shape, strict=True):
        target = table.get(axis) if axis else None
        names = (target,) if isinstance(target, str) else tuple(target or ())
        if used & set(names):
            raise UserError(f"{name}: axes {axes} claim mesh axis {names} twice; rename one axis")
        used |= set(names)
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            raise UserError(
                f"{name}: axis {axis!r} of size {size} cannot be divided over {parts} devices; "
                f"change config.mesh.{names[-1]} or the size"
            )
        spec.append(target)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def tree_shardings(parts: tuple, mesh: Mesh) -> tuple:
    """Boxed abstract (params, teacher, extras) -> the same trees, unboxed, of NamedShardings."""

    def leaf(path, value):
        if isinstance(value, nn.LogicallyPartitioned):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            spec = resolve(value.names, value.value.shape, mesh, name)
            return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    named = dict(zip(("params", "teacher", "extras"), parts, strict=True))  # names for messages
    placed = jax.tree_util.tree_map_with_path(leaf, named, is_leaf=is_box)
    return tuple(placed[name] for name in named)


def gathered(sharding: NamedSharding) -> NamedSharding:
    """The same, with nothing divided over fsdp."""
    spec = (None if names == "fsdp" else names for names in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def table(shardings, abstract) -> str:
    """The resolved table: one line a distinct (sharding) with its count and bytes per device."""
    groups: dict[str, list] = {}
    for sharding, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(abstract), strict=True):
        shape = sharding.shard_shape(leaf.shape)
        group = groups.setdefault(str(sharding.spec), [0, 0, 0])
        group[0] += 1
        group[1] += math.prod(leaf.shape)
        group[2] += math.prod(shape) * leaf.dtype.itemsize
    rows = [f"{'sharding':40} {'arrays':>7} {'values':>14} {'MB/device':>10}"]
    rows += [f"{k:40} {n:7} {v:14,} {b / 1e6:10.2f}" for k, (n, v, b) in sorted(groups.items())]
    return "\n".join(rows)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """UserError unless every device gets the same whole number of examples in each micro-batch."""
    if accumulate < 1:
        raise UserError(f"config.optimizer.accumulate={accumulate} must be at least 1")
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"config.batch_size={batch_size} is not a multiple of {parts} (mesh.data x mesh.fsdp x "
            f"optimizer.accumulate); use {max(1, round(batch_size / parts)) * parts}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Rows of the global batch that this process must load (all of them when it holds all).

    Often they are several pieces: a mesh follows the torus, where the chips of one host are a
    square and not a line.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    pieces = {index[0].indices(batch_size) for index in indices.values()}
    return [row for piece in sorted(pieces) for row in range(*piece)]


def to_global(batch, mesh: Mesh, batch_size):
    """This process's rows (dict of numpy arrays) -> global arrays sharded over data and fsdp.

    batch_size: rows of the global batch, or of each part {name: rows} of {name: batch}.
    """
    if not isinstance(batch_size, int):
        return {name: to_global(batch[name], mesh, size) for name, size in batch_size.items()}
    sharding, rows = batch_sharding(mesh), local_rows(batch_size, mesh)

    def leaf(x):
        def piece(index):
            start, stop, _ = index[0].indices(batch_size)
            first = rows.index(start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *np.shape(x)[1:]), sharding, piece)

    return jax.tree.map(leaf, batch)


@contextlib.contextmanager
def use(mesh: Mesh):
    """Within it, models resolve their logical axes on `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield
