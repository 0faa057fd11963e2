"""Pictures of where words look: attention from the words of test texts to the patches of their
images, in the last layer.

One softmax runs over patches and tokens together, so a word's attention to the image sums to less
than 1, and to a number of its own.
"""

import re
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from bivl.core.distributed import to_host
from bivl.core.errors import UserError
from bivl.evaluators import features
from bivl.evaluators.curves import DPI, FAINT, INK, render
from bivl.evaluators.pictures import overlay, raw_image, signed_overlay

NEEDS = ("image", "text")  # fields that both splits must have
LETTERS = 16  # of a word that the picture shows


class Pair(NamedTuple):
    """What a row shows."""

    image: np.ndarray
    """Float [H, W, 3] in 0..1."""
    words: tuple[str, ...]
    maps: np.ndarray
    """[W, h, w], a word's attention to each patch, the mean over its tokens and over heads."""


def make(predict, splits, config=None):
    """Pictures of attention between modalities, as `run(params, extras) -> dict of uint8 arrays`.

    predict["cross_attention"] gives [B, H, T, h, w], the attention of token t to the patches, and
    predict["text_embeddings"] the vectors that retrieval reads (here they tell which rows of the
    test split can be read). Settings: `num_pairs` 6, evenly spread over the test split, and
    `num_words` 6, the first of each text. Results, of process 0 alone: `pictures/words`, attention
    on one scale a row, and `pictures/words_apart`, the same less its mean over the row's words,
    which shows what they differ in.
    Raises UserError for an objective without these predictions and splits without texts.
    """
    options = features.settings(config, "cross_attention", num_pairs=6, num_words=6)
    count, limit = (
        features.number(value, f"config.eval.cross_attention.{name}")
        for name, value in options.items()
    )
    features.require(predict, "cross_attention", "cross_attention", "text_embeddings")
    if splits.record is None or splits.texts is None:
        raise UserError("cross_attention needs images with texts; take it out of config.evaluators")

    def run(params, extras):
        found = features.extract(predict, splits, "test", params, extras, "text_embeddings")
        pairs = _pairs(predict, splits, _spread(found.rows, count), limit, params, extras)
        if jax.process_index():
            return {}
        return {
            "pictures/words": draw_words(pairs, limit),
            "pictures/words_apart": draw_words_apart(pairs, limit),
        }

    return run


def _spread(rows, count):
    """`count` of rows [N], or all, in the middles of equal parts: data often lie in the order of
    classes."""
    shown = min(count, len(rows))
    return rows[((np.arange(shown) + 0.5) * len(rows) / shown).astype(int)]


def _pairs(predict, splits, rows, limit, params, extras) -> list[Pair]:
    """The rows of the test split, with attention of at most `limit` words each."""
    records = [splits.record("test", int(row)) for row in rows]
    names = [[match.group() for match in _words(record["text"], limit)] for record in records]
    ends, like = _word_ends(splits.texts, records, limit)
    batch = {
        name: _placed(np.stack([np.asarray(record[name]) for record in records]), like)
        for name in ("image", "tokens")
    }
    weights = to_host(predict["cross_attention"](params, extras, batch))
    pairs = []
    for record, words, stops, heads in zip(records, names, ends, weights, strict=False):
        spans = list(zip(stops, stops[1:], strict=False))
        kept = [index for index, (start, stop) in enumerate(spans) if start < stop]
        each = heads.astype(np.float32).mean(axis=0)  # [T, h, w]
        maps = [each[slice(*spans[index])].mean(axis=0) for index in kept]
        maps = np.stack(maps) if maps else np.zeros((0, *each.shape[1:]))
        image = raw_image(np.asarray(record["image"]), splits.normalization)
        pairs.append(Pair(image, tuple(words[index] for index in kept), maps))
    return pairs


def _words(text, limit):
    return list(re.finditer(r"\S+", text))[:limit]


