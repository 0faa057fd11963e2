import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from bivl.core.errors import GuardStop, Undecodable, UserError
from bivl.evaluators import features, floors, retrieval


@pytest.fixture
def towers():
    """predict: the embeddings of an example are its `x` and `y`, scaled by params."""
    return {
        "image_embeddings": lambda params, extras, batch: batch["x"] * params,
        "text_embeddings": lambda params, extras, batch: batch["y"] * params,
    }


def splits_of(data, batch_size=8, calls=None, bad=(), record=None):
    """Rows `bad` cannot be decoded; the last batch is padded by the last row."""
    count = len(data["x"])

    def batches(split):
        if calls is not None:
            calls.append(split)
        for start in range(0, count, batch_size):
            index = np.arange(start, start + batch_size)
            rows = {name: value[np.minimum(index, count - 1)] for name, value in data.items()}
            x, y = (jnp.asarray(rows.pop(name)) for name in ("x", "y"))
            yield {"x": x, "y": y, "mask": (index < count) & ~np.isin(index, bad), **rows}

    return features.Splits(batches, None, record=record)


def unit(x):
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def draw(captions, width=6, signal=1.0, seed=0):
    """x [N, E], y [N, E], id [N]: captions[i] rows of image i in mixed order, ids in no order."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(len(captions)), captions)
    rng.shuffle(image)
    vectors = unit(rng.normal(size=(len(captions), width)))
    x = vectors[image]
    y = unit(signal * x + rng.normal(size=x.shape))
    return {"x": x, "y": y, "id": (7 * (image + 3)) % 1009}


def by_hand(data, k):
    """Recall at k of both directions: sorted lists, one question after the other."""
    images = {number: x for number, x in zip(data["id"], data["x"], strict=True)}
    numbers, pictures = list(images), np.stack(list(images.values()))
    hits = [], []
    for number, picture in images.items():
        near = np.argsort(-(data["y"] @ picture))[:k]
        hits[0].append(number in data["id"][near])
    for number, text in zip(data["id"], data["y"], strict=True):
        near = np.argsort(-(pictures @ text))[:k]
        hits[1].append(number in [numbers[place] for place in near])
    return [np.mean(found) for found in hits]


@pytest.mark.parametrize("captions", [[1] * 16, [5] * 5, [1, 4, 2, 2, 7, 1], [3]])
def test_uneven_captions_agree_with_a_plain_count(towers, captions):
    data = draw(captions)
    found = retrieval.make(towers, splits_of(data), {"recall_at": (1, 3)})(jnp.float32(1), None)
    expected = {k: by_hand(data, k) for k in (1, 3)}
    for k, (there, back) in expected.items():
        assert found[f"retrieval/image_to_text_recall_at_{k}"] == pytest.approx(there)
        assert found[f"retrieval/text_to_image_recall_at_{k}"] == pytest.approx(back)
    mean = np.mean(list(expected.values()))
    assert found["retrieval/mean_recall"] == pytest.approx(mean)
    assert len(captions) < 2 or 0 < mean < 1


def test_the_first_row_of_an_image_counts(towers):
    x = unit(np.array([[1, 0], [0, 1], [0, 1], [0, 1.0]]))  # row 2 shows image 7 otherwise
    data = {"x": x, "y": unit(np.array([[1, 0.1], [0, 1], [1, 0.2], [0.1, 1]])), "id": [7, 3, 7, 3]}
    data["id"] = np.array(data["id"])
    found = retrieval.make(towers, splits_of(data), {"recall_at": 1})(jnp.float32(1), None)
    assert found["retrieval/mean_recall"] == 1
    assert found["retrieval/text_to_image_median_rank"] == 1


def test_distinct_ids_in_order_of_appearance():
    first, owner = retrieval.distinct(np.array([9, 2, 9, 5, 2, 9]))
    assert first.tolist() == [0, 1, 3]
    assert owner.tolist() == [0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("width", [3, 64, 257])
def test_equal_embeddings_find_no_more_than_chance(towers, width):
    one = unit(np.random.default_rng(width).normal(size=width))
    data = draw([5] * 21) | {"x": np.tile(one, (105, 1)), "y": np.tile(one, (105, 1))}
    found = retrieval.make(towers, splits_of(data))(jnp.float32(1), None)
    chances = []
    for k in (1, 5, 10):
        both = [f"retrieval/{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image")]
        chances.append(found[f"retrieval/chance_at_{k}"])
        assert np.mean([found[name] for name in both]) <= chances[-1]
    assert found["retrieval/mean_recall"] < np.mean(chances) / 2
    assert found["retrieval/image_to_text_median_rank"] > 50


def test_ranks_count_ties_and_do_not_depend_on_the_chunk():
    rng = np.random.default_rng(0)
    queries, gallery = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (13, 40))
    keys, gallery_keys = np.arange(13), np.arange(40) % 13
    expected = []
    for query, key in zip(queries, keys, strict=True):
        similarity = gallery @ query
        best = similarity[gallery_keys == key].max()
        expected.append((similarity[gallery_keys != key] >= best).sum())
    for chunk in (None, 1, 4, 13, 50):
        found = retrieval.ranks(queries, gallery, keys, gallery_keys, chunk)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("right", "total", "k"), [(1, 7, 3), (2, 7, 3), (5, 7, 3), (1, 4, 9)])
def test_chance_is_the_share_of_all_orders(right, total, k):
    draws = list(itertools.combinations(range(total), min(k, total)))
    share = np.mean([any(item < right for item in draw) for draw in draws])
    assert retrieval.chance(right, total, k) == pytest.approx(share)


def test_unrelated_embeddings_score_chance(towers):
    data = draw([2] * 300, width=16, signal=0.0)
    found = retrieval.make(towers, splits_of(data, 128), {"recall_at": (30,)})(jnp.float32(1), None)
    assert found["retrieval/chance_at_30"] == pytest.approx((0.0976 + 0.1) / 2, abs=1e-3)
    assert found["retrieval/mean_recall"] == pytest.approx(0.0988, abs=0.04)
    assert found["retrieval/text_to_image_median_rank"] == pytest.approx(150, abs=30)


def test_each_embedding_is_computed_once_for_the_same_parameters(towers):
    calls = []
    splits, params = splits_of(draw([2] * 9), calls=calls), jnp.float32(1)
    runs = [retrieval.make(towers, splits, {"recall_at": k}) for k in (1, 2)]
    first = [run(params, None) for run in runs]
    assert calls == ["test", "test"]
    again = runs[0](jnp.float32(1) * 1, None)
    assert calls == ["test"] * 4
    assert again == first[0] and again != first[1]


def pictured(data, text="a dog"):
    """Records whose image is white for the first image and black for others."""

    def record(split, row):
        assert split == "test"
        white = data["id"][row] == data["id"][0]
        return {"image": np.full((9, 9, 3), 255 * white, np.uint8), "text": f"{text} {row}"}

    return record


def share(picture, colour):
    """The share of pixels of a colour given as #rrggbb."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.mean(np.all(picture == np.array(wanted, np.uint8), axis=-1))


