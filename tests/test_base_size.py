"""The image-text configs at base size: how meshes divide the state, and that the step lowers there.

Nothing is allocated or compiled.
"""

import functools

import jax
import numpy as np
import pytest

import sequences
from bivl import train
from bivl.core import config as configs
from bivl.core import sharding
from bivl.core.errors import UserError
from bivl.data import tokenizers

SPECS = {name: f"configs/pretrain/{name}.py:size=base" for name in ("bivl", "beit3")}
PARAMETERS = {"bivl": 274_342_923, "beit3": 276_510_730}
MESHES = {"fsdp": (1, 8, 1), "tensor": (2, 1, 4), "all": (2, 2, 2)}
LARGE = 2**18  # values that every device may hold for itself
SPARED = {"embed/words/table", "heads/mlm_head/kernel"}  # of 64,010 words
SPARED |= {"embed/patch/projection/kernel", "embed/text_positions/value"}
UNDIVIDED = {  # large arrays without an axis for mesh.tensor
    "bivl": SPARED
    | {"heads/vision_head/kernel", "heads/language_head/kernel"}
    | {"heads/image_regression/projection/kernel"},
    "beit3": SPARED | {"heads/mim_head/kernel"},
}


def build(name, shape):
    """The program of a base size on a mesh; the tokenizer's file is not ours to ship."""
    real = tokenizers.load
    lent = sequences.Tokenizer(size=64_002, mask=64_001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "load", lambda c: lent if c.kind == "xlmr" else real(c))
        config = configs.load(SPECS[name])
        if name == "beit3":
            features = configs.load("configs/pretrain/data2vec_image.py:size=base")
            codes = configs.load("configs/pretrain/vqkd.py:size=base")
            for made, teacher in ((codes, features), (config, codes)):
                with made.unlocked():
                    made.teacher.random, made.teacher.config = True, teacher.to_dict()
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
        return train.build(config)


program = functools.lru_cache(None)(build)


def leaves(tree):
    """{path: leaf}."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}


def held(leaf):
    """Values of an array that one device holds."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape)))


@pytest.mark.parametrize("name", SPECS)
def test_fsdp_leaves_no_large_array_whole(name):
    state = leaves(program(name, MESHES["fsdp"]).abstract)
    params = [leaf for path, leaf in state.items() if path.startswith("params/")]
    assert sum(leaf.size for leaf in params) == PARAMETERS[name]
    whole = {path for path, leaf in state.items() if held(leaf) == leaf.size > LARGE}
    assert not whole
    total = sum(leaf.size for leaf in state.values())
    assert sum(map(held, state.values())) < 1.02 * total / 8


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("mesh", ["tensor", "all"])
def test_all_of_the_trunk_is_divided_by_both_axes(name, mesh):
    """And nothing else: the tables of words among it, which stay whole along `tensor`."""
    _, fsdp, tensor = MESHES[mesh]
    large = {
        path: leaf
        for path, leaf in leaves(program(name, MESHES[mesh]).abstract.params).items()
        if leaf.size > LARGE
    }
    assert len([path for path in large if path.startswith("trunk/")]) == 8
    spared = {path for path, leaf in large.items() if leaf.size != held(leaf) * fsdp * tensor}
    assert spared == UNDIVIDED[name]
    assert all(large[path].size == held(large[path]) * fsdp for path in spared)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_belongs_to_a_parameter_lies_where_it_does(mesh):
    abstract = program("bivl", MESHES[mesh]).abstract
    params = leaves(abstract.params)
    others = leaves((abstract.teacher, abstract.opt_state))
    moments = 0
    for path, leaf in others.items():
        own = next((p for p in params if path.endswith(f"/{p}")), None)
        if own and leaf.shape == params[own].shape:
            assert leaf.sharding == params[own].sharding, path
            moments += path.startswith("1/")
    assert moments == 2 * len(params)


@pytest.mark.parametrize("name", SPECS)
def test_heads_that_cannot_be_divided_are_named(name):
    with pytest.raises(UserError, match="axis 'heads' of size 12 .* 8 devices; change config.mesh"):
        build(name, (1, 1, 8))


@pytest.mark.parametrize("name", SPECS)
def test_the_step_lowers_on_a_mesh_of_all_axes(name):
    """With the whole state donated, and every part of it back where it was."""
    built = program(name, MESHES["all"])
    with sharding.use(built.mesh):
        lowered = built.step.lower(built.abstract, built.example_batch(), np.int32(1))
    state, batch, number = lowered.args_info[0]
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert not any(leaf.donated for leaf in jax.tree.leaves((batch, number)))
    again, metrics = lowered.out_info
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, built.abstract)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, again, built.abstract))
    assert {"loss", "grad_norm"} <= set(metrics)
