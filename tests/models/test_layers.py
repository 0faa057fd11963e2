"""Layers on meshes: what a device holds and what it must not."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from bivl.core import sharding
from bivl.models.layers import Embedding, constrain_tokens


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (4, 2, 1), (2, 2, 2)])
def test_a_lookup_and_its_gradient_keep_to_a_device_s_own_rows(shape):
    """The whole batch in one piece would grow with mesh.data (and did, where fsdp divides too)."""
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    layer, rows = Embedding(2000, 16), 48
    ids = jax.ShapeDtypeStruct((rows, 5), jnp.int32, sharding=sharding.batch_sharding(mesh))
    spec = sharding.resolve((None, "embed"), (2000, 16), mesh, "table")
    table = jax.ShapeDtypeStruct((2000, 16), jnp.float32, sharding=NamedSharding(mesh, spec))

    def loss(table, ids):
        return (constrain_tokens(layer.apply({"params": {"table": table}}, ids)) ** 2).sum()

    with sharding.use(mesh):
        text = jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, ids)
        text = text.compile().as_text()
    assert not re.findall(rf"f32\[{rows},5,\d+\]", text)
