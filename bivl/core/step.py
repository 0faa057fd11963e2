"""One training step: targets, loss, gradients, optimizer, teacher, metrics. Nothing else trains."""

import jax
import jax.numpy as jnp
import optax

from bivl.core import sharding
from bivl.core.objective import Objective
from bivl.core.state import State


def _same(tree):
    return tree


def _micro_batches(batch, accumulate: int):
    """[B, ...] -> [accumulate, B / accumulate, ...], row i in micro-batch i % accumulate.

    Rows stay on their device: the leading axis keeps its sharding through the reshape.
    """

    def leaf(x):
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(leaf, batch)


def _loss_and_grads(objective: Objective, state: State, batch, key, home):
    targets = objective.targets(state.params, state.teacher, state.extras, batch, key)
    targets = jax.lax.stop_gradient(targets)
    grad_fn = jax.value_and_grad(objective.loss, has_aux=True)
    (loss, aux), grads = grad_fn(state.params, state.extras, batch, targets, key)
    aux["metrics"] = {"loss": loss, **aux["metrics"]}
    return aux, home(grads)


def _accumulated(objective: Objective, state: State, batch, key, accumulate: int, home=_same):
    """Weighted mean of gradients and metrics over micro-batches, as one scan; `home` puts
    gradients where their parameters are."""
    batch = objective.prepare(batch)
    totals = objective.totals(batch)
    totals = {"totals": jax.tree.map(lambda x: x / accumulate, totals)} if totals else {}
    if accumulate == 1:
        return _loss_and_grads(objective, state, {**batch, **totals}, key, home)

    def weighted(micro, key):
        aux, grads = _loss_and_grads(objective, state, {**micro, **totals}, key, home)
        weight = aux["weight"].astype(jnp.float32)
        scaled = jax.tree.map(lambda x: weight * x, (aux["metrics"], grads))
        return (scaled, weight, aux.get("sums", ())), aux.get("rows", ())

    def body(carry, inputs):
        terms, rows = weighted(*inputs)
        return jax.tree.map(jnp.add, carry, terms), rows

    inputs = _micro_batches(batch, accumulate), jax.random.split(key, accumulate)
    first = jax.tree.map(lambda x: x[0], inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(weighted, *first)[0])
    (scaled, weight, sums), rows = jax.lax.scan(body, zeros, inputs)
    metrics, grads = jax.tree.map(lambda x: x / weight, scaled)
    rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
    return {"metrics": metrics, "weight": weight, "sums": sums, "rows": rows}, grads


def train_step(
    state: State, batch, n, *, objective, tx, schedule, seed, accumulate, whole=_same, home=_same
):
    """Update number `n` (1-based). Returns the new state and a dict of float32 scalars.

    whole: (params, teacher) -> the same, placed as the objective is to read them; home: gradients
    -> the same, placed as their parameters are.

    An update whose loss, gradient or parameters are not finite, or that is not the next one for
    this state, is refused: the state comes back as it was. So the loop may read metrics one step
    late and still save a sound state when a guard stops it.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    params, teacher = whole((state.params, state.teacher))
    read = state.replace(params=params, teacher=teacher)
    aux, grads = _accumulated(objective, read, batch, key, accumulate, home)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    teacher, extras, notes = objective.update(state.teacher, state.extras, params, aux, step)
    new = State(step, params, teacher, extras, opt_state)
    metrics = aux["metrics"] | notes
    metrics |= {
        "learning_rate": schedule(state.step),
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
    }
    finite = [jnp.isfinite(metrics[name]) for name in ("loss", "grad_norm", "param_norm")]
    sound = jnp.all(jnp.stack(finite)) & (step == n)
    state = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
    return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)


def compile_step(objective: Objective, tx, schedule, abstract_state, *, seed, accumulate, gather):
    """The jitted step (state donated): what train, benchmark and precompile all run.

    gather: `update`, what lies divided over fsdp is gathered once for all that an update does with
    it; `layer`, whenever a layer runs, which needs least memory.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    options = {"objective": objective, "tx": tx, "schedule": schedule, "seed": seed}
    options |= {"accumulate": accumulate, "home": _pinned(shardings.params)}
    if gather == "update":
        parts = shardings.params, shardings.teacher
        options["whole"] = _pinned(jax.tree.map(sharding.gathered, parts))

    def step(state, batch, n):
        return train_step(state, batch, n, **options)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _pinned(shardings):
    return lambda tree: jax.lax.with_sharding_constraint(tree, shardings)