def test_the_picture_frames_right_and_wrong_answers(towers):
    data = draw([1] * 7, signal=100.0)
    run = retrieval.make(towers, splits_of(data, record=pictured(data)))
    good = run(jnp.float32(1), None)["pictures/retrieval"]
    assert good.dtype == np.uint8 and good.ndim == 3 and good.shape[2] == 3
    wrong = data | {"y": -data["y"]}  # what is right comes last
    run = retrieval.make(towers, splits_of(wrong, record=pictured(wrong)))
    bad = run(jnp.float32(1), None)["pictures/retrieval"]
    assert share(good, retrieval.RIGHT) > 0 and share(good, retrieval.WRONG) > 0
    assert share(bad, retrieval.RIGHT) == 0
    assert share(bad, retrieval.WRONG) > share(good, retrieval.WRONG)


def test_the_picture_shows_any_text_and_any_number_of_examples():
    for captions in ([1], [3], [1, 2]):
        data = draw(captions)
        first, owner = retrieval.distinct(data["id"])
        text = "cost: $5 $\\broken{ \n" * 9
        rows = first, np.arange(len(owner))
        picture = retrieval._gallery(pictured(data, text), rows, data["x"][first], data["y"], owner)
        assert picture.std() > 5


def test_rows_that_cannot_be_decoded_keep_the_numbers_of_the_others(towers):
    data, shown = draw([1] * 12, signal=100.0), []

    def record(split, row):
        shown.append(row)
        return pictured(data)(split, row)

    splits = splits_of(data, batch_size=5, bad=(0, 7), record=record)
    found = features.extract(towers, splits, "test", jnp.float32(1), None, "text_embeddings")
    assert found.rows.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    np.testing.assert_array_equal(found.features, data["y"][found.rows])
    found = retrieval.make(towers, splits)(jnp.float32(1), None)
    assert found["retrieval/image_to_text_recall_at_1"] == 1
    assert set(shown) <= set(range(12)) - {0, 7}