def _word_ends(texts, records, limit):
    """Where words end among a record's tokens: [start of the first, its end, that of the second,
    ...] a record, and a global array of tokens that shows how batches lie on the devices.

    No tokenizer is asked: the tokens of a text's beginning, up to the end of a word, are those of
    the whole text, until </s> follows. Behind the last word of all stands one more, so that there
    too something differs. Words that were cut off end where the last one that was not does.
    """
    beginnings, owners = [], []
    for owner, record in enumerate(records):
        text, words = record["text"], _words(record["text"], limit)
        cuts = ["", *(text[: match.end()] for match in words)]
        if words and cuts[-1] == text.rstrip():
            cuts[-1] = f"{text.rstrip()} {words[0].group()}"
        beginnings += cuts
        owners += [owner] * len(cuts)
    ends, like, place = [[] for _ in records], None, 0
    for batch in texts(beginnings):
        like = batch["tokens"]
        for row in to_host(like)[np.asarray(batch["mask"], bool)]:
            whole = np.asarray(records[owners[place]]["tokens"])
            shared = min(len(row), len(whole))
            differs = np.append(row[:shared] != whole[:shared], True)
            ends[owners[place]].append(int(differs.argmax()))
            place += 1
    return ends, like


def _placed(values, like):
    """values [n, ...] on the devices as the rows of the global array `like` are, the last value
    repeated until the rows can be divided."""
    parts = len(like) // like.sharding.shard_shape(like.shape)[0]
    size = -(-len(values) // parts) * parts
    rows = values[np.minimum(np.arange(size), len(values) - 1)]
    return jax.make_array_from_callback(rows.shape, like.sharding, lambda index: rows[index])


def draw_words(pairs, limit):
    """Pairs -> picture; within a row equal colours are equal attention."""
    rows = []
    for pair in pairs:
        images = np.repeat(pair.image[None], len(pair.maps), axis=0)
        shares = [f"{share:.0%}" for share in pair.maps.sum(axis=(1, 2))]
        tiles = overlay(images, pair.maps, pair.maps.max(initial=0))
        rows.append((pair, tiles, ["", *shares]))
    title = "Attention of words to patches in the last layer, mean over heads"
    note = "one scale a row, bright = much; in percent, what of a word's attention the image gets"
    return _sheet(rows, title, note, limit)


def draw_words_apart(pairs, limit):
    """Pairs -> picture of each word's attention less the mean of its row.

    The scale that stands under an image tells small differences from large ones.
    """
    rows = []
    for pair in pairs:
        images = np.repeat(pair.image[None], len(pair.maps), axis=0)
        apart = pair.maps - pair.maps.sum(axis=0) / max(len(pair.maps), 1)
        most, top = np.abs(apart).max(initial=0), pair.maps.max(initial=0)
        scale = f"scale ±{most / max(top, 1e-12):.1%}"
        rows.append((pair, signed_overlay(images, apart, most), [scale] + [""] * len(apart)))
    title = "Attention of words to patches, less the mean over the row's words"
    note = "red = more than that, blue = less; scale: the strongest colour in the row, in percent "
    return _sheet(rows, title, f"{note}of the highest attention in it", limit)


def _sheet(rows, title, note, limit, tile=1.25):
    """A picture of rows (pair, tiles [W, H, W, 3], remarks below the image and the tiles)."""
    size = (max(tile * (limit + 1), 6.0) + 0.2, (tile + 0.28) * len(rows) + 0.7)
    figure = Figure(figsize=size, dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), limit + 1, squeeze=False)
    for axes, (pair, tiles, remarks) in zip(grid, rows, strict=True):
        titles, images = ("", *map(_short, pair.words)), (pair.image, *tiles)
        for axis, image, word, remark in zip(axes, images, titles, remarks, strict=False):
            _tile(axis, image, word, remark)
        for axis in axes[len(images) :]:
            axis.set_axis_off()
    figure.suptitle(f"{title}\n", fontsize=11, color=INK)
    figure.text(0.5, 1 - 0.36 / size[1], note, ha="center", fontsize=8, color=INK)
    return render(figure)


def _tile(axis, image, word, remark):
    axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=FAINT, linewidth=0.6)
    axis.set_title(word, fontsize=8, color=INK, pad=3, parse_math=False)
    axis.set_xlabel(remark, fontsize=7, color=INK, labelpad=1)


def _short(word):
    bare = word.strip(".,;:!?\"'()[]“”") or word
    return bare if len(bare) <= LETTERS else f"{bare[: LETTERS - 1]}…"
