import json

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.evaluators import features, pictures


def drawn(image, *, mask=None, label=None, classes=None):
    """Splits of one batch, and a predict that reads its answers from that batch."""
    count = len(image)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(image),
        "maps": jnp.asarray(rng.normal(size=(count, 6, 5)), jnp.float32),  # 2x3 patches
        "looks": jnp.asarray(rng.uniform(size=(count, 4, 2, 3)), jnp.float32),
        "id": np.arange(count),
        "mask": np.ones(count, bool) if mask is None else mask,
    }
    if label is not None:
        batch["label"] = label
    predict = {
        "targets": lambda params, extras, batch: batch["maps"],
        "attention": lambda params, extras, batch: batch["looks"],
    }
    examples = {"image": np.zeros((2, 16, 24, 3), np.uint8), "mask": np.eye(2, 6) > 0}
    return predict, features.Splits(lambda split: iter([batch]), classes, lambda n: examples)


def is_picture(value):
    return value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3 and value.std() > 5


def test_all_three_are_drawn_for_raw_images():
    image = np.random.default_rng(1).integers(0, 255, (3, 16, 24, 3)).astype(np.uint8)
    predict, splits = drawn(image, label=np.array([0, 1, 1]), classes=("cat", "dog"))
    result = pictures.make(predict, splits, {"num_images": 2})({}, {})
    assert set(result) == {"pictures/masks", "pictures/targets", "pictures/attention"}
    assert all(is_picture(value) for value in result.values())


def test_only_what_the_model_predicts_is_drawn():
    predict, splits = drawn(np.zeros((1, 16, 24, 3), np.uint8))
    predict.pop("attention")  # the grid then follows from the image's shape
    assert set(pictures.make(predict, splits)({}, {})) == {"pictures/masks", "pictures/targets"}
    with pytest.raises(UserError, match="neither 'targets' nor 'attention' .*; take pictures out"):
        pictures.make({"features": None}, splits)


def test_padding_is_not_drawn():
    image = np.stack([np.full((16, 24, 3), value, np.uint8) for value in (10, 20, 30)])
    predict, splits = drawn(image, mask=np.array([True, True, False]))
    shown = pictures._first(predict, splits, 8, {}, {})
    np.testing.assert_allclose(shown["image"][:, 0, 0, 0] * 255, [10, 20], rtol=1e-5)
    assert shown["names"].tolist() == ["", ""]
    assert len(shown["targets"]) == len(shown["attention"]) == 2


def test_images_come_over_as_many_batches_as_needed():
    predict, splits = drawn(np.zeros((3, 16, 24, 3), np.uint8))
    batch = next(iter(splits.batches("test")))
    repeated = features.Splits(lambda split: iter([batch] * 5), None)
    assert len(pictures._first(predict, repeated, 7, {}, {})["image"]) == 7
    assert len(pictures._first(predict, repeated, 99, {}, {})["image"]) == 15


