"""Mixtures: how many rows each part has, and that batch n is a pure function of n."""

import itertools
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from bivl.core.errors import UserError
from bivl.data import mixture, sources


class Records:
    """A source in memory: `fields` as a Source has them."""

    def __init__(self, count, *fields):
        self.count, self.fields = count, tuple((name, name, None) for name in fields)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"id": i}


SOURCES = {
    "pictures": Records(40, "image", "id"),
    "books": Records(30, "text", "id"),
    "captioned": Records(50, "image", "text", "id"),
}
SOURCES["same"] = SOURCES["pictures"]
KINDS = {"images": "pictures", "texts": "books", "pairs": "captioned"}


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    monkeypatch.setattr(sources, "open_source", lambda data: SOURCES[data["kind"]])


def config(batch_size=12, kinds=None, **weights):
    """A mixture of `kinds`, each of weight 1 unless `weights` has another."""
    kinds = kinds or KINDS
    data = {part: {"kind": kind, "weight": weights.get(part, 1)} for part, kind in kinds.items()}
    loader = {"threads": 1, "workers": 0}
    return ConfigDict({"seed": 4, "batch_size": batch_size, "data": data, "loader": loader})


def single(batch_size=6):
    c = config(batch_size)
    c.data = {"kind": "pictures"}
    return c


def ops(record, rng):
    return {"id": np.int32(record["id"]), "draw": np.float32(rng.random())}


def objective(*parts):
    """What of an objective a mixture needs; texts' examples count from 1,000."""
    if not parts:
        return types.SimpleNamespace(examples=lambda source: source, train_ops=ops)
    examples = dict.fromkeys(parts, lambda source: source)
    if "texts" in parts:
        examples["texts"] = lambda source: [{"id": 1000 + i} for i in range(len(source))]
    return types.SimpleNamespace(examples=examples, train_ops=dict.fromkeys(parts, ops))


def take(count, c, start=0, rows=range, **options):
    made = objective() if "kind" in c.data else objective(*c.data)
    batches = mixture.train_batches(c, made, rows, start, **options)
    try:
        return [batch for batch, _ in itertools.islice(batches, count)]
    finally:
        batches.close()


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for part in a:
            for name in a[part]:
                np.testing.assert_array_equal(a[part][name], b[part][name])


def test_sizes_follow_the_weights():
    assert mixture.sizes(config()) == {"images": 4, "texts": 4, "pairs": 4}
    assert mixture.sizes(config(images=2, texts=3)) == {"images": 4, "texts": 6, "pairs": 2}
    assert mixture.sizes(config(texts=0)) == {"images": 6, "pairs": 6}
    assert list(mixture.parts(config(texts=0))) == ["images", "pairs"]
    assert mixture.sizes(single()) == 6 and mixture.parts(single()) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 13}, "config.data.images.weight=1 of 3 gives 4.33 of config.batch_size=13"),
        ({"images": 5}, "config.data.images.weight=5 of 7 gives 8.57 of config.batch_size=12"),
        ({"batch_size": 2, "texts": 0, "pairs": 3}, "gives 0.50 of config.batch_size=2 rows"),
        ({"images": 0, "texts": 0, "pairs": 0}, "every part has weight 0"),
    ],
)
def test_sizes_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        mixture.sizes(config(**changes))
    assert "\n" not in str(caught.value)


def test_batches_have_every_part_in_its_size():
    for batch in take(3, config(images=2, texts=3)):
        assert {part: len(x["id"]) for part, x in batch.items()} == mixture.sizes(
            config(images=2, texts=3)
        )
        assert (batch["texts"]["id"] >= 1000).all() and (batch["images"]["id"] < 40).all()


def test_one_set_is_no_mixture():
    first, second = take(2, single())
    assert first["id"].shape == (6,) and not np.array_equal(first["id"], second["id"])


@pytest.mark.parametrize("start", [1, 3])
def test_batch_n_does_not_depend_on_the_start(start):
    assert_same(take(5 - start, config(), start), take(5, config())[start:])


def test_rows_of_two_processes_make_up_the_batch():
    whole = take(2, config())
    halves = [
        take(2, config(), rows=lambda size, half=half: range(half * size // 2, size // (2 - half)))
        for half in (0, 1)
    ]
    joined = [
        {
            part: {name: np.concatenate([a[part][name], b[part][name]]) for name in a[part]}
            for part in a
        }
        for a, b in zip(*halves, strict=True)
    ]
    assert_same(joined, whole)


def test_parts_of_the_same_set_come_in_orders_of_their_own():
    (batch,) = take(1, config(40, {"images": "pictures", "pairs": "same"}))
    first, second = batch["images"], batch["pairs"]
    assert not np.array_equal(first["id"], second["id"])
    assert not np.isin(first["draw"], second["draw"]).any()
    both = take(2, config(40, {"images": "pictures", "pairs": "same"}))
    assert len(np.unique(np.concatenate([x["images"]["id"] for x in both]))) == 40  # an epoch


def test_another_seed_gives_other_batches():
    c = config()
    c.seed = 5
    (ours,), (other,) = take(1, config()), take(1, c)
    assert all(not np.array_equal(ours[part]["id"], other[part]["id"]) for part in ours)


def test_one_example_of_each_part():
    """What the check before a run asks for."""
    (batch,) = take(1, config(), rows=lambda size: range(1), wanted=1, threads=0)
    assert {part: x["id"].shape for part, x in batch.items()} == dict.fromkeys(KINDS, (1,))


def test_closing_closes_every_stream(monkeypatch):
    closed = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __next__(self):
            return {"id": np.zeros(1)}, 2

        def close(self):
            closed.append(self.name)

    named = {id(source): kind for kind, source in SOURCES.items()}
    monkeypatch.setattr(
        mixture.pipeline, "train_batches", lambda source, *_, **__: Stream(named.get(id(source)))
    )
    batches = mixture.train_batches(config(texts=0), objective(*KINDS), range, 0)
    batch, replaced = next(batches)
    assert set(batch) == {"images", "pairs"} and replaced == 4 and not closed
    batches.close()
    assert sorted(closed) == ["captioned", "same"]


def test_evaluations_follow_the_first_part_with_images():
    assert mixture.first_with_images(config())["kind"] == "pictures"
    assert mixture.first_with_images(config(images=0))["kind"] == "captioned"
    assert mixture.first_with_images(config(kinds={"texts": "books"}))["kind"] == "books"
    assert mixture.first_with_images(single())["kind"] == "pictures"


def test_mistakes_name_the_keys_of_their_part(monkeypatch, tmp_path):
    """In opening a part, in its examples and in reading: data.PART.KEY, as it can be set."""
    monkeypatch.undo()
    c = config(kinds={"images": "folder", "texts": "pydoc"})
    c.data.images.dir = str(tmp_path / "data.dir")
    with pytest.raises(UserError, match=r"^data\.images\.dir=/.*/data\.dir is not a folder; "):
        mixture.open_all(c)

    def refuse(*_):
        raise UserError("set config.data.fields.text and eval_data.test.split or data.weight")

    words = r"config\.data\.texts\.fields\.text and eval_data\.test\.split or data\.weight"
    for broken in ("examples", "train_ops"):
        made = objective("images", "texts")
        getattr(made, broken)["texts"] = refuse
        opened = {"images": SOURCES["pictures"], "texts": SOURCES["books"]}
        with pytest.raises(UserError, match=words):
            next(mixture.train_batches(c, made, range, 0, opened=opened))
