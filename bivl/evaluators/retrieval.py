"""Retrieval between images and texts: recall at K, after the Karpathy splits' protocol.

A text belongs to the image of its row, and rows with the same id are one image (COCO's five
captions are five rows), of which the first row's counts. An image finds if any of its texts is
among its K nearest, a text if its image is; nearness is the inner product of unit vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bivl.core.errors import UserError
from bivl.evaluators import features, floors
from bivl.evaluators.curves import COLOURS, DPI, FAINT, INK, render
from bivl.evaluators.knn import CELLS
from bivl.evaluators.pictures import raw_image

NEEDS = ("image", "text")  # fields that both splits must have
SHOWN, NEAREST = 4, 5  # the picture: so many questions each way, so many answers to each
RIGHT, WRONG = COLOURS[2], COLOURS[4]
WORDS = 60  # characters of a text that the picture shows


def make(predict, splits, config=None):
    """Recall of predict["image_embeddings"] and predict["text_embeddings"], both [B, E] of unit
    length, as `run(params, extras) -> dict`.

    Settings: `recall_at` (1, 5, 10), `floor` False, `probe` False. Results, over the images and
    texts of the test split: `retrieval/image_to_text_recall_at_K`,
    `retrieval/text_to_image_recall_at_K`, the mean of all these `retrieval/mean_recall`,
    `retrieval/chance_at_K`, what the mean of both directions is in random order,
    `retrieval/image_to_text_median_rank` and `retrieval/text_to_image_median_rank` (1 is best), and
    `pictures/retrieval`, a few answers of each direction. With `floor` all but chance again as
    `retrieval/floor_...`: what ridge regression from the pixels to the words of eval_data.train
    finds (evaluators/floors.py). With `probe` again as `retrieval/probe_...`: the same from
    predict["patches"], [B, N D], the frozen patches side by side, of the first floors.RECORDS
    images. Picture, floor and probe are process 0's alone.
    Equal similarities count against the model. Raises UserError for an objective without these
    predictions, an empty split and settings that are no positive numbers.
    """
    options = features.settings(config, "retrieval", recall_at=(1, 5, 10), floor=False, probe=False)
    recall_at = features.numbers(options["recall_at"], "config.eval.retrieval.recall_at")
    features.require(predict, "retrieval", "image_embeddings", "text_embeddings")
    for name in ("floor", "probe"):
        if options[name] and not splits.record:
            cure = "needs records, here are none; set it to False"
            raise UserError(f"config.eval.retrieval.{name} {cure}")
    if options["probe"]:
        features.require(predict, "retrieval", "patches")
    few = _first(splits, floors.RECORDS)
    floor = {}  # the data do not change between calls: measured once

    def run(params, extras):
        images, texts = (
            features.extract(predict, splits, "test", params, extras, f"{name}_embeddings")
            for name in ("image", "text")
        )
        first, owner = distinct(images.ids)
        ours, captions = images.features[first], np.bincount(owner)
        result = summary(both_ways(ours, texts.features, owner), captions, recall_at)
        if options["probe"]:  # all processes take part
            known, asked = (
                features.extract(predict, few, split, params, extras, "patches")
                for split in ("train", "test")
            )
        if splits.record and jax.process_index() == 0:
            rows = images.rows[first], texts.rows
            if options["probe"]:
                found = floors.probe(splits.record, known, asked.features[first], texts.rows)
                result |= summary(both_ways(*found, owner), captions, recall_at, "probe_")
            if options["floor"] and not floor:
                found = both_ways(*floors.embed(splits.record, *rows), owner)
                floor.update(summary(found, captions, recall_at, "floor_"))
            picture = _gallery(splits.record, rows, ours, texts.features, owner)
            result |= floor | {"pictures/retrieval": picture}
        return result

    return run


def _first(splits, count: int):
    """Splits of which the training split ends after `count` examples or a few more."""

    def batches(split):
        left = count
        for batch in splits.batches(split):
            yield batch
            left -= int(np.sum(batch["mask"]))
            if split == "train" and left <= 0:
                return

    return dataclasses.replace(splits, batches=batches, memory={})


def distinct(ids):
    """ids [N] of rows -> first [M], the first row of each distinct id in order of appearance, and
    owner [N] in 0..M-1, which of them has the row's id."""
    _, first, owner = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[owner]


def both_ways(images, texts, owner) -> dict[str, np.ndarray]:
    """`ranks` by direction of images [M, E] and texts [N, E]; owner [N]: each text's image."""
    places = np.arange(len(images))
    return {
        "image_to_text": ranks(images, texts, places, owner),
        "text_to_image": ranks(texts, images, owner, places),
    }


def summary(found, captions, recall_at, prefix="") -> dict[str, float]:
    """The numbers that `make` lists, from ranks by direction and the texts of each image [M].

    With a prefix their names begin with it and chance, which is everyone's, is left out.
    """
    result, recalls = {}, []
    for direction, rank in found.items():
        for k in recall_at:
            recalls.append(float(np.mean(rank < k)))
            result[f"retrieval/{prefix}{direction}_recall_at_{k}"] = recalls[-1]
        result[f"retrieval/{prefix}{direction}_median_rank"] = float(np.median(rank) + 1)
    result[f"retrieval/{prefix}mean_recall"] = float(np.mean(recalls))
    for k in () if prefix else recall_at:
        text_chance = np.mean([chance(count, captions.sum(), k) for count in captions])
        image_chance = chance(1, len(captions), k)
        result[f"retrieval/chance_at_{k}"] = float(text_chance + image_chance) / 2
    return result


