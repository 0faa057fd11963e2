"""What pixels alone know of the words: ridge regression, the floor of retrieval; and features.

Images are 24x24 RGB values in 0..1 less their mean. Texts are bags of words (`\\w+` in lower case),
each word weighted by ln(N / df), of N training images those df whose texts have the word; bags have
unit length. The penalty is the one of PENALTIES that finds the texts of training images best when
each is left out in turn, which costs no further fit: its prediction is (p - h y) / (1 - h) with the
prediction p of all, the bag y and the leverage h (Allen's PRESS). The test split chooses nothing.
"""

import itertools
import math
import re
from collections import Counter

import numpy as np
from PIL import Image
from scipy import sparse

from bivl.core.errors import Undecodable, UserError
from bivl.data import augment

SIDE = 24
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
RECORDS = 5000  # the first so many of the training split are read
WORDS = 20_000  # the words in most texts, where there are more


def embed(record, image_rows, text_rows):
    """Vectors of images [M, R] and of texts [N, R], float32, of the rows of the test split; their
    inner products are the cosines of the words predicted from an image and those of a text.

    record: as in `features.Splits`, of splits with `image` and `text`. Raises UserError where the
    training split has none that can be decoded.
    """
    known = examples(record)
    images = np.stack([shrink(record("test", int(row))["image"]) for row in image_rows])
    texts = [record("test", int(row))["text"] for row in text_rows]
    return regress(*known, images, texts)


def probe(record, known, images, text_rows):
    """As `embed`, from features in the place of pixels: a linear probe.

    known: `features.Features` of the training split; images [M, E], features of the test split.
    Features are scaled so that the mean square of a row less the mean is 100, about that of pixels.
    """
    _, first, owner = np.unique(known.ids, return_index=True, return_inverse=True)
    texts: list[list[str]] = [[] for _ in first]
    for place, row in zip(owner, known.rows, strict=True):
        texts[place].append(record("train", int(row))["text"])
    x = known.features[first]
    scale = 10 / np.sqrt(np.mean(np.sum((x - x.mean(axis=0)) ** 2, axis=1)))
    asked = [record("test", int(row))["text"] for row in text_rows]
    return regress(scale * x, [" ".join(found) for found in texts], scale * images, asked)


def regress(x, texts, images, asked):
    """Ridge regression from x [N, P] to the words of N texts; -> vectors of images [M, P] and of
    texts `asked`, as `embed` gives them."""
    mean, weights = x.mean(axis=0), word_weights(texts)
    known, (basis, power) = bags(texts, weights), principal(x - mean)
    scores = (x - mean) @ basis
    penalty = PENALTIES[int(np.argmin(leave_one_out(scores, power, known)))]
    table = known.T @ scores  # [V, R]: a text is the sum of its words' rows, weighted
    images = (images - mean) @ basis / (power + penalty)
    length = np.sqrt(np.maximum(np.sum(images @ (table.T @ table) * images, axis=1), 0))
    images = images / np.maximum(length, 1e-12)[:, None]
    texts = bags(asked, weights) @ table
    # Products of equal rows may differ in their last bits: rounding makes them ties again.
    return images.astype(np.float32), texts.astype(np.float32)


def examples(record):
    """Pixels [N, SIDE * SIDE * 3] in 0..1 and texts, N strings, of the first RECORDS of the
    training split. Rows with the same id are one image: its first row's, with the texts of all."""
    pixels, texts = {}, {}
    for row in range(RECORDS):
        try:
            found = record("train", row)
        except IndexError:
            break  # the end
        except Undecodable:
            continue
        key = int(found["id"])
        if key not in pixels:
            pixels[key], texts[key] = shrink(found["image"]), []
        texts[key].append(found["text"])
    if not pixels:
        raise UserError(
            "config.eval.retrieval.floor finds no images with texts in eval_data.train; check "
            "eval_data.train.split or set it to False"
        )
    return np.stack(list(pixels.values())), [" ".join(found) for found in texts.values()]


def shrink(image):
    """uint8 [H, W, 3] -> [SIDE * SIDE * 3] in 0..1."""
    picture = augment.resize(Image.fromarray(np.asarray(image)), (SIDE, SIDE))
    return np.asarray(picture).reshape(-1) / 255


def words(text):
    """The words of a text, in order."""
    return re.findall(r"\w+", text.lower())


def word_weights(texts) -> dict[str, float]:
    """The weight ln(N / df) of each word of N texts; see WORDS."""
    counts = Counter(itertools.chain.from_iterable(sorted(set(words(text))) for text in texts))
    return {word: math.log(len(texts) / df) for word, df in counts.most_common(WORDS)}


def bags(texts, weights):
    """Sparse [N, V] of rows of unit length; words without a weight count for nothing."""
    columns = {word: column for column, word in enumerate(weights)}
    cells = [
        (row, columns[word])
        for row, text in enumerate(texts)
        for word in words(text)
        if word in columns
    ]
    rows, places = np.array(cells, int).reshape(-1, 2).T
    values = np.array(list(weights.values()), float)[places]
    whole = sparse.csr_array((values, (rows, places)), (len(texts), len(weights)))
    length = np.sqrt(whole.multiply(whole).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(length, 1e-12)) @ whole)


def principal(x):
    """x [N, P] -> orthonormal directions [P, R] that span its rows, and the sum of squares of x
    along each [R]. One eigendecomposition, of the smaller of the two products of x with itself."""
    wide = len(x) < x.shape[1]
    power, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = power > 1e-10 * max(power[-1], 1e-10)
    power, vectors = power[kept], vectors[:, kept]
    return (x.T @ vectors / np.sqrt(power) if wide else vectors), power


def leave_one_out(scores, power, targets, penalties=PENALTIES):
    """How far behind a row's target lies among all targets, in order of their inner product with
    what the other rows predict for it: the mean log of its place (1 is best), each penalty's [K].

    scores [N, R]: x along the directions of `principal(x)`, with their power [R], x less a mean
    that stays as it is; targets: sparse [N, V]. Equal products count against the row.
    """
    along, own = targets @ (targets.T @ scores), (targets @ targets.T).toarray()
    places = []
    for penalty in penalties:
        shrunk = scores / (power + penalty)
        leverage = np.sum(shrunk * scores, axis=1, keepdims=True)
        products = shrunk @ along.T - leverage * own  # times 1 - leverage, which changes no order
        place = np.sum(products >= np.diag(products)[:, None], axis=1)
        places.append(np.mean(np.log(place)))
    return np.array(places)
