"""Batches on the host: batch n is a pure function of (source, ops, seed, n).

Grain MapDatasets only, so a run resumes at batch n without an iterator file, on any number of
processes, threads and workers.
"""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from bivl.core.errors import Undecodable, UserError

_REPLACED = "_replaced"
_NAMED: set[str] = set()  # what this process has named in the log as undecodable
Batch = dict[str, np.ndarray]


def train_batches(
    source: Any,
    ops: Callable[[dict[str, Any], np.random.Generator], Mapping[str, Any]],
    *,
    seed: int,
    batch_size: int,
    rows: Sequence[int],
    start: int,
    threads: int = 2,
    workers: int = 0,
) -> Iterator[tuple[Batch, int]]:
    """Endless shuffled batches (batch, replaced), from batch number `start` on.

    Global batch n holds the examples n * batch_size + r, each epoch in another order. A record
    that cannot be decoded is replaced by the next good one of the source (cyclic), with the same
    randomness as if that had been drawn at once.

    Args:
      source: `sources.Source`, or anything picklable with a length and records by number.
      ops: (record, rng) -> dict of arrays with fixed shapes; `rng` depends on seed and example.
      seed: >= 0.
      batch_size: rows of the global batch.
      rows: the rows of the global batch that this process loads.
      start: number of the first batch.
      threads: batches that are made at the same time, 0 to make them when asked for.
      workers: processes, each with its own threads, 0 for none.

    Returns:
      A grain iterator of (dict name -> array [len(rows), ...], number of its rows that were
      replaced). `close()` it to stop threads and workers.

    Raises:
      UserError: an empty source, a negative seed, a source in which nothing can be decoded.
    """
    _check(source, batch_size, rows)
    if seed < 0:
        raise UserError(f"seed={seed} is negative; choose 0 or more")
    # Two seeds of our own, so that they do not depend on the shape of the pipeline below.
    order, draws = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    data = grain.MapDataset.range(len(source)).shuffle(seed=order).repeat()
    data = data.random_map(_TrainExample(_Reader(source), ops), seed=draws)
    data = _RowsOfBatches(data, batch_size, rows).batch(len(rows), drop_remainder=True)
    return _iterate(data.map(_split_count).slice(slice(start, None)), threads, workers)


def eval_batches(
    source: Any,
    ops: Callable[[dict[str, Any]], Mapping[str, Any]],
    *,
    batch_size: int,
    rows: Sequence[int],
    threads: int = 2,
) -> Iterator[Batch]:
    """One pass in order; every process sees the same number of batches.

    The last batch is padded by repeating the last example. The key `mask`, bool [len(rows)], is
    True for real examples. A record that cannot be decoded is named in the log and gets False
    too: its row shows the next good record, which must not count twice.

    Args and errors as in `train_batches`; `ops` takes the record alone.
    """
    _check(source, batch_size, rows)
    padded = -(-len(source) // batch_size) * batch_size
    data = grain.MapDataset.range(padded).map(_EvalExample(_Reader(source), ops))
    data = _RowsOfBatches(data, batch_size, rows).batch(len(rows), drop_remainder=True)
    return _iterate(data, threads, 0)


def _check(source: Any, batch_size: int, rows: Sequence[int]):
    if not len(source):
        raise UserError("the data set is empty; choose a split with records in data.split")
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {rows} must be some of the {batch_size} rows of a batch")


def _iterate(data: grain.MapDataset, threads: int, workers: int) -> Iterator[Any]:
    # Elements are whole batches here, so a short buffer is enough.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = data.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain hands absl's flags to its workers
            flags.FLAGS.mark_as_parsed()
        _start_tracker()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(processes, worker_init_fn=_end_with_parent)
    return iter(batches)


def _start_tracker() -> None:
    """Python's tracker of shared memory, without the warning it gives at the end of every run:

    batches that were read ahead are left to it when an iterator is closed.
    """
    old = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    resource_tracker.ensure_running()
    os.environ.pop("PYTHONWARNINGS") if old is None else os.environ.update(PYTHONWARNINGS=old)


def _end_with_parent(index: int, count: int) -> None:
    """Ends this worker with the process that started it, which may be killed without notice."""
    del index, count
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _RowsOfBatches(grain.MapDataset):
    """The given rows of every global batch, one after another.

    Element k of the shard is example (k // b) * batch_size + rows[k % b], with b = len(rows).
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return len(self.parents[0]) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self.parents[0][batch * self._batch_size + self._rows[row]]


class _Reader:
    """Applies ops to a record of the source, or to the next one that can be decoded."""

    def __init__(self, source: Any):
        self.source = source
        self.bad: dict[int, str] = {}  # index -> reason; each is tried and logged once per process

    def read(self, index: int, apply: Callable[[dict[str, Any]], Mapping[str, Any]]):
        """The first example from `index` on (cyclic), and how many records were passed over."""
        size = len(self.source)
        for passed in range(size):
            current = (index + passed) % size
            if current in self.bad:
                continue
            try:
                return apply(self.source[current]), passed
            except Undecodable as error:
                self._note(current, str(error))
        fields = [ours for ours, *_ in getattr(self.source, "fields", ())]
        field = next((f".{name}" for name in ("image", "audio") if name in fields), "")
        raise UserError(
            f"none of the {size} records can be decoded (record {index}: {self.bad[index]}); "
            f"check data.dir and data.fields{field}"
        )

    def _note(self, index: int, reason: str):
        if self.bad.setdefault(index, reason) is not reason:
            return  # another thread was faster
        where = getattr(self.source, "where", None)
        name = where(index) if where else f"record {index}"
        if where and name in _NAMED:
            return  # by an earlier pass over the same data
        _NAMED.add(name)
        logging.warning("cannot decode %s (index %d): %s", name, index, reason)


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    reader: _Reader
    ops: Callable[[dict[str, Any], np.random.Generator], Mapping[str, Any]]

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        state = rng.bit_generator.state

        def apply(record: dict[str, Any]) -> Mapping[str, Any]:
            # From the same state at every try, so that an example does not depend on whether
            # this process knew already that a record is bad.
            rng.bit_generator.state = state
            return self.ops(record, rng)

        example, passed = self.reader.read(int(index), apply)
        return {**example, _REPLACED: np.int32(passed > 0)}


@dataclasses.dataclass(frozen=True)
class _EvalExample:
    reader: _Reader
    ops: Callable[[dict[str, Any]], Mapping[str, Any]]

    def __call__(self, index: int) -> dict[str, Any]:
        last = len(self.reader.source) - 1
        example, passed = self.reader.read(min(int(index), last), self.ops)
        if "mask" in example:
            raise ValueError("eval ops must not use the key 'mask', which marks real examples")
        return {**example, "mask": np.bool_(index <= last and not passed)}


def _split_count(batch: Batch) -> tuple[Batch, int]:
    replaced = int(batch.pop(_REPLACED).sum())
    return batch, replaced
