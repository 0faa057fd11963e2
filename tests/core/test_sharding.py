"""Meshes, rules, and the way of a batch from one process's rows to global arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from bivl.core import sharding
from bivl.core.errors import UserError


def mesh(data=-1, fsdp=1, tensor=1, devices=None):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 2, -1), (1, 2, 4)),
        ((4, 2, 1), (4, 2, 1)),
        ((-1, 8, 1), (1, 8, 1)),
    ],
)
def test_mesh_sizes(sizes, shape):
    assert tuple(mesh(*sizes).shape.values()) == shape


def test_mesh_of_some_devices():
    assert mesh(devices=jax.devices()[:2]).shape["data"] == 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((-1, -1, 1), "at most one -1"),
        ((0, 1, 1), "must be positive"),
        ((-2, 1, 1), "must be positive"),
        ((3, 1, 1), "needs 3 devices but there are 8; set config.mesh.data=-1"),
        ((-1, 3, 1), "needs 6 devices but there are 8"),
        ((-1, 16, 1), "needs 16 devices but there are 8"),
    ],
)
def test_impossible_meshes_are_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        mesh(*sizes)


class Chip:
    """A chip of v5e slices of 2 x 2, as its driver describes it."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4
        self.coords = (number % 2, number // 2 % 2, 0)


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2), (4, 1, 2), (4, 2, 1), (8, 1, 1)])
def test_only_data_goes_over_slices(shape):
    chips = [Chip(n) for n in (5, 0, 3, 6, 1, 7, 2, 4)]
    placed = sharding.arrange(shape, chips)
    assert placed.shape == shape and set(placed.flat) == set(chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(placed)
    halves = np.split(slices, 2)
    assert [set(half.flat) for half in halves] == [{0}, {1}]


def test_slices_that_data_cannot_span_are_refused():
    with pytest.raises(UserError, match="data=1 is not a multiple of the 2 slices"):
        sharding.arrange((1, 8, 1), [Chip(n) for n in range(8)])


def test_resolve():
    m = mesh(2, 2, 2)
    resolve = lambda axes, shape: sharding.resolve(axes, shape, m, "w")  # noqa: E731
    assert resolve(("embed", "mlp"), (8, 6)) == PartitionSpec("fsdp", "tensor")
    assert resolve(("batch", "length"), (8, 3)) == PartitionSpec(("data", "fsdp"))
    assert resolve((None, "heads", None), (3, 4, 5)) == PartitionSpec(None, "tensor")
    assert resolve(("layers", None), (3, 5)) == PartitionSpec()
    assert resolve(("unheard of",), (3,)) == PartitionSpec()


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [
        (("mlp", "heads"), (4, 4), r"trunk/w: axes \('mlp', 'heads'\) claim mesh axis .*tensor"),
        (("batch", "embed"), (4, 4), "trunk/w: axes .* claim mesh axis .*fsdp"),
        (("embed", "mlp"), (4, 3), "trunk/w: axis 'mlp' of size 3 .* 2 devices; .*mesh.tensor"),
        (("batch",), (6,), "trunk/w: axis 'batch' of size 6 .* 4 devices"),
    ],
)
def test_what_cannot_be_divided_is_named(axes, shape, words):
    with pytest.raises(UserError, match=words):
        sharding.resolve(axes, shape, mesh(2, 2, 2), "trunk/w")


def boxed(shape, axes):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)


def test_tree_shardings_and_their_table():
    params = {"a": boxed((4, 8), ("embed", "mlp")), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    found = sharding.tree_shardings((params, {}, {}), mesh(1, 2, 4))
    assert found[0]["a"].spec == PartitionSpec("fsdp", "tensor") and found[1:] == ({}, {})
    assert found[0]["b"].spec == PartitionSpec()
    text = sharding.table(found, (nn.unbox(params), {}, {}))
    line = next(line for line in text.splitlines() if "fsdp" in line)
    assert line.split()[-3:] == ["1", "32", "0.00"]
    with pytest.raises(UserError, match="^teacher/w: axis 'mlp'"):
        sharding.tree_shardings(({}, {"w": boxed((3,), ("mlp",))}, {}), mesh(1, 2, 4))


@pytest.mark.parametrize(
    ("size", "accumulate", "words"),
    [
        (12, 1, "config.batch_size=12 is not a multiple of 8 .*; use 16"),
        (9, 1, "use 8"),
        (3, 1, "use 8"),
        (8, 2, "multiple of 16 .*; use 16"),
        (0, 1, "use 8"),
        (8, 0, "config.optimizer.accumulate=0"),
    ],
)
def test_indivisible_batches_are_refused(size, accumulate, words):
    with pytest.raises(UserError, match=words):
        sharding.check_batch(size, accumulate, mesh(4, 2, 1))


def test_divisible_batches_pass():
    m = mesh(2, 2, 2)  # tensor devices share their examples
    sharding.check_batch(4, 1, m)
    sharding.check_batch(8, 2, m)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 1, 4)])
def test_one_process_loads_every_row(sizes):
    assert sharding.local_rows(16, mesh(*sizes)) == list(range(16))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_a_batch_goes_round(sizes):
    m = mesh(*sizes)
    batch = {"x": np.arange(48.0).reshape(16, 3), "y": np.arange(16)}
    placed = sharding.to_global(batch, m, 16)
    parts = sizes[0] * sizes[1]
    assert placed["x"].sharding.shard_shape((16, 3)) == (16 // parts, 3)
    assert len(placed["x"].addressable_shards) == 8
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)


def test_within_use_models_resolve_their_axes():
    m = mesh(2, 2, 2)
    with sharding.use(m):
        f = jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", None)))
        found = f(jnp.ones((8, 2)))
    assert found.sharding.spec == PartitionSpec(("data", "fsdp"))
