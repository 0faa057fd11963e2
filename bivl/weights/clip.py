"""CLIP, as OpenAI and Hugging Face store it: which of them a file is, and the config it becomes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary import clip as vocabulary
from bivl.weights import clip_export, vocabularies
from bivl.weights import clip_tables as tables
from bivl.weights import plan as plans
from bivl.weights.plan import Layout, Plan
from bivl.weights.rules import under

OPENAI_END = 49_407
MODELS = ("clip", "clip_vision_model", "clip_text_model")
# What transformers takes for a setting that config.json leaves out.
DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
IMAGE = DEFAULTS | {"num_attention_heads": 12}
TEXT = DEFAULTS | {"num_attention_heads": 8, "eos_token_id": OPENAI_END}


class Tower(NamedTuple):
    """Where a tower has what its sizes are read from; `@` is a block's number."""

    first: str
    """The patches' kernel or the words' table."""
    positions: str
    fc1: str
    projection: str


def encoder(weights, tower: Tower, settings: Mapping, width: int) -> tuple[dict, dict]:
    """(changes, unknown) of a tower, as if it was the image's."""
    mlp, _ = plans.shape(weights, tower.fc1.replace("@", "0"), 2)
    blocks = re.escape(tower.fc1).replace("@", r"(\d+)") + "$"
    own = dataclasses.replace(weights, config=settings)
    changes, unknown = plans.encoder_sizes(own, blocks, width, mlp)
    activation = settings.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(
            f"the model's config has hidden_act={activation!r}, which is not supported (gelu and "
            "quick_gelu are); give another file"
        )
    changes["model.activation"] = activation
    return changes | {"model.eps": settings.get("layer_norm_eps", 1e-5)}, unknown


def image_tower(weights, tower: Tower, settings: Mapping) -> tuple[dict, dict]:
    """(changes, unknown) of the image tower."""
    width, channels, patch, _ = plans.shape(weights, tower.first, 4)
    rows, _ = plans.shape(weights, tower.positions, 2)
    side = math.isqrt(max(rows - 1, 0))
    if side * side != rows - 1 or channels != 3:
        raise UserError(
            f"{tower.positions} has {rows} rows and {tower.first} {channels} channels; only square "
            "images of three channels, with a class token, are supported"
        )
    changes, unknown = encoder(weights, tower, settings, width)
    return changes | {"model.patch_size": patch, "image_size": side * patch}, unknown


def text_tower(weights, tower: Tower, settings: Mapping, folder) -> tuple[dict, dict, tuple]:
    """(changes, unknown, notes) of the text tower."""
    words, width = plans.shape(weights, tower.first, 2)
    rows, _ = plans.shape(weights, tower.positions, 2)
    changes, unknown = encoder(weights, tower, settings, width)
    end = settings.get("eos_token_id", 2)
    if isinstance(end, list) and len(end) == 1:
        end = end[0]
    if not isinstance(end, int):
        raise UserError(f"the model's config has eos_token_id={end!r}; only one id is supported")
    # 2 was written by mistake into old configs, whose models read the highest id.
    pool = {"pool": "highest", "end": None} if end == 2 else {"pool": "end", "end": end}
    own = {key.removeprefix("model."): value for key, value in changes.items() if "." in key}
    own |= {"rows": rows, "vocabulary": words, **pool}
    found, notes = tokenizer(weights, folder, words, end)
    changes = {f"model.text.{key}": value for key, value in own.items()}
    changes |= {"pair.length": rows, "dtype": "float32"} | found
    return changes, {f"model.text.{k.removeprefix('model.')}": v for k, v in unknown.items()}, notes


def tokenizer(weights, folder, rows: int, end: int) -> tuple[dict, tuple[str, ...]]:
    """(changes, notes) for the tokenizer of a table of words with `rows` ids: what lies in the
    model's folder; beside a file, OpenAI's alone, as its neighbours may be anybody's."""
    whole, path = weights.kind == "huggingface", None
    for names in vocabulary.LAYOUTS:
        openai = names[0].startswith(vocabulary.OPENAI)
        if path is None and (whole or openai) and all((folder / n).is_file() for n in names):
            path = folder / names[0] if openai else folder
    if path is None:
        note = (
            "no tokenizer lies beside the weights: the model takes token ids alone; pass "
            "--config.tokenizer.kind=clip --config.tokenizer.path=bpe_simple_vocab_16e6.txt.gz"
        )
        return {"tokenizer.kind": "ids", "tokenizer.path": "", "tokenizer.size": rows}, (note,)
    found = tokenizers.load({"kind": "clip", "path": str(path)})
    if found.size > rows or end not in (2, found.eos):
        raise UserError(
            f"the tokenizer {path} has {found.size} ids and ends texts with {found.eos}, the "
            f"model has {rows} and reads {end}; put the model's own tokenizer there"
        )
    return {"tokenizer.kind": "clip", "tokenizer.path": str(path)}, ()


def views(weights, folder, side: int | None) -> dict:
    """What preprocessor_config.json says of images, where it lies in the model's folder."""
    file = folder / "preprocessor_config.json"
    if side is None or weights.kind != "huggingface" or not file.is_file():
        return {}
    given = vocabularies.read_json(file)
    given = given if isinstance(given, dict) else {}
    changes = {
        key: tuple(float(x) for x in given[key])
        for key in ("image_mean", "image_std")
        if vocabularies.three(given.get(key)) and all(given[key])
    }
    size = given.get("size")
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if given.get("do_center_crop", True) and isinstance(size, int) and side <= size < 2**31:
        changes["augment.crop_ratio"] = side / size
    return changes


