"""Images and texts for two encoders that never see each other's tokens, and their embeddings as
CLIP has them (arXiv 2103.00020, openai/CLIP `clip/model.py`), or ALIGN (arXiv 2102.05918).

A batch has image uint8 [B, S, S, 3], tokens int32 [B, L] or both; a text is `bos ... eos`, and
nothing behind its end is ever read by it.

Config keys read here: batch_size, image_size, augment, image_mean, image_std; pair.length, of texts
in training and evaluation; tokenizer; model.towers, which of `image` and `text` there are; of the
image tower model.{trunk, patch_size, width} or model.{trunk, strides}, of the text's
model.text.{width, rows, vocabulary, pool, end, pad}.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.modalities import image, labels, text
from bivl.models.attention import causal_bias
from bivl.models.layers import (
    Embedding,
    PatchEmbed,
    Vector,
    constrain_tokens,
    spread,
    torch_uniform,
)
from bivl.models.positions import LearnedPositions
from bivl.models.towers import MODALITIES
from bivl.models.transformer import Tokens

POOLS = ("end", "highest", "first")
TRUNKS = ("transformer", "efficientnet")


def convolutional(config) -> bool:
    """Whether the image tower is an EfficientNet."""
    trunk = config.model.get("trunk", TRUNKS[0])
    return choice("model.trunk", trunk, TRUNKS) == "efficientnet"


def grid(config) -> tuple[int, int]:
    """Patches down and across."""
    return image.grid(config)


def present(config) -> tuple[str, ...]:
    """The towers there are."""
    for name in config.model.towers or ("",):
        choice("model.towers", name, MODALITIES)
    return tuple(name for name in MODALITIES if name in config.model.towers)


def spec(config) -> dict[str, jax.ShapeDtypeStruct]:
    """image uint8 [B, S, S, 3] and tokens int32 [B, L], of the towers there are."""
    found, length = {}, config.pair.length
    if "image" in present(config):
        found |= image.inputs(config)
    if "text" in present(config):
        if not 3 <= length <= config.model.text.rows:
            raise UserError(
                f"config.pair.length={length} must lie between 3 and "
                f"model.text.rows={config.model.text.rows}"
            )
        found["tokens"] = jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32)
    return found


def _tokens(config):
    """-> function record -> int32 [pair.length]; None where no tower reads texts."""
    if "text" not in present(config):
        return None
    tokenizer, length = tokenizers.load(config.tokenizer), config.pair.length
    return lambda record: text.padded(
        text.record_ids(tokenizer, record, length), length, tokenizer.pad
    )


def train_ops(config):
    """record, rng -> {image, tokens}."""
    images = image.train_image(config) if "image" in present(config) else None
    tokens = _tokens(config)

    def ops(record, rng):
        found = {"image": images(record, rng)} if images else {}
        return found | ({"tokens": tokens(record)} if tokens else {})

    return ops


def eval_ops(config):
    """record -> {image?, tokens?, label?, id?} of the towers there are."""
    images = image.eval_ops(config) if "image" in present(config) else None
    tokens = _tokens(config)

    def ops(record):
        found = {k: labels.number(record[k]) for k in ("label", "id") if k in record}
        if images and "image" in record:
            found |= images(record)
        if tokens and "text" in record:
            found["tokens"] = tokens(record)
        return found

    return ops


def preprocess(config):
    """image=[...], text=[...] or both -> numpy batch: image float32 [B, S, S, 3], normalised;
    tokens int32 [B, L] and padding bool [B, L], True behind a text's end, L the longest of the
    batch, at most `model.text.rows`."""
    images, towers = image.preprocess(config), present(config)

    def texts(given):
        if isinstance(given, str) or not len(given):
            raise UserError("preprocess wants text=[...], a list of texts")
        tokenizer, rows = tokenizers.load(config.tokenizer), config.model.text.rows
        ids = [text.encode_pair(tokenizer, item, None, rows) for item in given]
        lengths = np.array([len(row) for row in ids])
        tokens = np.stack([text.padded(row, max(lengths), tokenizer.pad) for row in ids])
        return {"tokens": tokens, "padding": np.arange(max(lengths)) >= lengths[:, None]}

    def ops(image=None, text=None):
        given = {"image": image, "text": text}
        if image is None and text is None:
            raise UserError("preprocess got nothing; pass image=[...], text=[...] or both")
        for name in MODALITIES:
            if given[name] is not None and name not in towers:
                raise UserError(f"this model has no tower of {name}s; leave {name} out")
        found = {} if image is None else images(image=image)
        return found if text is None else found | texts(text)

    return ops


class ImageEmbed(nn.Module):
    """Images -> tokens: patches by a map without bias, behind a class token; learned positions of
    all. What CLIP calls `ln_pre` is the encoder's `input_norm`."""

    patch_size: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str

    @nn.compact
    def __call__(self, batch) -> Tokens:
        images = image.normalized(batch["image"], self.mean, self.std)
        options = {"kernel_init": torch_uniform(3 * self.patch_size**2), "use_bias": False}
        options |= {"dtype": self.dtype, "name": "patch"}
        x = PatchEmbed(self.patch_size, self.width, **options)(images)
        normal, shape = nn.initializers.normal(self.width**-0.5), (1, 1, self.width)
        first = Vector(shape, (None, None, "embed"), normal, name="cls_token")()
        x = jnp.concatenate([spread(first, x[:, :1]), x], axis=1)
        x = LearnedPositions(normal, name="positions")(x)
        return Tokens(constrain_tokens(x), special=1)


