"""ALIGN, as Hugging Face stores it: which of its models a file is, and the config it becomes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary import wordpiece
from bivl.models.efficientnet import EfficientNetConfig
from bivl.weights import align_export, vocabularies
from bivl.weights import align_tables as tables
from bivl.weights import plan as plans
from bivl.weights.plan import Layout, Plan

MODELS = ("align", "align_vision_model", "align_text_model")
# Our names for transformers' settings of the image tower.
SETTINGS = {
    "out_channels": "widths",
    "num_block_repeats": "repeats",
    "kernel_sizes": "kernels",
    "strides": "strides",
    "expand_ratios": "expansions",
    "depthwise_padding": "centred",
    "width_coefficient": "width_scale",
    "depth_coefficient": "depth_scale",
    "depth_divisor": "multiple",
    "squeeze_expansion_ratio": "squeeze",
    "batch_norm_eps": "eps",
    "drop_connect_rate": "drop_path",
}
LISTS = ("widths", "repeats", "kernels", "strides", "expansions", "centred")
STEM = 32  # channels of B0's first convolution, which no setting changes
PILLOW = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by `resample`


def image_tower(weights, start: str, settings: Mapping) -> dict[str, Any]:
    """Config changes of the image tower; those that config.json leaves out are as published."""
    wanted = {"num_channels": 3, "pooling_type": "mean"}
    activation = settings.get("hidden_act", "swish")
    plans.require(settings, wanted | {"hidden_act": "silu" if activation == "silu" else "swish"})
    found = {}
    for theirs, name in SETTINGS.items():
        if theirs in settings:
            value = settings[theirs]
            right = _numbers if name in LISTS else _number
            if not right(value):
                raise UserError(f"config.json has {theirs}={value!r}; copy it again")
            found[name] = tuple(value) if name in LISTS else value
    config = EfficientNetConfig(**found)
    blocks = re.escape(f"{start}encoder.blocks.") + r"(\d+)\."
    if plans.count(weights, blocks) != config.depth:
        raise UserError(
            f"the file has {plans.count(weights, blocks)} blocks of images, its config "
            f"{config.depth}; put the model's own config.json beside it"
        )
    before = (STEM, *config.widths[:-1])
    inputs = settings.get("in_channels", before)
    if not _numbers(inputs) or [*map(config.scaled, inputs)] != [*map(config.scaled, before)]:
        raise UserError(
            f"config.json has in_channels={inputs!r}; only those of the stage before, "
            f"{before}, are supported"
        )
    changes = {f"model.{name}": value for name, value in found.items()}
    side = settings.get("image_size")
    return changes | ({"image_size": side} if type(side) is int and side > 0 else {})


def _number(value) -> bool:
    return type(value) in (int, float)


def _numbers(value) -> bool:
    return isinstance(value, list | tuple) and all(type(x) is int for x in value)


def text_tower(weights, start: str, settings: Mapping, folder) -> tuple[dict, dict, tuple]:
    """(changes, unknown, notes) of the text tower."""
    wanted = {"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
    plans.require(settings, wanted | {"position_embedding_type": "absolute"})
    e, fc1 = f"{start}embeddings.", f"{start}encoder.layer.@.intermediate.dense.weight"
    words, width = plans.shape(weights, f"{e}word_embeddings.weight", 2)
    rows, _ = plans.shape(weights, f"{e}position_embeddings.weight", 2)
    mlp, _ = plans.shape(weights, fc1.replace("@", "0"), 2)
    blocks = re.escape(fc1).replace("@", r"(\d+)") + "$"
    own = dataclasses.replace(weights, config=settings)
    changes, unknown = plans.encoder_sizes(own, blocks, width, mlp)
    found = {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    pad = settings.get("pad_token_id", 0)
    found |= {"rows": rows, "vocabulary": words, "eps": settings.get("layer_norm_eps", 1e-12)}
    found["pad"] = pad if type(pad) is int and pad >= 0 else 0
    more, notes = tokenizer(weights, folder, words, found["pad"])
    changes = {f"model.text.{name}": value for name, value in found.items()} | more
    changes |= {"pair.length": min(64, rows)}
    return changes, {f"model.text.{k.removeprefix('model.')}": v for k, v in unknown.items()}, notes


def tokenizer(weights, folder, rows: int, pad: int) -> tuple[dict, tuple[str, ...]]:
    """(changes, notes) for the tokenizer in the model's folder, of a table with `rows` words."""
    whole = weights.kind == "huggingface"
    if not (whole and any(all((folder / n).is_file() for n in ns) for ns in wordpiece.LAYOUTS)):
        note = (
            "no tokenizer lies beside the weights: the model takes token ids alone; pass "
            "--config.tokenizer.kind=wordpiece --config.tokenizer.path=vocab.txt for texts"
        )
        return {"tokenizer.kind": "ids", "tokenizer.path": "", "tokenizer.size": rows}, (note,)
    found = tokenizers.load({"kind": "wordpiece", "path": str(folder)})
    if found.size > rows or found.pad != pad:
        raise UserError(
            f"the tokenizer in {folder} has {found.size} ids and pads with {found.pad}, the model "
            f"has {rows} and pads with {pad}; put the model's own tokenizer there"
        )
    return {"tokenizer.kind": "wordpiece", "tokenizer.path": str(folder)}, ()


