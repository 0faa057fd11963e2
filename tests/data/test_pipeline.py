import io
import itertools
import threading

import numpy as np
import pytest
from absl import logging
from PIL import Image

from bivl.core.errors import Undecodable, UserError
from bivl.data import augment
from bivl.data.images import decode_image, open_image
from bivl.data.pipeline import eval_batches, train_batches
from bivl.data.sources import open_source


class Records:
    """A source in memory: encoded grey level i, or damaged bytes for the indices in `bad`."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, frozenset(bad)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            return {"image": b"damaged", "id": i}
        file = io.BytesIO()
        Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(file, "PNG")
        return {"image": file.getvalue(), "id": i}


def ops(record, rng):
    early = rng.random()  # drawn before the decoder may fail
    opened = open_image(record["image"])
    view = augment.draw_view(rng, opened.size)
    image = np.array(augment.show(opened.rgb(), view, (4, 4)))
    draws = np.array([early, rng.random()], np.float32)
    return {"image": image, "id": np.int32(record["id"]), "draws": draws}


def eval_ops(record):
    return {"image": decode_image(record["image"]), "id": np.int32(record["id"])}


def take(count, source, start=0, rows=None, batch_size=6, seed=3, **options):
    rows = range(batch_size) if rows is None else rows
    batches = train_batches(
        source, ops, seed=seed, batch_size=batch_size, rows=rows, start=start, **options
    )
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def assert_same(first, second):
    assert len(first) == len(second)
    for (batch, replaced), (other, other_replaced) in zip(first, second, strict=True):
        assert batch.keys() == other.keys() and replaced == other_replaced
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])
            assert batch[key].dtype == other[key].dtype


@pytest.fixture(scope="module")
def reference():
    return take(6, Records(20, bad={4, 5, 19}), threads=0)


def test_batch_shapes_and_plain_dict(reference):
    batch, replaced = reference[0]
    assert set(batch) == {"image", "id", "draws"} and isinstance(replaced, int)
    assert batch["image"].shape == (6, 4, 4, 3) and batch["image"].dtype == np.uint8
    assert batch["id"].shape == (6,) and batch["draws"].shape == (6, 2)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"threads": 0}])
def test_threads_do_not_matter(reference, options):
    assert_same(take(6, Records(20, bad={4, 5, 19}), **options), reference)


def test_worker_processes_do_not_matter(reference):
    assert_same(take(6, Records(20, bad={4, 5, 19}), threads=0, workers=2), reference)


@pytest.mark.parametrize("start", [1, 5])
def test_start_does_not_matter(reference, start):
    # A fresh run has not met the bad records of the batches before.
    assert_same(take(6 - start, Records(20, bad={4, 5, 19}), start=start), reference[start:])


@pytest.mark.parametrize(
    "split", [[range(3), range(3, 6)], [range(0, 6, 2), range(1, 6, 2)], [[5], [0, 1, 2, 3, 4]]]
)
def test_rows_of_processes_make_up_the_global_batch(reference, split):
    parts = [take(6, Records(20, bad={4, 5, 19}), rows=rows) for rows in split]
    for n, (batch, replaced) in enumerate(reference):
        assert sum(part[n][1] for part in parts) == replaced
        for key in batch:
            for rows, part in zip(split, parts, strict=True):
                np.testing.assert_array_equal(part[n][0][key], batch[key][list(rows)])


def ids(batches):
    return np.concatenate([batch["id"] for batch, _ in batches])


def test_every_epoch_is_another_permutation():
    order = ids(take(4, Records(12), batch_size=6))
    first, second = order[:12], order[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(12))


def test_draws_differ_between_examples_epochs_and_seeds():
    draws = np.concatenate([b["draws"] for b, _ in take(4, Records(12))])
    assert len(np.unique(draws)) == draws.size
    other = np.concatenate([b["draws"] for b, _ in take(4, Records(12), seed=4)])
    assert not np.isin(draws, other).any()
    assert not np.array_equal(ids(take(2, Records(12))), ids(take(2, Records(12), seed=4)))


def test_a_data_set_smaller_than_a_batch_repeats():
    order = ids(take(2, Records(4), batch_size=6))
    assert all(sorted(order[k : k + 4]) == [0, 1, 2, 3] for k in (0, 4, 8))
    assert ids(take(1, Records(1), batch_size=6)).tolist() == [0] * 6


def test_bad_records_are_replaced_by_the_next_good_one():
    clean, damaged = take(4, Records(12)), take(4, Records(12, bad={3, 4, 11}))
    instead = {3: 5, 4: 5, 11: 0}
    for (good, none), (batch, replaced) in zip(clean, damaged, strict=True):
        assert none == 0 and replaced == sum(i in instead for i in good["id"].tolist())
        assert batch["id"].tolist() == [instead.get(i, i) for i in good["id"].tolist()]
        # The randomness belongs to the example, not to the record or to the failed attempts.
        np.testing.assert_array_equal(batch["draws"], good["draws"])
    assert sum(replaced for _, replaced in damaged) == 6


def test_a_bad_record_is_named_once(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    take(6, Records(12, bad={3, 7}), threads=0)
    assert len(lines) == 2
    assert sorted(line.split(":")[0] for line in lines) == [
        "cannot decode record 3 (index 3)",
        "cannot decode record 7 (index 7)",
    ]
    assert "no image of a known format" in lines[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_decodable_is_a_user_error(workers):
    with pytest.raises(UserError, match="none of the 5 records can be decoded"):
        take(1, Records(5, bad=range(5)), workers=workers)


def test_other_errors_of_ops_are_not_swallowed():
    def broken(record, rng):
        raise KeyError("text")

    with pytest.raises(KeyError, match="text"):
        next(train_batches(Records(5), broken, seed=0, batch_size=2, rows=range(2), start=0))


def test_bad_arguments():
    with pytest.raises(UserError, match="empty"):
        take(1, Records(0))
    with pytest.raises(UserError, match="seed=-1"):
        take(1, Records(5), seed=-1)
    with pytest.raises(ValueError, match="rows"):
        take(1, Records(5), rows=range(7))
    with pytest.raises(UserError, match="empty"):
        eval_batches(Records(0), eval_ops, batch_size=2, rows=range(2))


def test_closing_stops_the_threads():
    others = set(threading.enumerate())  # earlier tests leave iterators to the garbage collector
    batches = train_batches(
        Records(20), ops, seed=0, batch_size=4, rows=range(4), start=0, threads=2
    )
    next(batches)
    before = [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]
    before = [t for t in before if t not in others]
    assert before
    batches.close()
    for thread in before:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in before)


def test_eval_is_one_pass_in_order_with_padding():
    batches = list(eval_batches(Records(10), eval_ops, batch_size=4, rows=range(4)))
    assert [b["id"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [b["mask"].sum() for b in batches] == [4, 4, 2]
    assert (
        batches[0]["mask"].dtype == bool and batches[2]["mask"].tolist() == [True] * 2 + [False] * 2
    )


def test_eval_rows_of_processes():
    whole = list(eval_batches(Records(9), eval_ops, batch_size=4, rows=range(4)))
    parts = [
        list(eval_batches(Records(9), eval_ops, batch_size=4, rows=rows, threads=0))
        for rows in (range(2), range(2, 4))
    ]
    assert len(parts[0]) == len(parts[1]) == len(whole) == 3  # the second has only padding at last
    for n, batch in enumerate(whole):
        for key in batch:
            np.testing.assert_array_equal(
                batch[key], np.concatenate([part[n][key] for part in parts])
            )


def test_eval_leaves_bad_records_out():
    batches = list(eval_batches(Records(6, bad={1, 5}), eval_ops, batch_size=4, rows=range(4)))
    kept = [i for b in batches for i, real in zip(b["id"], b["mask"], strict=True) if real]
    assert kept == [0, 2, 3, 4]
    records = Records(3, bad=range(3))
    records.fields = (("text", "text", None), ("audio", "sound", None))
    with pytest.raises(UserError, match="none of the 3 .* check data.dir and data.fields.audio"):
        list(eval_batches(records, eval_ops, batch_size=4, rows=range(4)))


def test_eval_ops_may_not_use_the_key_mask():
    with pytest.raises(ValueError, match="mask"):
        next(eval_batches(Records(3), lambda r: {"mask": 1}, batch_size=2, rows=range(2)))


def test_undecodable_raised_by_the_source_counts_too():
    class Unreadable(Records):
        def __getitem__(self, i):
            if i == 2:
                raise Undecodable("gone")
            return super().__getitem__(i)

    batches = take(2, Unreadable(6))
    assert sum(replaced for _, replaced in batches) == 2 and 2 not in ids(batches)


def test_with_a_real_source():
    source = open_source({"kind": "emoji", "split": "train[:40]"})
    batches = take(3, source, batch_size=16)
    assert batches[0][0]["image"].shape == (16, 4, 4, 3)
    assert all(replaced == 0 for _, replaced in batches)
    assert sorted(ids(batches)[:40]) == list(range(40))
