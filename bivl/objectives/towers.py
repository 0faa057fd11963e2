"""What objectives share whose model is two towers: the model itself, and what it can tell."""

from typing import Any

import jax.numpy as jnp

from bivl.core.errors import UserError
from bivl.modalities import towers
from bivl.models.efficientnet import EfficientNetConfig
from bivl.models.towers import FIELDS, Towers
from bivl.models.transformer import EncoderConfig


def make_model(config, width: int) -> Towers:
    """The model of a config of modality `towers`; `width`: of the common space, 0 for none.

    config.model is the image tower; config.model.text says in what the text tower differs from
    it, if both are transformers, else what it is.
    """
    embeds, settings = towers.make_embed(config, config.dtype), dict(config.model.items())
    maps, more = towers.convolutional(config), dict(config.model.get("text", {}).items())
    own = {"image": settings, "text": more if maps else settings | more}
    kinds = {"image": EfficientNetConfig if maps else EncoderConfig, "text": EncoderConfig}
    both = {name: kinds[name].of(own[name], config.dtype) for name in embeds}
    if maps and "image" in both:
        _check_map(both["image"], config.image_size, width)
    parts = {f"{name}_embed": embeds.get(name) for name in FIELDS}
    parts |= {name: both.get(name) for name in FIELDS}
    parts |= {"temperature": config.contrast.temperature} if maps else {}
    return Towers(**parts, width=width, dtype=config.dtype)


def _check_map(tower: EfficientNetConfig, image_size: int, width: int) -> None:
    if width and tower.width != width:
        raise UserError(
            f"config.contrast.width={width} must be {tower.width}, the width of the last map of "
            "the image tower, whose mean is the image's vector"
        )
    if tower.side(image_size) < 1:
        raise UserError(
            f"config.image_size={image_size} is too small to be halved "
            f"{1 + tower.strides.count(2)} times; raise it"
        )


def init(model: Towers, spec, key):
    """(parameters, boxed, extras: the statistics of batch norms, where there are such)."""
    batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
    extras = dict(model.init(key, batch))
    return extras.pop("params"), extras


def predictions(model: Towers, config) -> dict:
    """Of one modality a call: `encode` (pooled: the class token, the mean of a map, or the token of
    a text, after the final norm), `features` (the same, float32, which CLIP's linear probes read;
    of a batch with both the images'), `attention` of images and `patch_features`, see Towers.

    Where the model has projections, `image_embeddings`, `text_embeddings` and `embeddings` of
    either, unit vectors; with both towers `logits`, scaled similarities [images, texts].
    """

    def wanted(batch, modality):
        if modality not in given(batch):
            raise UserError(f"the batch has no {modality}; the data set needs that field")
        if modality not in model.present:
            raise UserError(f"the model has no tower of {modality}s; give it {model.present[0]}s")
        return {name: batch[name] for name in FIELDS[modality] if name in batch}

    def given(batch):
        return [name for name, (field, *_) in FIELDS.items() if field in batch]

    def first(batch):
        return next((name for name in given(batch) if name in model.present), model.present[0])

    def apply(params, extras, batch, modality, method="encode", **options) -> Any:
        batch = wanted(batch, modality)
        return model.apply({"params": params, **extras}, batch, modality, method=method, **options)

    def encode(params, extras, batch):
        if len(given(batch)) > 1:
            raise UserError("two towers encode one modality a call; pass images or texts, not both")
        tokens, out, pooled = apply(params, extras, batch, first(batch), collect=("layers",))
        found = {"tokens": out.tokens, "pooled": pooled, "layers": out.layers}
        return found if tokens.padding is None else found | {"padding": tokens.padding}

    def features(params, extras, batch):
        return apply(params, extras, batch, first(batch))[2].astype(jnp.float32)

    def attention(params, extras, batch):
        encoded = apply(params, extras, batch, "image", collect=("weights",))[1]
        weights = encoded.weights[-1][:, :, 0, 1:]
        return weights.reshape(*weights.shape[:2], *towers.grid(config))

    def patch_features(params, extras, batch):
        return apply(params, extras, batch, "image", "patch_features")

    def embeddings(modality=None):
        def embed(params, extras, batch):
            return apply(params, extras, batch, modality or first(batch), "embeddings")

        return embed

    def logits(params, extras, batch):
        images, texts = (apply(params, extras, batch, name, "embeddings") for name in FIELDS)
        return jnp.exp(model.apply({"params": params}, method="log_scale")) * images @ texts.T

    named = {"features": features, "encode": encode, "embeddings": embeddings()}
    if "image" in model.present and not towers.convolutional(config):
        named |= {"attention": attention, "patch_features": patch_features}
    if model.width:
        named |= {f"{name}_embeddings": embeddings(name) for name in model.present}
        named |= {"logits": logits} if len(model.present) == 2 else {}
    return named