class Pixels(nn.Module):
    """Images as they are, normalised: the x of the Tokens is [B, S, S, 3]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, batch) -> Tokens:
        return Tokens(image.normalized(batch["image"], self.mean, self.std))


class TextEmbed(nn.Module):
    """Ids -> tokens that see what stands before them: words plus learned positions.

    pool: the token that stands for a text is the first `end`, else its first token (Hugging Face);
    or the one with the `highest` id (openai/CLIP, whose end is the last of its ids); or its
    `first`, of tokens that see all others but pads (BERT, whose norm is the encoder's input_norm).
    """

    vocabulary: int
    rows: int
    width: int
    pool: str
    end: int
    pad: int
    dtype: str

    @nn.compact
    def __call__(self, batch) -> Tokens:
        ids = batch["tokens"]
        if ids.shape[1] > self.rows:
            raise UserError(f"a text of {ids.shape[1]} tokens is longer than {self.rows}; cut it")
        normal = nn.initializers.normal
        words = Embedding(self.vocabulary, self.width, normal(0.02), self.dtype, name="words")
        shape = (self.rows, self.width)
        at = Vector(shape, (None, "embed"), normal(0.01), name="positions")()
        x = words(ids)
        x = x + spread(at[: ids.shape[1]], x)
        padding = batch.get("padding")
        if self.pool == "first":
            return Tokens(
                constrain_tokens(x), padding=ids == self.pad if padding is None else padding
            )
        return Tokens(constrain_tokens(x), bias=causal_bias(ids.shape[1]), padding=padding)

    def last(self, ids):
        """int [B, L] -> the place of the token that stands for the text, int [B]."""
        if self.pool == "first":
            return jnp.zeros(len(ids), jnp.int32)
        return (ids == self.end if self.pool == "end" else ids).argmax(axis=1)


def make_embed(config, dtype: str) -> dict[str, nn.Module]:
    """The embeddings of the towers that `config` describes, by modality."""
    found = {}
    if "image" in present(config):
        m, mean, std = config.model, tuple(config.image_mean), tuple(config.image_std)
        if convolutional(config):
            found["image"] = Pixels(mean, std)
        else:
            grid(config)
            found["image"] = ImageEmbed(m.patch_size, m.width, mean, std, dtype)
    if "text" in present(config):
        t, tokenizer = config.model.text, tokenizers.load(config.tokenizer)
        choice("model.text.pool", t.pool, POOLS)
        vocabulary = t.vocabulary or tokenizer.size
        if vocabulary < tokenizer.size:
            raise UserError(
                f"config.model.text.vocabulary={vocabulary} is smaller than the tokenizer's "
                f"{tokenizer.size}; raise it, or 0 for as many"
            )
        end, pad = tokenizer.eos if t.end is None else t.end, t.get("pad")
        pad = tokenizer.pad if pad is None else pad
        found["text"] = TextEmbed(vocabulary, t.rows, t.width, t.pool, end, pad, dtype)
    return found
