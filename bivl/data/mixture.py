"""Training data as `config.data` names it: one set, or several that fill parts of every batch.

In a mixture (`data.images`, `data.texts`, `data.pairs`, each a data mapping with a `weight`), part
i of a batch has batch_size x weight_i / sum of weights rows, from a set of its own; weight 0 leaves
it out. Batches are then {part: batch}, and each part is shuffled and repeated by itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data import pipeline, sources


def parts(config) -> dict[str, Any] | None:
    """{part: its data mapping} of a mixture, None where `config.data` is one set."""
    if "kind" in config.data:
        return None
    chosen = {name: data for name, data in config.data.items() if data["weight"]}
    if not chosen:
        raise UserError("config.data: every part has weight 0; give one a positive weight")
    return chosen


def sizes(config) -> int | dict[str, int]:
    """Rows of a global batch: config.batch_size, or in a mixture those of each part.

    Raises UserError where they would not be whole numbers.
    """
    chosen = parts(config)
    if chosen is None:
        return config.batch_size
    total = sum(data["weight"] for data in chosen.values())
    found = {name: config.batch_size * data["weight"] / total for name, data in chosen.items()}
    for name, size in found.items():
        if size != int(size) or size < 1:
            raise UserError(
                f"config.data.{name}.weight={chosen[name]['weight']} of {total} gives {size:.2f} "
                f"of config.batch_size={config.batch_size} rows; change one of them"
            )
    return {name: int(size) for name, size in found.items()}


def open_all(config) -> dict[str, sources.Source]:
    """The opened sources: {part: source} of a mixture, {"": source} of one set."""
    chosen = parts(config)
    if chosen is None:
        return {"": sources.open_source(config.data)}
    opened = {}
    for name, data in chosen.items():
        with sources.keys_of(f"data.{name}"):
            opened[name] = sources.open_source(data)
    return opened


def first_with_images(config) -> Mapping[str, Any]:
    """The data mapping that evaluations follow: of a mixture its first part with images."""
    chosen = parts(config)
    if chosen is None:
        return config.data
    for name, source in open_all(config).items():
        if any(ours == "image" for ours, *_ in source.fields):
            return chosen[name]
    return next(iter(chosen.values()))


def train_batches(
    config,
    objective,
    rows: Callable[[int], range],
    start: int,
    wanted=None,
    threads=None,
    opened=None,
) -> Iterator[tuple[Any, int]]:
    """The stream of (batch, records replaced) from batch number `start` on; `close()` it.

    Args:
      config: seed, data, loader, batch_size.
      objective: has `examples` and `train_ops`, in a mixture mappings from part to function.
      rows: size of a global batch -> its rows that this process loads.
      start: number of the first batch.
      wanted: rows of a global batch (of each part), by default `sizes(config)`.
      threads: by default those of config.loader, with its workers; else no workers.
      opened: by default `open_all(config)`.
    """
    wanted = wanted or sizes(config)
    loader = dict(config.loader) if threads is None else {"threads": threads, "workers": 0}
    options = {"start": start, **loader}

    def stream(source, ops, seed, size):
        options["rows"] = rows(size)
        return pipeline.train_batches(source, ops, seed=seed, batch_size=size, **options)

    opened = opened or open_all(config)
    if parts(config) is None:
        return stream(objective.examples(opened[""]), objective.train_ops, config.seed, wanted)
    streams = {}
    for name, source in opened.items():
        # Two parts may read the same set, which must not come in the same order.
        seed = int(np.random.SeedSequence((config.seed, *name.encode())).generate_state(1)[0])
        size = wanted if isinstance(wanted, int) else wanted[name]
        examples, ops = objective.examples[name], objective.train_ops[name]
        with sources.keys_of(f"data.{name}"):
            streams[name] = stream(examples(source), ops, seed, size)
    return _together(streams)


def _together(streams: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    with contextlib.ExitStack() as stack:
        for each in streams.values():
            stack.callback(each.close)
        while True:
            drawn = {}
            for name, each in streams.items():
                with sources.keys_of(f"data.{name}"):
                    drawn[name] = next(each)
            batch = {name: part for name, (part, _) in drawn.items()}
            yield batch, sum(replaced for _, replaced in drawn.values())