def towers_plan(weights, folder, both: Mapping, settings: Mapping, table, notes=()) -> Plan:
    """The plan of a model; `both` and `settings`: what there is, and its config, by modality."""
    changes, unknown, width = {}, {}, 0
    for name, tower in both.items():
        if name == "image":
            own, lacking = image_tower(weights, tower, settings[name])
        else:
            own, lacking, more = text_tower(weights, tower, settings[name], folder)
            notes = (*notes, *more)
        changes, unknown = changes | own, unknown | lacking
        if tower.projection in weights.tensors:
            width = plans.shape(weights, tower.projection, 2)[tower.projection[-1] != "t"]
    changes |= {"model.towers": tuple(both), "contrast.width": width}
    changes |= views(weights, folder, changes.get("image_size"))
    config = f"pretrain/clip.py:size={plans.size(changes.get('model.width', 0))}"
    return Plan(config, changes, table, {}, unknown, notes=tuple(notes))


# OpenAI


def openai_start(weights) -> str | None:
    """What stands before OpenAI's names."""
    found = plans.prefix(weights, "token_embedding.weight")
    own = None if found is None else f"{found}transformer.resblocks.0.attn.in_proj_weight"
    return (
        found if own in weights.tensors and f"{found}text_projection" in weights.tensors else None
    )


def is_openai(weights, asked: bool) -> bool:
    """openai/CLIP, and open_clip's models that are built alike."""
    return openai_start(weights) is not None


def openai(weights, folder) -> Plan:
    """openai/CLIP, a TorchScript archive or a state dict."""
    start = openai_start(weights)
    if f"{start}visual.class_embedding" not in weights.tensors:
        raise UserError(
            "the image tower is no vision transformer (visual.class_embedding is missing); CLIP's "
            "ResNets are not supported, give a ViT"
        )
    image = Tower(
        f"{start}visual.conv1.weight",
        f"{start}visual.positional_embedding",
        f"{start}visual.transformer.resblocks.@.mlp.c_fc.weight",
        f"{start}visual.proj",
    )
    text = Tower(
        f"{start}token_embedding.weight",
        f"{start}positional_embedding",
        f"{start}transformer.resblocks.@.mlp.c_fc.weight",
        f"{start}text_projection",
    )
    notes = () if weights.kind == "torchscript" else (ACTIVATION,)
    settings = dict.fromkeys(("image", "text"), {})
    table = under(start, tables.OPENAI)
    return towers_plan(weights, folder, {"image": image, "text": text}, settings, table, notes)


ACTIVATION = (
    "the file does not tell the activation; it is taken as OpenAI's quick_gelu. For open_clip's "
    "own models pass --config.model.activation=gelu --config.model.text.activation=gelu"
)


# Hugging Face


def starts(weights) -> dict[str, str]:
    """What stands before the names of Hugging Face's towers, by modality."""
    endings = {"image": "embeddings.class_embedding", "text": "embeddings.token_embedding.weight"}
    found = {name: plans.prefix(weights, ending) for name, ending in endings.items()}
    beside = {"image": "pre_layrnorm.weight", "text": "final_layer_norm.weight"}
    return {
        name: start
        for name, start in found.items()
        if start is not None and f"{start}{beside[name]}" in weights.tensors
    }


def is_huggingface(weights, asked: bool) -> bool:
    """transformers' CLIP: by its config, else by the names, where a text tower alone might be
    another's."""
    if "model_type" in weights.config:
        return weights.config["model_type"] in MODELS
    found = starts(weights)
    return "image" in found or (asked and bool(found))


def huggingface_settings(config: Mapping) -> dict[str, dict]:
    """The settings of both towers, as transformers completes them."""
    if "model_type" not in config:
        return {"image": {}, "text": {}}
    found = {}
    for name, key, defaults in (("image", "vision_config", IMAGE), ("text", "text_config", TEXT)):
        own = config if config["model_type"] != "clip" else config.get(key) or {}
        older = config.get(f"{key}_dict")
        again = {**defaults, **older} if isinstance(older, Mapping) else {}
        if not isinstance(own, Mapping):
            raise UserError(f"config.json has a {key} that is no mapping; copy it again")
        found[name] = {**defaults, **own, **again}
    return found


def huggingface(weights, folder) -> Plan:
    """transformers' CLIPModel, and a tower alone with its projection or without."""
    found, both, table = starts(weights), {}, tables.INDICES
    if not found:
        raise UserError("the file has no tower of CLIP; it is not whole, or of another family")
    firsts = {"image": "patch_embedding", "text": "token_embedding"}
    heads = {"image": "visual_projection.weight", "text": "text_projection.weight"}
    rules = {"image": tables.huggingface_image, "text": tables.huggingface_text}
    for name, start in found.items():
        both[name] = Tower(
            f"{start}embeddings.{firsts[name]}.weight",
            f"{start}embeddings.position_embedding.weight",
            f"{start}encoder.layers.@.mlp.fc1.weight",
            heads[name],
        )
        table += rules[name](start)
    settings = huggingface_settings(weights.config)
    notes = () if "model_type" in weights.config else (ACTIVATION,)
    return towers_plan(weights, folder, both, settings, table + tables.HUGGINGFACE_HEADS, notes)


FAMILIES = {
    "clip": {
        "openai": Layout(is_openai, openai),
        "huggingface": Layout(is_huggingface, huggingface),
    }
}
EXPORTS = {"huggingface": clip_export.HUGGINGFACE}
