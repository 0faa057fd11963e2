"""FLOPs of a jitted function, counted from its shapes with loops expanded."""

import math

import jax
import jax.extend


def count(function, *args) -> float:
    """Floating-point operations (2 per multiply-add) of all matmuls and convolutions of a call.

    Walks the jaxpr, multiplying a scan's body by its length; XLA's own figure counts it once.
    Elementwise work is left out, as in the usual definition of MFU, and so is what multiplies the
    zeros between the values of a strided convolution's gradient. `args` may be abstract.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
            window = math.prod(kernel) // kernel[out_axis]
            values = window * math.prod(eqn.outvars[0].aval.shape)
            total += 2.0 * values / math.prod(eqn.params["lhs_dilation"])
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        branches = [_count(inner) for inner in _inner(eqn)]
        is_choice = eqn.primitive.name == "cond"
        total += times * (max(branches, default=0.0) if is_choice else sum(branches))
    return total


def _inner(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jax.extend.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jax.extend.core.Jaxpr):
                yield item
