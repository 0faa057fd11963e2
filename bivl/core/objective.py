"""The seam of the project: what a pre-training method or fine-tuning task is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

PyTree = Any
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method as a frozen record of pure functions; `objectives/x.py` ends with `make(config)`.

    `targets` is never differentiated. `aux`, returned by `loss`, is a dict with
      `weight`   scalar, the number of terms that `loss` is the mean of; micro-batches of an
                 accumulated step are averaged by it, so accumulation changes no mean,
      `metrics`  dict of scalars for the log, averaged in the same way,
      `rows`     (optional) pytree of arrays [B, ...] of the whole batch for `update`,
      `sums`     (optional) pytree that is added up over micro-batches for `update`.
    `update` runs after the optimizer, exactly once per optimizer step; `step` is the number of
    updates completed by then (1 for the first call).
    """

    spec: Mapping[str, jax.ShapeDtypeStruct]
    """Shapes and dtypes of the global batch."""
    init: Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]
    """key -> params, teacher, extras; leaves may be boxed with their logical axes."""
    targets: Callable[[PyTree, PyTree, PyTree, Batch, jax.Array], PyTree]
    """(params, teacher, extras, batch, key) -> targets; key is the one that `loss` gets, so that
    what both draw from it is the same, and what both compute is computed once."""
    loss: Callable[[PyTree, PyTree, Batch, PyTree, jax.Array], tuple[jax.Array, dict]]
    """(params, extras, batch, targets, key) -> loss, aux."""
    update: Callable[[PyTree, PyTree, PyTree, dict, jax.Array], tuple[PyTree, PyTree, dict]]
    """(teacher, extras, params, aux, step) -> teacher, extras, metrics."""
    predict: Mapping[str, Callable[[PyTree, PyTree, Batch], PyTree]]
    """Names to functions of (params, extras, batch): all that an evaluator may see."""
    train_ops: Callable[[Mapping, Any], dict]
    """(record, numpy Generator) -> one example; runs on the host, in threads or workers."""
    eval_ops: Callable[[Mapping], dict]
    """record -> one example, deterministic; keeps `label` and `id` where the record has them."""
    preprocess: Callable[..., dict]
    """Raw inputs by modality name (image=[...], text=[...]) -> numpy batch for `predict`."""
    examples: Callable[[Any], Any] = lambda source: source
    """Source of records -> source of what `train_ops` takes; texts are packed into blocks here."""
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    """The whole batch -> what `targets` and `loss` take, on the devices and before it is cut into
    micro-batches: what rows have of each other is settled here."""
    totals: Callable[[Batch], dict] = lambda batch: {}
    """Batch -> scalars of the whole batch that `loss` and `update` are means over, where they are
    means over several things; micro-batches find them, divided by their number, in
    batch["totals"]."""
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names in `teacher` to checkpoint directories: what a fresh run loads there, as params and
    extras, and what never changes afterwards."""
