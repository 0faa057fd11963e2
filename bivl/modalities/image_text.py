"""Images, texts and image-text pairs in one batch, and their embedding as BEiT-3 has it.

A training batch has up to three parts, each read from a set of its own (data/mixture.py):
  images  image uint8 [B, S, S, 3] and its mask
  texts   tokens int32 [B, L], inputs (tokens with the masked ones replaced), text_mask bool [B, L]
  pairs   all of these
`mask` is bool [B, N] over the patches; for M clones mask bool [B, M, N] and keep int32 [B, M, K].

Config keys read here: those of modalities/image.py for images (mask_ratio, masking, augment, ...);
text.{length, break_mode, cache, mask_ratio, masking} for texts; pair.{length, mask_ratio, masking,
corrupt, scale} for pairs: their texts' length and masks, which of the two is masked (`both`,
`image`, `text`, or `either`, drawn for each pair) and the scale of their crops; tokenizer and
model.{text_rows, vocabulary, init}.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.modalities import image, text
from bivl.models.layers import (
    Embedding,
    PatchEmbed,
    Vector,
    constrain_tokens,
    gather_kept,
    spread,
    torch_uniform,
    truncated_normal,
    zeros,
)
from bivl.models.transformer import Tokens

PARTS = ("images", "texts", "pairs")
CORRUPT = ("both", "image", "text", "either")
OFFSET = 2  # the first token of a modality stands in row 2 of its positions (fairseq's habit)


def grid(config) -> tuple[int, int]:
    """Patches down and across."""
    return image.grid(config)


def _texts(config, key: str, length: int | None = None):
    """The config of modalities/text.py that config.KEY, `text` or `pair`, makes of an image-text
    config; of another length where one is given."""
    chosen, rows = config[key], config.model.text_rows - OFFSET
    length = chosen.length if length is None else length
    if not 4 <= length <= rows:
        raise UserError(
            f"config.{key}.length={length} must lie between 4 and {rows}; model.text_rows limits it"
        )
    choice(f"{key}.masking.kind", chosen.masking.kind, text.CORRUPTIONS)
    settings = {name: chosen[name] for name in ("break_mode", "cache") if name in chosen}
    whole = {
        "batch_size": config.batch_size,
        "tokenizer": config.tokenizer,
        "text": settings | {"length": length},
        "mask_ratio": chosen.mask_ratio,
        "masking": chosen.masking,
    }
    return ConfigDict(whole)


@contextlib.contextmanager
def _masks_of(key: str):
    """Names the masks of config.KEY in a UserError of modalities/text.py, which knows one key."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("config.mask", f"config.{key}.mask")) from error


def _text_train_ops(config, key: str):
    with _masks_of(key):
        return text.train_ops(_texts(config, key))


def most_masked(chosen) -> int:
    """The most tokens that the masks of config.text or config.pair can hide."""
    length, ratio = chosen.length, chosen.mask_ratio
    if chosen.masking.kind == "span":
        return min(length, (int(ratio * length / chosen.masking.span) + 1) * chosen.masking.span)
    return min(length, int(ratio * length) + 1)


def _masked_text(arrays):
    return {("text_mask" if name == "mask" else name): x for name, x in arrays.items()}