def chance(right: int, total: int, k: int) -> float:
    """How likely one of the first k of `total` things in random order is one of the right ones."""
    drawn = np.arange(min(k, total))
    return float(1 - np.prod(np.maximum(total - right - drawn, 0) / (total - drawn)))


def ranks(queries, gallery, keys, gallery_keys, chunk=None):
    """How many wrong answers are at least as near as the best right one: int32 [N], 0 is best.

    queries [N, E] with keys [N], gallery [M, E] with gallery_keys [M]; an answer is right if it has
    the query's key (every query needs one). Ties count as wrong, so that equal vectors help
    nobody. `chunk` queries are compared at a time (None: as many as fit CELLS similarities).
    """
    chunk = chunk or max(1, min(len(queries), CELLS // len(gallery)))
    chunks = -(-len(queries) // chunk)
    # Repeated rows fill the last chunk, so that every chunk has one shape and compiles once.
    index = np.minimum(np.arange(chunks * chunk), len(queries) - 1)
    gallery, gallery_keys = jnp.asarray(gallery), jnp.asarray(gallery_keys)
    found = [
        np.asarray(_ahead(queries[rows], gallery, keys[rows], gallery_keys))
        for rows in np.split(index, chunks)
    ]
    return np.concatenate(found)[: len(queries)]


@jax.jit
def _ahead(queries, gallery, keys, gallery_keys):
    """`ranks` of one chunk."""
    # The default precision of a TPU (bfloat16 products) would reorder close neighbours. Right and
    # wrong similarities come out of one product: two would round differently and break ties.
    similarity = jnp.matmul(queries, gallery.T, precision="highest")  # [N, M]
    right = keys[:, None] == gallery_keys
    best = jnp.max(jnp.where(right, similarity, -jnp.inf), axis=1, keepdims=True)
    return jnp.sum(~right & (similarity >= best), axis=1, dtype=jnp.int32)


def _gallery(record, rows, images, texts, owner):
    """The picture of a few images with their nearest texts, and texts with their nearest images.

    record: as in `Splits`; rows: those of the images [M] and of the texts [N] in the test split.
    """
    image_rows, text_rows = rows
    asked = _spread(len(images)), _spread(len(texts), 0.5)
    answers = (
        _nearest(images[asked[0]], texts, asked[0][:, None] == owner),
        _nearest(texts[asked[1]], images, owner[asked[1]][:, None] == np.arange(len(images))),
    )

    def image(place):
        return raw_image(np.asarray(record("test", int(image_rows[place]))["image"]))

    def text(place):
        return record("test", int(text_rows[place]))["text"]

    left = [
        (image(query), [(text(place), owner[place] == query) for place in places])
        for query, places in zip(asked[0], answers[0], strict=True)
    ]
    right = [
        (text(query), [(image(place), owner[query] == place) for place in places])
        for query, places in zip(asked[1], answers[1], strict=True)
    ]
    return draw_answers(left, right)


def _spread(count, offset=0.0):
    """SHOWN places or fewer, evenly over 0..count-1 (data often lie in the order of classes)."""
    shown = min(SHOWN, count)
    return ((np.arange(shown) + offset) * count / shown).astype(int)


def _nearest(queries, gallery, right):
    """Places of the NEAREST answers to queries [n, E]: int [n, k]; of equal ones the wrong first.

    right: bool [n, M].
    """
    similarity = queries @ gallery.T
    return np.stack([np.lexsort(pair)[:NEAREST] for pair in zip(right, -similarity, strict=True)])


def draw_answers(image_answers, text_answers):
    """(image, [(text, right), ...]) and (text, [(image, right), ...]) a row -> picture.

    Images are float [H, W, 3] in 0..1; right answers are green, wrong ones red.
    """
    lines = max(len(image_answers), len(text_answers))
    figure = Figure(figsize=(14.5, 1.6 * lines + 0.8), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.12, wspace=0, hspace=0)
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.1)))
    left.suptitle("Images and their nearest texts", fontsize=11, color=INK)
    right.suptitle("Texts and their nearest images", fontsize=11, color=INK)
    grid = left.subplots(lines, 2, squeeze=False, width_ratios=(1, 3.4))
    for axes, (image, texts) in zip(grid, image_answers, strict=False):
        _tile(axes[0], image, FAINT)
        for place, (text, correct) in enumerate(texts):
            colour, height = RIGHT if correct else WRONG, 1 - (place + 0.5) / NEAREST
            _write(axes[1].text, 0, height, _short(text), color=colour, va="center", fontsize=9)
    _blank(grid)
    grid = right.subplots(lines, NEAREST, squeeze=False)
    for axes, (text, images) in zip(grid, text_answers, strict=False):
        for axis, (image, correct) in zip(axes, images, strict=False):
            _tile(axis, image, RIGHT if correct else WRONG, 2.5)
        # A text is as wide as several images and must not widen the first one's column.
        _write(axes[0].set_title, _short(text), color=INK, loc="left", fontsize=9, in_layout=False)
    _blank(grid)
    return render(figure)


def _write(method, *args, **options):
    """Text on a picture as it stands; a dollar sign starts no formula."""
    method(*args, parse_math=False, **options)


def _short(text):
    line = " ".join(text.split())
    return line if len(line) <= WORDS else f"{line[: WORDS - 1]}…"


def _tile(axis, image, colour, linewidth=0.6):
    axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=colour, linewidth=linewidth)


def _blank(grid):
    """Takes the frames off axes that hold no image."""
    for axis in grid.flat:
        if not axis.images:
            axis.set_axis_off()
