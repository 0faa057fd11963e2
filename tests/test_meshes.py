"""Every objective on every kind of mesh: the same numbers, and no exchange that need not be.

Takes minutes, for each program is compiled for eight devices: `pytest -m meshes -n 2`.
"""

import functools
import math
from collections import Counter

import jax
import numpy as np
import pytest

import runs
from bivl import train
from bivl.core import collectives, hlo, sharding
from bivl.core import config as configs

pytestmark = [pytest.mark.meshes, pytest.mark.usefixtures("quick_compile")]
NAMES = tuple(runs.ALL)
STEPS = 10
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}
# Where an encoder may say how many heads it has: eight devices are to divide them.
HEADS = ("model", "model.text", "teacher.config.model", "teacher.config.teacher.config.model")
# What sees the whole batch at once has no micro-batches: but for that term, they are compared.
WHOLE = {"bivl": {"contrast.weight": "0"}}
REFUSED = ("contrastive", "clip", "align")
EXCHANGED = {"beit3_image": {"collective-permute"}}  # Mixup takes the batch in reverse order


@functools.cache
def losses(name: str, devices: int, changes: tuple = ()):
    """Losses and gradient norms [STEPS, 2] of an objective."""
    return runs.few_losses(devices, wide(name) | dict(changes), name, STEPS)[0]


def wide(name: str) -> dict[str, str]:
    """Eight heads wherever there are some."""
    known = configs.flatten(runs.tiny({}, name))
    return {f"{part}.num_heads": "8" for part in HEADS if f"{part}.num_heads" in known}


def assert_equal(name, changes, mesh, plain=()):
    """`changes` on a mesh give what `plain` gives on one device."""
    found = losses(name, math.prod(mesh), tuple((dict(changes) | runs.mesh(*mesh)).items()))
    expected = losses(name, 1, tuple(dict(plain).items()))
    assert len(set(expected[:, 0])) == STEPS
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_ten_updates_are_those_of_one_device(name, mesh):
    assert_equal(name, {}, mesh)


@pytest.mark.parametrize("name", NAMES)
def test_and_with_remat_and_gathering_by_layer(name):
    encoder = "model.text" if name == "align" else "model"
    assert_equal(name, {f"{encoder}.remat": "full", "mesh.gather": "layer"}, (2, 2, 2))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_and_with_micro_batches(name):
    changes = WHOLE.get(name, {}) | {"optimizer.accumulate": "2"}
    assert_equal(name, changes, (2, 2, 1), changes)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_gathered_once(name):
    """On 1 x 8 x 1 each array of the student and of the teacher; nothing of another kind than data
    parallelism has besides."""
    deep = {} if name == "align" else {"model.depth": "3"}
    config = runs.tiny(wide(name) | runs.mesh(1, 8, 1) | deep, name)
    program = train.build(config)
    with sharding.use(program.mesh):
        text = program.compile().as_text()
    found = collectives.find(hlo.parse(text), 8)
    kinds = {x.kind for x in found}
    allowed = {"all-gather", "all-reduce", "all-to-all"} | EXCHANGED.get(name, set())
    assert {"all-gather", "all-reduce"} <= kinds <= allowed
    state = program.abstract
    owners = Counter()
    for leaf in jax.tree.leaves((state.params, state.teacher)):
        if leaf.sharding.shard_shape(leaf.shape) != leaf.shape:
            owners[leaf.shape] += 1
            owners[leaf.shape[1:]] += leaf.shape[0]  # were it gathered by layers
    times = Counter()
    for x in found:
        if x.kind == "all-gather":
            times[x.dims] += x.times
    twice = {dims: n for dims, n in times.items() if dims in owners and n > owners[dims]}
    assert not twice
    assert sum(n for dims, n in times.items() if dims in owners) > 0