COLOURS = [f"{r} {g} {b}".split() for r in ("dark", "red") for g in ("low", "green") for b in "xy"]


def coloured(places, shuffle=None):
    """Records of one colour each, named by their texts: a number of 0..7 is its three bits. Of the
    training split every record is there twice, with the noun `thing`, and the last is broken."""
    places = {"train": np.tile(np.arange(8), 2), "test": np.asarray(places)}
    named = places if shuffle is None else places | {"train": shuffle}

    def record(split, row):
        if split == "train" and row == 16:
            raise Undecodable("nothing here")
        place, name = int(places[split][row]), int(named[split][row])
        bits = [place >> 2 & 1, place >> 1 & 1, place & 1]
        image = np.tile(np.uint8(bits) * 200, (30, 30, 1))
        return {"image": image, "text": " ".join(["A Thing:", *COLOURS[name]]), "id": row}

    return record


def floor_of(found):
    return {name: value for name, value in found.items() if "/floor_" in name}


def test_the_floor_knows_what_pixels_say(towers):
    data, calls = draw([1] * 8, signal=0.0), []
    known = coloured(np.random.default_rng(1).permutation(8))

    def record(split, row):
        calls.append(split)
        return known(split, row)

    splits = splits_of(data, record=record)
    run = retrieval.make(towers, splits, {"recall_at": (1, 3), "floor": True})
    found, asked = run(jnp.float32(1), None), calls.count("train")
    floor = floor_of(found)
    assert len(floor) == 7 and set(floor.values()) == {1.0}
    assert found["retrieval/mean_recall"] < 1
    assert floor_of(run(jnp.float32(1) * 1, None)) == floor and calls.count("train") == asked
    plain = retrieval.make(towers, splits, {"recall_at": (1, 3)})(jnp.float32(1), None)
    assert plain.keys() | floor.keys() == found.keys() and not floor_of(plain)


def test_the_probe_reads_words_off_patches(towers, monkeypatch):
    """Of images whose embeddings know nothing; and no more of the training split than it may."""
    places, read = np.arange(8), []
    bits = np.float32([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in places])
    data = draw([1] * 8, signal=0.0) | {"id": places, "bits": bits}

    def patches(params, extras, batch):
        read.append(len(batch["bits"]))
        return batch["bits"] * params

    predict, settings = towers | {"patches": patches}, {"recall_at": (1,), "probe": True}
    splits = splits_of(data, batch_size=4, record=coloured(places))
    found = retrieval.make(predict, splits, settings)(jnp.float32(1), None)
    assert found["retrieval/probe_mean_recall"] == 1 > found["retrieval/mean_recall"]
    assert len(read) == 4
    monkeypatch.setattr(floors, "RECORDS", 4)
    found = retrieval.make(predict, splits, settings)(jnp.float32(2), None)
    assert found["retrieval/probe_mean_recall"] < 1 and len(read) == 7
    with pytest.raises(UserError, match="no 'patches'; take retrieval out"):
        retrieval.make(towers, splits, settings)


def test_the_floor_of_unrelated_words_is_chance():
    rng, rows, recalls = np.random.default_rng(0), np.arange(8), []
    for _ in range(40):
        record = coloured(rows, np.tile(rng.permutation(8), 2))
        found = retrieval.both_ways(*floors.embed(record, rows, rows), rows)
        recalls.append([np.mean(rank < 1) for rank in found.values()])
    assert np.all(np.abs(np.mean(recalls, axis=0) - 1 / 8) < 0.07)


