"""Pairs of a text and an image for one encoder that reads both, and their embedding as ViLT has it
(arXiv 2102.03334, section 3.1): the text's tokens, then CLS and the patches of the image.

A batch has image uint8 [B, S, S, 3] and tokens int32 [B, L], a text being `bos ... eos` and pads;
for training besides inputs int32 [B, L] (tokens with the masked ones replaced) and text_mask bool
[B, L]. `padding` bool [B, L] says what is a pad; where it is absent, the ids do.

Config keys read here: batch_size, image_size, augment, image_mean, image_std; pair.{length,
mask_ratio, masking}; tokenizer; model.{width, patch_size, dropout, text_rows, text_eps, vocabulary,
segments, modalities, pad}.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import masking, tokenizers
from bivl.data.vocabulary import wordpiece
from bivl.modalities import image, image_text, text
from bivl.models.layers import (
    Embedding,
    LayerNorm,
    PatchEmbed,
    Vector,
    constrain_tokens,
    spread,
)
from bivl.models.transformer import Tokens

NONE = -1  # no id
TEXT, IMAGE = 0, 1  # rows of the table of modalities; a third is of NLVR2's second image


def grid(config) -> tuple[int, int]:
    """Patches down and across."""
    return image.grid(config)


def _texts(config, length: int | None = None):
    """The config of modalities/text.py that config.pair makes."""
    pair, rows = config.pair, config.model.text_rows
    length = pair.length if length is None else length
    if not 4 <= length <= rows:
        raise UserError(
            f"config.pair.length={length} must lie between 4 and model.text_rows={rows}"
        )
    whole = {"batch_size": config.batch_size, "tokenizer": config.tokenizer}
    whole |= {"mask_ratio": pair.mask_ratio, "masking": pair.masking, "text": {"length": length}}
    return ConfigDict(whole)


def _whole_words(ratio: float, tokenizer, kept: float, randomized: float):
    """Whole words in random order, as long as they are no more than round(ratio n) tokens, or one;
    never bos and eos. Each token of them becomes the mask, another or stays, and all are scored. A
    tokenizer other than `wordpiece` has words of one token.

    Source: transformers' `DataCollatorForWholeWordMask`, which ViLT calls.
    """
    goes_on = np.zeros(tokenizer.size, bool)
    if tokenizer.kind == "wordpiece":
        goes_on = wordpiece.continuing(tokenizer.data)
    ordinary = np.setdiff1d(np.arange(tokenizer.size), tokenizer.special)
    ends = (tokenizer.bos, tokenizer.eos, tokenizer.pad)

    def corrupt(rng, ids):
        inside = ~np.isin(ids, ends)
        starts = np.flatnonzero(inside & ~(goes_on[ids] & np.roll(inside, 1)))
        words = np.searchsorted(starts, np.arange(len(ids)), side="right") - 1
        mask, most = np.zeros(len(ids), bool), max(1, round(ratio * len(ids)))
        for word in rng.permutation(len(starts)):
            chosen = inside & (words == word)
            if mask.sum() + chosen.sum() <= most:
                mask |= chosen
        fate = rng.random(len(ids))
        inputs = np.where(mask & (fate >= kept + randomized), tokenizer.mask, ids)
        random = mask & (fate < randomized)
        return np.where(random, rng.choice(ordinary, len(ids)), inputs), mask

    return corrupt


MASKS = text.CORRUPTIONS | {"words": _whole_words}


def most_masked(config) -> int:
    """The most tokens of a text that may be masked."""
    return image_text.most_masked(config.pair)


def _corrupt(config):
    """-> function (rng, ids int32 [n]) -> (ids with the masked ones replaced, mask)."""
    kind = choice("pair.masking.kind", config.pair.masking.kind, MASKS)
    try:
        return masking.configured(MASKS[kind], _texts(config), tokenizers.load(config.tokenizer))
    except UserError as error:  # it knows one key of masks
        raise UserError(str(error).replace("config.mask", "config.pair.mask")) from error


def spec(config) -> dict[str, jax.ShapeDtypeStruct]:
    """image, tokens, inputs, text_mask, see above."""
    shape = (config.batch_size, _texts(config).text.length)
    ids, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
    return image.inputs(config) | {"tokens": ids, "inputs": ids, "text_mask": mask}


def train_ops(config):
    """record, rng -> {image, tokens, inputs, text_mask}."""
    images, tokenizer = image.train_image(config), tokenizers.load(config.tokenizer)
    length, corrupt = config.pair.length, _corrupt(config)

    def ops(record, rng):
        ids = text.record_ids(tokenizer, record, length)
        inputs, chosen = corrupt(rng, ids)
        mask = np.zeros(length, bool)
        mask[: len(ids)] = chosen
        tokens, inputs = (text.padded(row, length, tokenizer.pad) for row in (ids, inputs))
        found = {"image": images(record, rng)}
        return found | {"tokens": tokens, "inputs": inputs, "text_mask": mask}

    return ops


def eval_ops(config):
    """record -> {image, tokens, label?, id?}, texts cut at pair.length tokens."""
    images, texts = image.eval_ops(config), text.eval_ops(_texts(config))
    return lambda record: images(record) | texts(record)


def preprocess(config):
    """image=[...] and text=[...], one of each a pair -> numpy batch: image float32 [B, S, S, 3],
    normalised; tokens int32 and padding bool [B, L], L the longest of the batch, at most
    model.text_rows."""
    images = image.preprocess(config)
    texts = text.preprocess(_texts(config, config.model.text_rows))

    def ops(image=None, text=None):
        if image is None or text is None or len(image) != len(text):
            raise UserError(
                "this model reads a text and its image together; pass image=[...] and text=[...], "
                "as many of each"
            )
        return images(image=image) | texts(text=text)

    return ops


class Embed(nn.Module):
    """Pairs to tokens [B, L + 1 + N, D].

    A text's are words, positions and the first row of the segments, which pairs of texts have in
    BERT, under a LayerNorm; an image's are patches behind CLS, with positions. All have then their
    modality added.
    """

    patch_size: int
    width: int
    vocabulary: int
    text_rows: int
    segments: int
    modalities: int
    pad: int
    dropout: float
    text_eps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patches: int
    dtype: str

    def setup(self):
        D, normal = self.width, nn.initializers.normal(0.02)
        axes = (None, "embed")
        self.words = Embedding(self.vocabulary, D, normal, self.dtype)
        self.text_positions = Vector((self.text_rows, D), axes, normal)
        self.segment = Vector((self.segments, D), axes, normal)
        self.text_norm = LayerNorm(self.text_eps, self.dtype)
        self.patch = PatchEmbed(self.patch_size, D, normal, dtype=self.dtype)
        self.cls_token = Vector((1, 1, D), (None, None, "embed"), normal)
        self.image_positions = Vector((1 + self.patches, D), axes, normal)
        self.modality = Vector((self.modalities, D), axes, normal)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, batch, masked: bool = False, deterministic: bool = True) -> Tokens:
        for name, what in (("image", "image"), ("tokens", "text")):
            if name not in batch:
                raise UserError(
                    f"this model reads a text and its image together; the batch has no {what}"
                )
        ids = batch["inputs"] if masked else batch["tokens"]
        if ids.shape[1] > self.text_rows:
            raise UserError(
                f"a text of {ids.shape[1]} tokens is longer than {self.text_rows}; cut it"
            )
        padding = batch.get("padding", batch["tokens"] == self.pad)
        kinds = self.modality()
        texts = self.drop(self._text(ids), deterministic)
        texts = texts + spread(kinds[TEXT], texts)
        images = self.drop(self._image(batch["image"]), deterministic)
        images = images + spread(kinds[IMAGE], images)
        x = jnp.concatenate([texts, images], axis=1)
        padding = jnp.pad(padding, ((0, 0), (0, images.shape[1])))
        return Tokens(constrain_tokens(x), special=1, padding=padding)

    def _text(self, ids):
        x = self.words(ids)
        at = self.text_positions()[: ids.shape[1]] + self.segment()[0]
        return self.text_norm(x + spread(at, x))

    def _image(self, images):
        x = self.patch(image.normalized(images, self.mean, self.std))
        x = jnp.concatenate([spread(self.cls_token(), x[:, :1]), x], axis=1)
        return x + spread(self.image_positions(), x)

    def table(self):
        """The words' [V, D]."""
        return self.words(jnp.arange(self.vocabulary))


def make_embed(config, dtype: str) -> Embed:
    """The embedding that `config` describes."""
    m, tokenizer = config.model, tokenizers.load(config.tokenizer)
    down, across = grid(config)
    vocabulary = m.vocabulary or tokenizer.size
    if vocabulary < tokenizer.size:
        raise UserError(
            f"config.model.vocabulary={vocabulary} is smaller than the tokenizer's "
            f"{tokenizer.size}; raise it, or 0 for as many"
        )
    pad = NONE if tokenizer.kind == "ids" else tokenizer.pad  # of numbers alone, any is a word
    pad = pad if m.pad is None else m.pad
    if m.get("attention") == "cudnn":  # it would hide the last patches in the place of pads
        raise UserError(
            "config.model.attention='cudnn' takes a text's pads to stand last, here an image "
            "follows them; use 'xla'"
        )
    return Embed(
        m.patch_size,
        m.width,
        vocabulary,
        m.text_rows,
        m.segments,
        m.modalities,
        pad,
        m.dropout,
        m.text_eps,
        tuple(config.image_mean),
        tuple(config.image_std),
        down * across,
        dtype,
    )
