"""Collapse made visible: spread and rank of representations, and the guard that stops a run."""

import dataclasses

import jax
import jax.numpy as jnp

from bivl.core import ema
from bivl.core.errors import GuardStop


def channel_std(x, mask=None):
    """Mean over channels of the std over tokens: x [..., D] -> scalar; with `mask` bool [...], over
    the masked tokens.

    sqrt(unbiased variance + 1e-6), as data2vec's misnamed `target_var` and `pred_var`
    (fairseq `models/data2vec_audio.py`, `compute_var`); over the global batch. About 1 where
    targets are layer-normalised and tokens differ, near 0 where all tokens are alike.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    mask = jnp.ones((len(x), 1)) if mask is None else mask.reshape(-1, 1).astype(jnp.float32)
    count = mask.sum()
    mean = (x * mask).sum(0) / jnp.maximum(count, 1)
    variance = (jnp.square(x - mean) * mask).sum(0) / jnp.maximum(count - 1, 1)
    return jnp.sqrt(variance + 1e-6).mean()


def some_tokens(x, limit: int = 256):
    """At most `limit` evenly spaced tokens of x [..., D], as [n, D] in float32."""
    x = x.reshape(-1, x.shape[-1])
    return x[:: max(1, x.shape[0] // limit)][:limit].astype(jnp.float32)


def effective_rank(x, limit: int = 256):
    """Participation ratio of the covariance spectrum of tokens x [..., D]: scalar in [1, D].

    (sum of eigenvalues)^2 / (sum of squared eigenvalues), from the Gram matrix of at most `limit`
    evenly spaced tokens, so it needs no decomposition. It is exp of the Renyi-2 entropy, a lower
    bound of the entropy-based effective rank of Roy and Vetterli (2007).
    """
    x = some_tokens(x, limit)
    x = x - x.mean(0)
    gram = x @ x.T
    return jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.square(gram).sum(), 1e-12)


def distances(teacher, params) -> dict[str, jax.Array]:
    """|T - S| / |S| of the parameters that the teacher holds, by stage: the first name of a path,
    and `block_i` of the layers stacked [N, ...] under `blocks`. 0 where the two are one."""
    totals: dict[str, tuple] = {}
    students = jax.tree.leaves(ema.held(params, teacher))
    teachers = jax.tree_util.tree_flatten_with_path(teacher)[0]
    for (path, mine), theirs in zip(teachers, students, strict=True):
        stacked = any(key.key == "blocks" for key in path)
        axes = tuple(range(stacked, mine.ndim))
        squares = (jnp.square(mine - theirs).sum(axes), jnp.square(theirs).sum(axes))
        stage = "blocks" if stacked else path[0].key
        old = totals.get(stage, (0.0, 0.0))
        totals[stage] = (old[0] + squares[0], old[1] + squares[1])
    found = {name: jnp.sqrt(a / jnp.maximum(b, 1e-12)) for name, (a, b) in totals.items()}
    blocks = found.pop("blocks", ())
    return found | {f"block_{i}": blocks[i] for i in range(len(blocks))}


@dataclasses.dataclass
class Guard:
    """Stops a run whose loss is not finite or whose targets or predictions have collapsed.

    The stds must stay below their bound for `patience` checked updates in a row, after `after`
    updates; bounds 0.1 and 0.01 after 5,000 updates are fairseq's (`min_target_var`,
    `min_pred_var`). A bound of 0 switches that check off.
    """

    target_std: float
    prediction_std: float
    after: int
    patience: int
    _low: int = 0

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises GuardStop with advice. `metrics` are those of update `step`."""
        for name in ("loss", "grad_norm", "param_norm"):
            if not abs(metrics.get(name, 0.0)) < float("inf"):
                raise GuardStop(
                    f"{name} is {metrics[name]} at step {step}; the update was refused. Lower "
                    "config.optimizer.learning_rate, lengthen warmup_steps, set clip_norm, or use "
                    "dtype=float32"
                )
        low = [
            (name, metrics[name], bound)
            for name in ("target_std", "prediction_std")
            if name in metrics and metrics[name] < (bound := getattr(self, name))
        ]
        self._low = self._low + 1 if low and step > self.after else 0
        if self._low >= max(self.patience, 1):
            name, value, bound = low[0]
            raise GuardStop(
                f"{name} {value:.4g} stayed below {bound} until step {step}: the representation "
                "has collapsed. Lower config.optimizer.learning_rate, raise ema_decay_start, "
                f"lengthen warmup_steps or normalise targets; guard.{name}=0 switches this off"
            )
