"""The teacher as an exponential moving average (EMA) of the student, kept in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def update_rate(start: float, end: float, anneal_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Schedule of 1 - tau: step (updates completed) -> float32 scalar.

    tau(n) = end - (end - start) * (1 - n / anneal_steps) for n < anneal_steps, else `end`
    (fairseq `modules/ema_module.py`, `get_annealed_rate`). The rate 1 - tau is what is computed,
    because 1 - float32(0.99999) has lost three digits.
    """

    def rate(step):
        if start == end or anneal_steps <= 0:
            return jnp.float32(1 - end)
        remaining = jnp.maximum(1 - jnp.asarray(step, jnp.float32) / anneal_steps, 0)
        return jnp.float32(1 - end) + jnp.float32(end - start) * remaining

    return rate


def track(teacher, params, rate: jax.Array):
    """One EMA step, T <- T + rate * (S - T), in float32.

    The form with the difference, unlike tau * T + (1 - tau) * S, does not drift when tau and
    1 - tau are rounded apart. `teacher` may hold a part of the tree of `params`.
    """

    def leaf(old, new):
        return old + rate * (new.astype(jnp.float32) - old)

    return jax.tree.map(leaf, teacher, held(params, teacher))


def held(params, teacher):
    """The part of `params` that the teacher holds: nested dicts shaped like `teacher`."""
    if not isinstance(teacher, dict):
        return params
    return {key: held(params[key], value) for key, value in teacher.items()}


def without(tree, prefixes: tuple[str, ...]):
    """Nested dict -> the same without the subtrees that `prefixes` (`a/b`, whole names) name."""

    def prune(node, path):
        if not isinstance(node, dict):
            return node
        kept = [key for key in node if f"{path}{key}" not in prefixes]
        pruned = {key: prune(node[key], f"{path}{key}/") for key in kept}
        return {key: x for key, x in pruned.items() if not isinstance(x, dict) or x}

    return prune(tree, "")


def completed(teacher, params):
    """The teacher with what it lacks taken from the student: nested dicts shaped like `params`."""
    if not isinstance(params, dict):
        return teacher
    return {
        key: completed(teacher[key], value) if key in teacher else value
        for key, value in params.items()
    }