def test_normalised_images_are_taken_back():
    raw = np.random.default_rng(0).uniform(size=(2, 4, 4, 3))
    normalised = (raw - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(pictures.raw_image(normalised), raw, atol=1e-6)
    np.testing.assert_allclose(pictures.raw_image(np.full((1, 1, 1, 3), 51, np.uint8)), 0.2)
    predict, splits = drawn(2 * raw[:, :, [0, 1, 2, 3, 2, 1]] - 1)  # of 2x3 patches
    splits.normalization = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    shown = pictures._first(predict, splits, 2, {}, {})["image"]
    np.testing.assert_allclose(shown[:, :, :4], raw, atol=1e-6)


def test_enlarged_patches_cover_their_pixels():
    maps = np.arange(6).reshape(1, 2, 3, 1)
    expected = np.kron(maps[0, ..., 0], np.ones((4, 8)))
    np.testing.assert_array_equal(pictures._enlarge(maps, (8, 24))[0, ..., 0], expected)


def test_equal_targets_get_equal_colours_and_different_ones_differ():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 16))
    layout = rng.integers(0, 3, (2, 4, 4))
    colours = pictures.principal_colours(kinds[layout] * 5)
    assert colours.shape == (2, 4, 4, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    means = []
    for kind in range(3):
        of_kind = colours[layout == kind]
        np.testing.assert_allclose(of_kind, of_kind[:1].repeat(len(of_kind), 0), atol=1e-6)
        means.append(of_kind[0])
    assert min(np.abs(means[a] - means[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 0.5


def test_collapsed_targets_are_drawn_not_fatal():
    assert np.isfinite(pictures.principal_colours(np.ones((2, 4, 4, 8)))).all()
    assert pictures.principal_colours(np.ones((1, 2, 2, 2))).shape == (1, 2, 2, 3)


def test_masks_are_those_of_training():
    mask = np.zeros((2, 3, 6), bool)  # three masks an image, of 2x3 patches
    mask[:, 0, 4] = True
    image = np.full((2, 16, 24, 3), 255, np.uint8)
    splits = features.Splits(iter, None, lambda count: {"image": image, "mask": mask})
    [(name, (images, hidden))] = pictures._training_masks(splits, 2).items()
    assert name == "" and images.shape == (2, 16, 24, 3) and images.max() == 1
    np.testing.assert_array_equal(hidden[0], [[False, False, False], [False, True, False]])
    assert is_picture(pictures.draw_masks({"": (images, hidden)}))


def test_every_part_of_a_mixture_with_images_shows_its_masks():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 255, (2, 2, 16, 24, 3)).astype(np.uint8)
    masks = rng.random((2, 2, 6)) < 0.5
    examples = {"images": {"image": images[0], "mask": masks[0]}, "texts": {"tokens": 0}}
    examples["pairs"] = {"image": images[1], "mask": masks[1], "tokens": 0}
    splits = features.Splits(iter, None, lambda count: examples)
    found = pictures._training_masks(splits, 2)
    assert list(found) == ["images", "pairs"]
    for part, (shown, hidden) in zip(("images", "pairs"), found.values(), strict=True):
        np.testing.assert_allclose(shown * 255, examples[part]["image"], atol=1e-4)
        np.testing.assert_array_equal(hidden.reshape(2, 6), examples[part]["mask"])
    both, one = pictures.draw_masks(found), pictures.draw_masks({"": found["images"]})
    assert is_picture(both) and both.shape[0] > 1.7 * one.shape[0]
    predict, splits = drawn(images[0])
    splits.examples = lambda count: {"texts": {"tokens": 0}}
    assert "pictures/masks" not in pictures.make(predict, splits)({}, {})


def test_no_images_are_refused():
    splits = features.Splits(lambda split: iter([{"mask": np.ones(1, bool)}]), None)
    run = pictures.make({"attention": None}, splits)
    with pytest.raises(UserError, match="no images to draw; name .*fields.image"):
        run({}, {})


def write(path, lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_curves_draw_every_kind_of_value(tmp_path):
    lines = [
        {"step": n, "loss": 1 / n, "target_std": 0.5, "learning_rate": 1e-3, "note": "x"}
        for n in range(1, 200)
    ]
    lines[50]["loss"] = float("nan")
    lines[60]["effective_rank/features"] = 12.5
    whole = pictures.curves(write(tmp_path / "a.jsonl", lines))
    torn = pictures.curves(write(tmp_path / "b.jsonl", lines, '{"step": 200, "lo'))
    assert is_picture(whole)
    np.testing.assert_array_equal(whole, torn)
    bare = pictures.curves(write(tmp_path / "c.jsonl", [{"step": 1}]))
    assert bare.shape == whole.shape
    assert np.any(bare != whole)
    assert pictures.curves(write(tmp_path / "d.jsonl", [])).shape == whole.shape


def test_curves_name_a_missing_file_and_a_broken_line(tmp_path):
    with pytest.raises(UserError, match="no metrics at .*gone.jsonl; name the metrics.jsonl"):
        pictures.curves(tmp_path / "gone.jsonl")
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 of .*m.jsonl is no metrics object; "):
        pictures.curves(path)


def test_running_mean():
    from bivl.evaluators.curves import _running_mean

    values = np.arange(10.0)
    np.testing.assert_allclose(_running_mean(values, 3)[1:-1], values[1:-1])
    np.testing.assert_allclose(_running_mean(values, 3)[[0, -1]], [0.5, 8.5])


def test_open_figures_of_a_notebook_are_left_alone():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    settings = dict(matplotlib.rcParams)
    pictures.draw_masks({"": (np.zeros((1, 4, 4, 3)), np.eye(2, dtype=bool)[None])})
    assert pyplot.get_fignums() == before
    assert dict(matplotlib.rcParams) == settings