def views(folder) -> dict[str, Any]:
    """What EfficientNetImageProcessor does to images, if preprocessor_config.json is there: pixels
    are scaled, shifted and normalised, once or twice, which is one mean and one std here."""
    given = vocabularies.preprocessor(folder)
    if not given:
        return {}
    scale = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    shift = 1 if given.get("do_rescale", True) and given.get("rescale_offset", False) else 0
    means, stds = (given.get(f"image_{name}", [0.5] * 3) for name in ("mean", "std"))
    whole, crop = (vocabularies.side(given.get(key)) for key in ("size", "crop_size"))
    if not given.get("do_center_crop", False):
        crop = whole
    if not (
        vocabularies.three([scale] * 3)
        and scale
        and vocabularies.three(means)
        and vocabularies.three(stds)
        and all(stds)
    ):
        raise UserError(f"{folder / 'preprocessor_config.json'} is no preprocessor; copy it again")
    if crop > whole:
        raise UserError(
            f"preprocessor_config.json cuts {crop} pixels out of {whole}; lower the one"
        )
    last = stds if given.get("include_top", True) else [1.0] * 3
    if not given.get("do_normalize", True):
        means, stds = [0.0] * 3, [1.0] * 3
    stds = tuple(a * b / (255 * scale) for a, b in zip(stds, last, strict=True))
    changes = {"image_mean": tuple((shift + m) / (255 * scale) for m in means), "image_std": stds}
    kind = given.get("resample", 3)
    changes["augment.interpolation"] = PILLOW[kind] if kind in range(6) else "bicubic"
    size = given.get("size")
    squash = not (isinstance(size, Mapping) and "shortest_edge" in size)
    changes |= {"augment.squash": squash, "augment.squash_to": whole if squash else 0}
    if not crop:
        return changes
    return changes | {"image_size": crop, "augment.crop_ratio": crop / whole}


def starts(weights) -> dict[str, str]:
    """What stands before the names of both towers, by modality."""
    image = plans.prefix(weights, "encoder.blocks.0.depthwise_conv.depthwise_conv.weight")
    text = plans.prefix(weights, "embeddings.token_type_embeddings.weight")
    found = {"image": image, "text": text}
    return {name: start for name, start in found.items() if start is not None}


def is_huggingface(weights, asked: bool) -> bool:
    """transformers' ALIGN: by its config, else by the names; a tower alone might be another's."""
    if "model_type" in weights.config:
        return weights.config["model_type"] in MODELS
    found = starts(weights)
    return len(found) == 2 or (asked and bool(found))


def settings_of(config: Mapping, name: str) -> Mapping:
    """config.json's settings of a tower."""
    key = {"image": "vision_config", "text": "text_config"}[name]
    found = config if config.get("model_type", "align") != "align" else config.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"config.json has a {key} that is no mapping; copy it again")
    return found


def huggingface(weights, folder) -> Plan:
    """transformers' AlignModel, AlignVisionModel and AlignTextModel."""
    both, head = starts(weights), "text_projection.weight"
    if not both:
        raise UserError("the file has no tower of ALIGN; it is not whole, or of another family")
    changes: dict[str, Any] = {"model.towers": tuple(both), "dtype": "float32"}
    unknown, notes, table = {}, (), tables.INDICES
    if "image" in both:
        changes |= image_tower(weights, both["image"], settings_of(weights.config, "image"))
        changes |= views(folder if weights.kind == "huggingface" else None)
        table += tables.image(both["image"])
    if "text" in both:
        settings = settings_of(weights.config, "text")
        own, unknown, notes = text_tower(weights, both["text"], settings, folder)
        changes |= own
        types = f"{both['text']}embeddings.token_type_embeddings.weight"
        table += tables.text(both["text"], plans.shape(weights, types, 2)[0])
    width = plans.shape(weights, head, 2)[0] if head in weights.tensors else 0
    changes["contrast.width"] = width if len(both) == 2 else 0
    config = "pretrain/align.py:size=base"
    return Plan(config, changes, table + tables.HEADS, {}, unknown, notes=notes)


FAMILIES = {"align": {"huggingface": Layout(is_huggingface, huggingface)}}
EXPORTS = {"huggingface": align_export.HUGGINGFACE}
