"""What the image-text objectives share: the model, its three streams, and losses on masked places.

The streams are the parts of a batch (modalities/image_text.py): images, texts, pairs. Each is one
forward pass of the student; a pair gives two losses, of its patches and of its words, so losses are
named images, texts, pairs_image, pairs_text.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import mixture
from bivl.modalities import image, image_text
from bivl.models import heads
from bivl.models.decoders import DecoderConfig
from bivl.models.image_text import Heads, HeadsConfig
from bivl.models.multiway import Multiway, MultiwayConfig
from bivl.objectives import encoding, frozen
from bivl.objectives.mim import masked_places

LOSSES = {  # name: (part of the batch, modality)
    "images": ("images", "image"),
    "texts": ("texts", "text"),
    "pairs_image": ("pairs", "image"),
    "pairs_text": ("pairs", "text"),
}
MASKS = {"image": "mask", "text": "text_mask"}


class Masked(NamedTuple):
    """The masked places of one modality in one stream, R rows of the student (M clones each)."""

    x: jax.Array
    """[R, K, D], what the model makes of them."""
    index: jax.Array
    """int [R, K], the patches or tokens they are."""
    valid: jax.Array
    """bool [R, K]: where fewer are masked than K, the others are False."""


class ImageText(nn.Module):
    """Embed, multiway encoder and heads."""

    embed: nn.Module
    encoder: MultiwayConfig
    heading: HeadsConfig
    grid: tuple[int, ...]

    def setup(self):
        self.trunk = Multiway(self.encoder)
        self.heads = Heads(self.heading, self.grid, self.encoder.dtype)

    def encode(self, batch, masked=False, deterministic=True, collect=()):
        """-> (Tokens, Encoded) of what the batch has: image, text or both."""
        tokens = self.embed(batch, masked, deterministic)
        return tokens, self.trunk(tokens, deterministic, collect)

    def masked(self, batch, counts, deterministic=False) -> dict[str, Masked]:
        """{modality: its masked places} of one stream; counts: modality -> K, at least as many as
        are masked."""
        tokens, encoded = self.encode(batch, True, deterministic)
        parts = {}
        if "image" in batch:
            x = encoded.tokens[:, 1 : tokens.images]
            parts["image"] = self.heads.fill(x, batch.get("keep"), deterministic)
        if "tokens" in batch:
            parts["text"] = encoded.tokens[:, tokens.images :]
        return {name: _masked(x, batch[MASKS[name]], counts[name]) for name, x in parts.items()}

    def embeddings(self, batch, pool: str, masked=False, deterministic=True):
        """Unit vectors [B, E] of images alone or texts alone."""
        if self.heading.bag and "image" not in batch:
            ids = batch["tokens"]
            seen = ids != self.embed.pad
            if masked:
                seen &= ~batch["text_mask"]  # hidden words are in no bag
            return self.heads.add_words(ids, seen)
        tokens, encoded = self.encode(batch, masked, deterministic)
        modality = "image" if tokens.images else "text"
        return self.heads.project(pooled(encoded.tokens, tokens, pool), modality)

    def __call__(self, batch):
        tokens, encoded = self.encode(batch)
        patches = encoded.tokens[:, 1 : tokens.images]
        keep = jnp.arange(patches.shape[1])[None, None].repeat(len(patches), 0)
        return self.heads(patches, keep)


def pooled(x, layout, pool: str):
    """[B, L, D] -> float32 [B, D]: the `first` token (CLS, <s>) or the `mean` of the content; or
    `patches`, those of an image side by side, [B, N D], and the mean of a text."""
    if pool == "first":
        return x[:, 0].astype(jnp.float32)
    if pool == "patches" and layout.images:
        return x[:, layout.special :].reshape(len(x), -1).astype(jnp.float32)
    return heads.mean_content(x, layout)


def _masked(x, mask, count) -> Masked:
    mask = mask.reshape(-1, x.shape[1])
    mask = jnp.repeat(mask, len(x) // len(mask), axis=0)  # a text beside clones of its image
    index, valid = masked_places(mask, count)
    return Masked(jnp.take_along_axis(x, index[..., None], axis=1), index, valid)


def at(values, places: Masked):
    """values [B, L, ...] at the masked places, repeated for the clones: [R, K, ...]."""
    values = jnp.repeat(values, len(places.index) // len(values), axis=0)
    index = places.index.reshape(*places.index.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


@dataclasses.dataclass(frozen=True)
class Streams:
    """The streams of a config: shapes, the model, and how many places may be masked."""

    config: Any
    sizes: dict[str, int]
    spec: dict
    counts: dict[str, dict[str, int]]
    """{part: {modality: K}}."""
    losses: tuple[str, ...]
    """The names of LOSSES that the parts give."""

    def model(self, heading: HeadsConfig, dtype: str) -> ImageText:
        """The model with the heads asked for."""
        c = self.config
        grid = image_text.grid(c)
        encoder = MultiwayConfig.of(c.model, dtype)
        return ImageText(image_text.make_embed(c, dtype), encoder, heading, grid)

    def init(self, model: ImageText, key):
        """The parameters, boxed; all of them, whatever parts there are."""
        size, length = self.config.image_size, self.config.pair.length
        batch = {"image": jnp.zeros((1, size, size, 3), jnp.uint8)}
        batch["tokens"] = jnp.zeros((1, length), jnp.int32)
        return model.init(key, batch)["params"]

    def masked(self, model, params, batch, key) -> dict[str, Masked]:
        """{loss: its masked places}, one forward pass a part."""
        found = {}
        keys = dict(zip(self.sizes, jax.random.split(key, len(self.sizes)), strict=True))
        for part, counts in self.counts.items():
            options = {"rngs": {"dropout": keys[part]}, "method": "masked"}
            places = model.apply({"params": params}, batch[part], counts, **options)
            for name in self.losses:
                if LOSSES[name][0] == part:
                    found[name] = places[LOSSES[name][1]]
        return found

    def totals(self, batch) -> dict[str, jax.Array]:
        """{loss: how many places it is the mean of}, over the whole batch."""
        found = {}
        for name in self.losses:
            part, modality = LOSSES[name]
            clones = 1  # in which a text is seen
            if modality == "text" and "keep" in batch[part]:
                clones = batch[part]["keep"].shape[1]
            count = clones * batch[part][MASKS[modality]].sum()
            found[name] = jnp.maximum(count, 1).astype(jnp.float32)
        return found


def open_streams(config) -> Streams:
    """Checks the streams of a config and their settings."""
    choice("modality", config.modality, ("image_text",))
    sizes = mixture.sizes(config)
    if isinstance(sizes, int):
        raise UserError(
            "config.data must have the parts images, texts or pairs; see configs/pretrain/bivl.py"
        )
    spec = image_text.spec(config, sizes)
    patches = image_text.grid(config)[0] * image_text.grid(config)[1]
    counts = {}
    for part in sizes:
        counts[part] = {}
        if part != "texts":
            counts[part]["image"] = _most_patches(config, patches)
        if part != "images":
            chosen = config.text if part == "texts" else config.pair
            counts[part]["text"] = image_text.most_masked(chosen)
    losses = tuple(name for name, (part, _) in LOSSES.items() if part in sizes)
    return Streams(config, sizes, spec, counts, losses)


def _most_patches(config, patches: int) -> int:
    if image.keeps_all(config):
        return max(1, round(config.mask_ratio * patches))
    return patches - int(patches * (1 - config.mask_ratio))


def decoding(config) -> DecoderConfig | None:
    """The decoder of patches that the student does not see; none where they have mask tokens."""
    return None if image.keeps_all(config) else DecoderConfig(**config.decoder)


def open_tokenizer(config, names) -> frozen.Frozen | None:
    """The frozen visual tokenizer, where one of the losses `names` is of images."""
    if not any(LOSSES[name][1] == "image" for name in names):
        return None
    tokenizer = frozen.open(config, "a tokenizer, such as vqkd", "codes")
    frozen.check_grid(tokenizer, config)
    return tokenizer


def image_codes(tokenizer, held, batch, names) -> dict[str, jax.Array]:
    """{loss: codes int [B, N] of the whole images}, for those of `names` that are of images."""
    found = {}
    for name in names:
        part, modality = LOSSES[name]
        if modality == "image":
            images = frozen.view(tokenizer, batch[part]["image"])
            found[name] = tokenizer.tell("codes", held, {"image": images})
    return found


def classes_at(places: dict, codes: dict, batch, names) -> dict[str, jax.Array]:
    """{loss: classes int [R, K]} at the masked places: codes of patches, ids of words."""
    values = {name: codes.get(name, batch[LOSSES[name][0]].get("tokens")) for name in names}
    return {name: at(values[name], places[name]) for name in names}


def heads_sizes(config, tokenizer, names) -> dict[str, int]:
    """The classes that the losses `names` need, as HeadsConfig takes them."""
    words = any(LOSSES[name][1] == "text" for name in names)
    embed = image_text.make_embed(config, config.dtype)
    codes = tokenizer.outputs or tokenizer.config.codebook.size if tokenizer else 0
    return {"codes": codes, "words": embed.vocabulary if words else 0}


def token_losses(model, params, places: dict, wanted: dict, totals: dict):
    """Cross-entropy at masked places.

    places, wanted: {loss: Masked} and {loss: classes int [R, K]}; totals: {loss: their number}.
    Returns {loss: mean} and the metrics: losses, accuracies, and what the accuracy would be if the
    batch's most frequent class was always named.
    """
    losses, metrics = {}, {}
    for name, classes in wanted.items():
        p, modality = places[name], LOSSES[name][1]
        options = {"method": lambda m, x, modality=modality: m.heads.classify(x, modality)}
        logits = model.apply({"params": params}, p.x, **options)
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), classes[..., None], -1)[..., 0]
        weight = p.valid / totals[name]
        losses[name] = (each * weight).sum()
        metrics[f"token_loss/{name}"] = losses[name]
        right = logits.argmax(-1) == classes
        metrics[f"token_accuracy/{name}"] = (right * weight).sum()
        counts = jax.ops.segment_sum(
            weight.reshape(-1), classes.reshape(-1), num_segments=logits.shape[-1]
        )
        metrics[f"most_frequent/{name}"] = counts.max()
    return losses, metrics


def predictions(model: ImageText, config, pool: str) -> dict:
    """`features`, `patches` [B, N D], `encode`, `attention`, `image_embeddings`, `text_embeddings`
    and, of pairs, `cross_attention` [B, H, T, h, w], from words to patches in the last layer.

    Of a batch with both, `features` and `image_embeddings` are the image's. Without projections,
    embeddings are the pooled features.
    """
    grid = image_text.grid(config)

    def encode(params, batch, collect=()):
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def only(batch, modality):
        wanted = {"image": ("image",), "text": ("tokens",)}[modality]
        if any(name not in batch for name in wanted):
            raise UserError(f"the batch has no {modality}; the data set needs that field")
        return {name: batch[name] for name in wanted}

    def first(batch):
        return only(batch, "image" if "image" in batch else "text")

    def features(params, extras, batch):
        tokens, out = encode(params, first(batch))
        return heads.mean_content(out.tokens, tokens)

    def patches(params, extras, batch):
        tokens, out = encode(params, only(batch, "image"))
        return pooled(out.tokens, tokens, "patches")

    def embeddings(modality):
        def embed(params, extras, batch):
            batch = only(batch, modality)
            if model.heading.contrast:
                return model.apply({"params": params}, batch, pool, method="embeddings")
            tokens, out = encode(params, batch)
            x = pooled(out.tokens, tokens, pool)
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        return embed

    def attention(params, extras, batch):
        tokens, out = encode(params, only(batch, "image"), ("weights",))
        return out.weights[-1][:, :, 0, 1:].reshape(*out.weights[-1].shape[:2], *grid)

    def cross_attention(params, extras, batch):
        tokens, out = encode(params, batch, ("weights",))
        weights = out.weights[-1][:, :, tokens.images :, 1 : tokens.images]
        return weights.reshape(*weights.shape[:3], *grid)

    named = encoding.predictions(encode, image_text, config)
    named |= {"features": features, "patches": patches}
    named |= {"attention": attention, "cross_attention": cross_attention}
    named |= {f"{name}_embeddings": embeddings(name) for name in ("image", "text")}
    named["embeddings"] = lambda params, extras, batch: named[
        "image_embeddings" if "image" in batch else "text_embeddings"
    ](params, extras, batch)
    return named