def test_equal_pixels_and_words_find_nothing():
    record, rows = coloured([3] * 37), np.arange(37)
    for rank in retrieval.both_ways(*floors.embed(record, rows, rows), rows).values():
        np.testing.assert_array_equal(rank, 36)


def test_rows_of_one_image_are_one_example_of_the_floor():
    def record(split, row):
        assert split == "train"
        if row == 6:
            raise IndexError
        return {
            "image": np.full((24, 24, 3), 51 * (row % 4), np.uint8),
            "text": f"Row {row}",
            "id": row % 3,
        }

    pixels, texts = floors.examples(record)
    np.testing.assert_allclose(pixels[:, 0], [0, 0.2, 0.4])
    assert pixels.shape == (3, 24 * 24 * 3)
    assert texts == ["Row 0 Row 3", "Row 1 Row 4", "Row 2 Row 5"]


def test_bags_weigh_words_by_how_rare_they_are():
    texts = ["a cat, a CAT", "a dog", "a dog runs", ""]
    weights = floors.word_weights(texts)
    expected = {"a": np.log(4 / 3), "cat": np.log(4), "dog": np.log(2), "runs": np.log(4)}
    assert weights == pytest.approx(expected)
    found = floors.bags(["cat a cat zebra", "zebra", ""], weights).toarray()
    row = np.array([weights["a"] * (n == "a") + 2 * weights["cat"] * (n == "cat") for n in weights])
    np.testing.assert_allclose(found, [row / np.linalg.norm(row), 0 * row, 0 * row])


@pytest.mark.parametrize("shape", [(9, 20), (20, 6)])
def test_leaving_one_out_in_closed_form(shape):
    rng = np.random.default_rng(3)
    x, bags = rng.normal(size=shape), np.abs(rng.normal(size=(shape[0], 5)))
    bags[:, 0] += x[:, 0]
    x -= x.mean(axis=0)
    basis, power = floors.principal(x)
    assert basis.shape == (shape[1], min(shape[0] - 1, shape[1]))
    np.testing.assert_allclose(x @ basis @ basis.T, x, atol=1e-12)
    penalties = (0.1, 3.0, 100.0)
    found = floors.leave_one_out(x @ basis, power, sparse.csr_array(bags), penalties)
    for penalty, value in zip(penalties, found, strict=True):
        places = []
        for row in range(len(x)):
            others, theirs = np.delete(x, row, 0), np.delete(bags, row, 0)
            gram = others.T @ others + penalty * np.eye(shape[1])
            near = bags @ (x[row] @ np.linalg.solve(gram, others.T @ theirs))
            places.append(1 + np.sum(near > near[row]))
        assert value == pytest.approx(np.mean(np.log(places)))
    assert len(set(found)) > 1


def test_what_cannot_be_scored_is_refused(towers):
    splits = splits_of(draw([1] * 4))
    for name in towers:
        others = {key: value for key, value in towers.items() if key != name}
        with pytest.raises(UserError, match=f"no '{name}'; take retrieval out of config.evalua"):
            retrieval.make(others, splits)
    with pytest.raises(UserError, match="config.eval.retrieval.recall_at is 0; give a positive"):
        retrieval.make(towers, splits, {"recall_at": (1, 0)})
    with pytest.raises(UserError, match="config.eval.retrieval has no key 'k'"):
        retrieval.make(towers, splits, {"k": 3})
    with pytest.raises(GuardStop, match="eval_data.test are not finite"):
        retrieval.make(towers, splits)(jnp.float32(np.nan), None)
    with pytest.raises(UserError, match="eval_data.test has no examples"):
        retrieval.make(towers, features.Splits(lambda split: iter(()), None))(jnp.ones(()), None)
    with pytest.raises(UserError, match="config.eval.retrieval.floor needs records"):
        retrieval.make(towers, splits, {"floor": True})

    def empty(split, row):
        raise Undecodable("nothing here") if row < 9 else IndexError

    run = retrieval.make(towers, splits_of(draw([1] * 4), record=empty), {"floor": True})
    with pytest.raises(UserError, match="finds no images with texts in eval_data.train; check"):
        run(jnp.float32(1), None)
