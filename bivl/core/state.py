"""Everything that is saved: the training state, created already sharded."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bivl.core import sharding
from bivl.core.objective import Objective, PyTree


class State(struct.PyTreeNode):
    """`step` counts finished updates; `teacher` and `extras` belong to the objective."""

    step: jax.Array
    params: PyTree
    teacher: PyTree
    extras: PyTree
    opt_state: PyTree


def _init(objective: Objective, tx: optax.GradientTransformation, seed: int):
    def init() -> State:
        params, teacher, extras = nn.unbox(objective.init(jax.random.key(seed)))
        return State(jnp.int32(0), params, teacher, extras, tx.init(params))

    return init


def abstract(objective: Objective, tx: optax.GradientTransformation, mesh: Mesh, seed: int = 0):
    """The state's shapes and dtypes, each leaf with its sharding: a tree of ShapeDtypeStruct.

    Optimizer moments are sharded like their parameters; every other optimizer leaf is replicated.
    """
    shapes = jax.eval_shape(_init(objective, tx, seed))
    boxed = jax.eval_shape(lambda: objective.init(jax.random.key(seed)))
    params, teacher, extras = sharding.tree_shardings(boxed, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree.map_params(
        tx, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: whole
    )
    shardings = State(whole, params, teacher, extras, moments)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def shardings_of(abstract_state):
    """Tree of ShapeDtypeStruct -> tree of shardings."""
    return jax.tree.map(lambda x: x.sharding, abstract_state)


def create(objective: Objective, tx, mesh: Mesh, seed: int) -> State:
    """Initialises on the devices, born sharded: no host ever holds the whole state."""
    shardings = shardings_of(abstract(objective, tx, mesh, seed))
    return jax.jit(_init(objective, tx, seed), out_shardings=shardings)()
