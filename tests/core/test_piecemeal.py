"""Checkpoints written array by array are what others are, and few arrays are ever in memory."""

import functools
import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bivl.core import checkpoint, piecemeal
from bivl.core import config as configs
from bivl.core.errors import UserError

CONFIG = configs.from_dict(
    {key: {} for key in ("model", "data", "mesh", "eval")} | {"objective": "tiny", "modality": "x"}
)
SHAPES = {"deep": {"kernel": (6, 3, 5), "bias": (6, 5)}, "scale": (), "bias": (7,)}
DTYPE = np.dtype(np.float32)


def is_shape(x):
    return isinstance(x, tuple)


def values():
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda s: rng.standard_normal(s).astype("f"), SHAPES, is_leaf=is_shape)
    return {"params": made, "extras": {}, "teacher": {"bias": made["bias"] + 1}}


def deferred(tree):
    return jax.tree.map(lambda x: piecemeal.Deferred(x.shape, x.dtype, x.copy), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run, as convert makes it."""
    workdir = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecemeal, "CHUNK", 100)  # several chunks an array
        piecemeal.save(workdir / "checkpoints" / "0", deferred(values()), CONFIG)
    return workdir


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_it_is_a_checkpoint_as_any_other(saved):
    step_dir = checkpoint.find(saved)
    assert step_dir == saved / "checkpoints" / "0" and checkpoint.is_whole(step_dir)
    assert checkpoint.read_config(step_dir) == CONFIG
    wanted = values()
    assert checkpoint.saved_shapes(step_dir)["params/deep/kernel"] == (6, 3, 5)
    checkpoint.check_shapes(step_dir, wanted, "")
    devices = jax.sharding.NamedSharding(
        jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), jax.sharding.PartitionSpec("x")
    )
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    places = {(6, 3, 5): devices}

    def abstract(x):
        sharding = places.get(x.shape, alone)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    part = {"params": jax.tree.map(abstract, wanted["params"])}
    found = checkpoint.restore_part(step_dir, part)
    same(found, {"params": wanted["params"]})
    assert found["params"]["deep"]["kernel"].sharding == devices


def test_orbax_restores_it_with_and_without_a_target(saved):
    wanted = values()
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    with ocp.CheckpointManager(saved / "checkpoints") as manager:
        assert manager.latest_step() == 0
        for args in (ocp.args.StandardRestore(target), ocp.args.StandardRestore()):
            same(manager.restore(0, args=ocp.args.Composite(state=args)).state, wanted)


def test_one_array_is_read(saved):
    wanted = values()["params"]["deep"]["kernel"]
    kernel = piecemeal.stored(checkpoint.find(saved), "params/deep/kernel", wanted.shape)
    assert kernel.shape == wanted.shape and kernel.dtype == wanted.dtype
    np.testing.assert_array_equal(kernel.read(), wanted)


def test_an_array_is_gone_before_the_next_is_made(tmp_path):
    made = []

    def read(n):
        alive = [ref for ref in made if ref() is not None]
        assert not alive, f"{len(alive)} of {len(made)} arrays are still in memory"
        x = np.full((5, 4), n, np.float32)
        made.append(weakref.ref(x))
        return x

    arrays = {
        f"a{n}": piecemeal.Deferred((5, 4), DTYPE, functools.partial(read, n)) for n in range(5)
    }
    piecemeal.save(tmp_path / "0", {"params": arrays}, CONFIG)
    assert len(made) == len(arrays)  # and each is made once


def test_what_goes_wrong_while_an_array_is_made_is_passed_on(tmp_path):
    def read():
        raise UserError("torn; get it again")

    whole = deferred(values()["params"]["deep"])
    tree = {"params": whole | {"torn": piecemeal.Deferred((2,), DTYPE, read)}}
    with pytest.raises(UserError, match="^torn; get it again$"):
        piecemeal.save(tmp_path / "0", tree, CONFIG)
    assert not (tmp_path / "0").exists()