def spec(config, sizes) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{part: shapes and dtypes} of the parts that `sizes` gives rows, see above."""
    found = {}
    for part, size in sizes.items():
        if part not in PARTS:
            raise UserError(f"config.data.{part} is unknown; the parts are {', '.join(PARTS)}")
        found[part] = {}
        if part != "texts":
            found[part] |= image.spec(config)
        if part != "images":
            key = "text" if part == "texts" else "pair"
            with _masks_of(key):
                found[part] |= _masked_text(text.spec(_texts(config, key)))
        found[part] = {
            name: jax.ShapeDtypeStruct((size, *s.shape[1:]), s.dtype)
            for name, s in found[part].items()
        }
    return found


def train_ops(config) -> dict:
    """{part: (record, rng) -> one example}."""
    texts = _text_train_ops(config, "text")
    ops = {"images": image.train_ops(config), "pairs": masked_pair_ops(config)}
    return ops | {"texts": lambda record, rng: _masked_text(texts(record, rng))}


def masked_pair_ops(config):
    """record, rng -> one example of the part `pairs`."""
    pair = ConfigDict(config.to_dict())
    pair.augment.scale = config.pair.scale
    images, tokenizer = image.train_ops(pair), tokenizers.load(config.tokenizer)
    words = _text_train_ops(config, "pair")
    corrupt = choice("pair.corrupt", config.pair.corrupt, CORRUPT)
    if corrupt != "both" and not image.keeps_all(config):
        raise UserError(f"config.pair.corrupt={corrupt!r} needs masking.kind='block'; use both")

    def ops(record, rng):
        ids = text.record_ids(tokenizer, record, config.pair.length)
        example = images(record, rng) | _masked_text(words({"tokens": ids}, rng))
        spared = {"image": "text", "text": "image"}.get(corrupt)
        if corrupt == "either":
            spared = ("image", "text")[rng.integers(2)]
        if spared == "image":
            example["mask"] = np.zeros_like(example["mask"])
        if spared == "text":
            example["text_mask"] = np.zeros_like(example["text_mask"])
            example["inputs"] = example["tokens"]
        return example

    return ops


def examples(config) -> dict:
    """{part: source of records -> source of what its ops take}; texts are packed into blocks."""
    same = lambda source: source  # noqa: E731
    return {"images": same, "texts": text.examples(_texts(config, "text")), "pairs": same}


def pair_ops(config):
    """record, rng -> {image, tokens}, unmasked, for tuning on pairs."""
    images, tokenizer = image.train_image(config), tokenizers.load(config.tokenizer)

    def ops(record, rng):
        ids = text.record_ids(tokenizer, record, config.pair.length)
        tokens = text.padded(ids, config.pair.length, tokenizer.pad)
        return {"image": images(record, rng), "tokens": tokens}

    return ops


def eval_ops(config):
    """record -> {image?, tokens?, label?, id?}, texts cut at pair.length tokens."""
    images, texts = image.eval_ops(config), text.eval_ops(_texts(config, "pair"))

    def ops(record):
        made = images(record) if "image" in record else {}
        return made | (texts(record) if "text" in record or "tokens" in record else {})

    return ops


def preprocess(config):
    """image=[...], text=[...] or both -> numpy batch; see modalities/image.py and text.py."""
    images = image.preprocess(config)
    texts = text.preprocess(_texts(config, "pair", config.model.text_rows - OFFSET))

    def ops(image=None, text=None):
        if image is None and text is None:
            raise UserError("preprocess got nothing; pass image=[...], text=[...] or both")
        found = {} if image is None else images(image=image)
        return found if text is None else found | texts(text=text)

    return ops


def pool(tokens, layout: Tokens):
    """CLS, or <s> of a text alone: [B, L, D] -> [B, D]."""
    del layout
    return tokens[:, 0]


def token_inits(kind: str, width: int, patch_values: int) -> dict:
    """Initialisers of the patches' kernel and bias, of words, of CLS and mask, of positions.

    `magneto`: as torchscale 0.2.0 builds BEiT-3; else N(0, 0.02^2), `beit` cut at one std.
    """
    if kind == "magneto":
        patch, normal = torch_uniform(patch_values), nn.initializers.normal
        return dict(
            zip(_KINDS, (patch, patch, normal(width**-0.5), zeros, normal(1.0)), strict=True)
        )
    small = truncated_normal(0.02, 1.0 if kind == "beit" else 2.0)
    return dict(zip(_KINDS, (small, zeros, small, small, small), strict=True))


_KINDS = ("patch", "patch_bias", "words", "special", "positions")


class Embed(nn.Module):
    """What a batch has of image and text, to tokens: [CLS, patches] and then the text's.

    Positions of the two are learned and their own, the first in row 2; pads become zeros
    (torchscale `model/BEiT3.py`, `architecture/encoder.py`). Of a masked input a text is `inputs`;
    an image has the mask token in masked places (`mask_token`) or lacks them, M clones of each
    example then, whose texts are repeated.
    """

    grid: tuple[int, int]
    patch_size: int
    width: int
    vocabulary: int
    text_rows: int
    pad: int
    mask_token: bool
    init_rule: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str

    @nn.compact
    def __call__(self, batch, masked: bool = False, deterministic: bool = True) -> Tokens:
        del deterministic
        parts, padding, bias = [], None, batch.get("attention_bias")
        if "image" in batch:
            parts.append(self._image(batch, masked))
        if "tokens" in batch:
            x, padding = self._text(batch["inputs"] if masked else batch["tokens"])
            clones = parts[0].shape[0] // x.shape[0] if parts else 1
            parts.append(jnp.repeat(x, clones, axis=0))
            padding = jnp.repeat(padding, clones, axis=0)
        images = parts[0].shape[1] if "image" in batch else 0
        if images and padding is not None:
            padding = jnp.pad(padding, ((0, 0), (images, 0)))
        x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        special = 1 if images else 0
        return Tokens(constrain_tokens(x), special, bias, padding, images)

    def _image(self, batch, masked):
        inits = token_inits(self.init_rule, self.width, 3 * self.patch_size**2)
        options = {"kernel_init": inits["patch"], "bias_init": inits["patch_bias"]}
        options |= {"dtype": self.dtype, "name": "patch"}
        images = image.normalized(batch["image"], self.mean, self.std)
        x = PatchEmbed(self.patch_size, self.width, **options)(images)
        axes, shape = (None, None, "embed"), (1, 1, self.width)
        cls_token = Vector(shape, axes, inits["special"], name="cls_token")()
        token = Vector(shape, axes, inits["special"], name="mask_token")()
        if masked and self.mask_token:
            x = jnp.where(batch["mask"][..., None], spread(token, x), x)
        rows = (x.shape[1] + 1 + OFFSET, self.width)
        at = Vector(rows, (None, "embed"), inits["positions"], name="image_positions")()
        x = x + spread(at[OFFSET + 1 :], x)
        if masked and not self.mask_token:
            x = gather_kept(x, batch["keep"])
        return jnp.concatenate([spread(cls_token + at[OFFSET], x[:, :1]), x], axis=1)

    def _text(self, ids):
        inits = token_inits(self.init_rule, self.width, 1)
        words = Embedding(
            self.vocabulary, self.width, inits["words"], dtype=self.dtype, name="words"
        )
        rows = (self.text_rows, self.width)
        at = Vector(rows, (None, "embed"), inits["positions"], name="text_positions")()
        x = words(ids)
        x = x + spread(at[OFFSET : OFFSET + ids.shape[1]], x)
        padding = ids == self.pad
        return jnp.where(padding[..., None], 0, x), padding


def make_embed(config, dtype: str) -> Embed:
    """The embedding that `config` describes."""
    m, tokenizer = config.model, tokenizers.load(config.tokenizer)
    vocabulary = m.vocabulary or tokenizer.size
    if vocabulary < tokenizer.size:
        raise UserError(
            f"config.model.vocabulary={vocabulary} is smaller than the tokenizer's "
            f"{tokenizer.size}; raise it, or 0 for as many"
        )
    return Embed(
        grid(config),
        m.patch_size,
        m.width,
        vocabulary,
        m.text_rows,
        tokenizer.pad,
        image.keeps_all(config),
        m.init,
        tuple(config.image_mean),
        tuple(config.image_std),
        dtype,
    )
