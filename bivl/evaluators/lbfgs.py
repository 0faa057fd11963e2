"""Full-batch minimisation by L-BFGS, which the linear and the cloze probe share."""

import jax
import jax.numpy as jnp
import optax


def minimise(loss, start, max_iterations, tolerance, memory: int = 10):
    """Minimise loss(weights) from `start`, inside a compiled function -> weights, iterations used.

    Stops when no entry of the gradient exceeds `tolerance`, or after `max_iterations`. `memory`:
    steps remembered, each two arrays like the weights.
    """
    tx = optax.lbfgs(memory_size=memory)
    value_and_grad = optax.value_and_grad_from_state(loss)  # reuses the line search's last point

    def step(carry):
        weights, state, count = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = tx.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(weights, updates), state, count + 1

    def unfinished(carry):
        _, state, count = carry
        largest = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return (count == 0) | ((count < max_iterations) & (largest > tolerance))

    weights, _, count = jax.lax.while_loop(unfinished, step, (start, tx.init(start), 0))
    return weights, count
