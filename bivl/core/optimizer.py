"""AdamW with clipping, weight-decay mask, schedules and layer-wise rate decay, on optax."""

import re

import jax
import jax.numpy as jnp
import optax

from bivl.core.config import choice
from bivl.core.errors import UserError


def cosine(config, steps: int):
    """Linear warm-up from 0 over W updates, then 0.5 (peak - end) (1 + cos) + end."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        config.warmup_steps,
        max(steps, config.warmup_steps + 1),
        config.end_learning_rate,
    )


def polynomial(config, steps: int):
    """Linear warm-up from 0, linear decay to `end_learning_rate` (fairseq polynomial_decay)."""
    peak, warmup = config.learning_rate, config.warmup_steps
    up = optax.linear_schedule(0.0, peak, warmup)
    down = optax.linear_schedule(peak, config.end_learning_rate, max(steps - warmup, 1))
    return optax.join_schedules([up, down], [warmup])


def tri_stage(config, steps: int):
    """0.01 peak -> peak (linear), hold, then exponential decay to final_scale * peak.

    `config.phases` are the three fractions of `steps` (fairseq tri_stage; the data2vec paper calls
    the last phase linear, the code that made its numbers decays exponentially).
    """
    peak, final = config.learning_rate, config.final_scale
    warmup, hold, decay = (int(f * steps) for f in config.phases)

    def last(count):
        share = jnp.minimum(count / max(decay, 1), 1.0)
        return peak * jnp.exp(jnp.log(final) * share)

    up = optax.linear_schedule(0.01 * peak, peak, max(warmup, 1))
    flat = optax.constant_schedule(peak)
    return optax.join_schedules([up, flat, last], [warmup, warmup + hold])


def constant(config, steps: int):
    """Linear warm-up from 0, then `learning_rate` for good."""
    del steps
    peak, warmup = config.learning_rate, config.warmup_steps
    up = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([up, optax.constant_schedule(peak)], [warmup])


SCHEDULES = {f.__name__: f for f in (cosine, polynomial, tri_stage, constant)}


def make_schedule(config, steps: int):
    """`config.optimizer` -> function from finished updates to the next update's learning rate."""
    choice("optimizer.schedule", config.schedule, SCHEDULES)
    if len(config.phases) != 3 or sum(config.phases) > 1 + 1e-6 or not config.final_scale:
        raise UserError(
            f"config.optimizer.phases={config.phases} must be three shares of 1 (warm-up, hold, "
            f"decay), and final_scale={config.final_scale} positive"
        )
    return SCHEDULES[config.schedule](config, steps)


def _path(path) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def decay_mask(params, exclude: str):
    """True where weight decay applies: every parameter whose path `exclude` (a regex) misses."""
    pattern = re.compile(exclude)
    return jax.tree_util.tree_map_with_path(lambda p, _: not pattern.search(_path(p)), params)


def layer_scales(params, decay: float, embed: bool = True):
    """Rate factors decay^(N + 1 - id) for a tree whose `blocks` leaves are stacked [N, ...].

    id 0: everything under `embed` but bias tables; i + 1: block i, and its own bias table where
    each has one; N + 1: the rest (norm, head, a shared bias table), as in BEiT's
    `optim_factory.py`. With `embed` False the embedding counts as the rest, as in fairseq's
    `mae_image_classification.py`. A tree of arrays that broadcast.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    depth = max((leaf.shape[0] for path, leaf in flat if "blocks" in _path(path)), default=0)

    def leaf(path, value):
        name = _path(path)
        table = "relative_position" in name  # [rows, H] for all blocks; [N, rows, H], one each
        if "blocks" in name or (table and value.ndim == 3):
            ids = jnp.arange(depth).reshape(-1, *[1] * (value.ndim - 1)) + 1
        else:
            first = embed and name.startswith("embed/") and not table
            ids = 0 if first else depth + 1
        return jnp.float32(decay) ** (depth + 1 - ids)

    return jax.tree_util.tree_map_with_path(leaf, params)


def scale_by_layer(decay: float, embed: bool = True) -> optax.GradientTransformation:
    """Multiplies updates by `layer_scales`."""

    def update(updates, state, params=None):
        scales = layer_scales(updates, decay, embed)
        return jax.tree.map(lambda u, s: u * s, updates, scales), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_path(pattern: str, factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of parameters whose path `pattern` finds.

    UserError where it finds none of the parameters, or all.
    """

    def init(params):
        _check_some("fast", pattern, params, "have the rate times fast_rate, or set fast_rate=1")
        return optax.EmptyState()

    def update(updates, state, params=None):
        def leaf(path, u):
            return u * factor if re.search(pattern, _path(path)) else u

        return jax.tree_util.tree_map_with_path(leaf, updates), state

    return optax.GradientTransformation(init, update)


def _check_some(key: str, pattern: str, params, cure: str) -> None:
    """UserError where optimizer.KEY finds none of the parameters, or all."""
    paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    found = sum(bool(re.search(pattern, path)) for path in paths)
    if paths and found in (0, len(paths)):  # optax.tree.map_params tries it without any
        raise UserError(
            f"config.optimizer.{key}={pattern!r} finds {found} of {len(paths)} parameters; "
            f"write a regex of those that shall {cure}"
        )


def hold(pattern: str, steps: int) -> optax.GradientTransformation:
    """Zeroes the updates of parameters whose path `pattern` finds, for the first `steps` calls.

    UserError where it finds none of the parameters, or all.
    """

    def init(params):
        _check_some("freeze", pattern, params, "stand still, or set freeze_steps=0")
        return jnp.int32(0)

    def update(updates, count, params=None):
        def leaf(path, u):
            return jnp.where(count < steps, 0, u) if re.search(pattern, _path(path)) else u

        return jax.tree_util.tree_map_with_path(leaf, updates), count + 1

    return optax.GradientTransformation(init, update)


def adam(config) -> optax.GradientTransformation:
    """Adam. What `hold` has held starts from count 0 when it begins to move.

    Its moments are zero until then, as its gradients were: only the correction of their bias must
    count from there.
    """
    inner = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if not config.freeze_steps:
        return inner

    def update(updates, state, params=None):
        since = state._replace(count=jnp.maximum(state.count - config.freeze_steps, 0))
        late, _ = inner.update(updates, since, params)
        free, state = inner.update(updates, state, params)

        def leaf(path, a, b):
            return a if re.search(config.freeze, _path(path)) else b

        return jax.tree_util.tree_map_with_path(leaf, late, free), state

    return optax.GradientTransformation(inner.init, update)


def make_optimizer(config, schedule) -> optax.GradientTransformation:
    """`config.optimizer` -> clip by global norm, Adam, decoupled decay, layer decay, -lr.

    Decoupled decay is lr * weight_decay * p, as in torch.optim.AdamW and fairseq's "adam". What
    `freeze` (a regex of paths) finds stands still for the first `freeze_steps` updates; what `fast`
    finds has the rate times `fast_rate`.
    """
    for key in ("beta1", "beta2"):
        if not config[key] < 1:
            raise UserError(f"config.optimizer.{key}={config[key]} must lie in [0, 1)")
    for key in ("no_decay", "freeze", "fast"):
        try:
            re.compile(config[key])
        except re.error as error:
            raise UserError(
                f"config.optimizer.{key}={config[key]!r} is no regex ({error}); correct it"
            ) from error
    held = [hold(config.freeze, config.freeze_steps)] if config.freeze_steps else []
    parts = [*held, optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else [*held]
    parts.append(adam(config))
    if config.weight_decay:
        mask = lambda params: decay_mask(params, config.no_decay)  # noqa: E731
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    if config.layer_decay != 1.0:
        parts.append(scale_by_layer(config.layer_decay, config.layer_decay_embed))
    if config.fast_rate != 1.0:
        parts.append(scale_by_path(config.fast, config.fast_rate))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts, *held)
