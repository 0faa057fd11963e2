"""ViLT, as Hugging Face stores it: which of its models a file is, and the config it becomes."""

import math
from collections.abc import Mapping

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary import wordpiece
from bivl.models.layers import ACTIVATIONS
from bivl.weights import plan as plans
from bivl.weights import vilt_export, vocabularies
from bivl.weights import vilt_tables as tables
from bivl.weights.plan import Layout, Plan

WORDS = "embeddings.text_embeddings.word_embeddings.weight"
# What transformers takes for a setting that config.json leaves out.
DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_image_length": -1}
SQUARES = (
    "images are cut to squares of {side} pixels (--config.augment.squash=True: squeezed), where "
    "transformers keeps their shape and resizes the positions"
)


def is_huggingface(weights, asked: bool) -> bool:
    """transformers' ViLT: by its config, else by the names."""
    if "model_type" in weights.config:
        return weights.config["model_type"] == "vilt"
    return plans.prefix(weights, WORDS) is not None


def huggingface(weights, folder) -> Plan:
    """transformers' ViltModel, and what stands on it."""
    start = plans.prefix(weights, WORDS)
    if start is None:
        raise UserError(f"the file has no {WORDS}; it is not whole, or of another family")
    has, settings = weights.tensors.__contains__, {**DEFAULTS, **weights.config}
    words, named = has("mlm_score.transform.dense.weight"), has("mlm_score.decoder.weight")
    changes, unknown, notes = sizes(weights, start, settings)
    found, more = tokenizer(weights, folder, changes["model.vocabulary"])
    changes |= found | vocabularies.views(folder if weights.kind == "huggingface" else None)
    changes |= {
        "model.pooler": has(f"{start}pooler.dense.weight"),
        "model.tied": words and not named,
        "loss_weights.mlm": 1.0 if words else 0.0,
        "loss_weights.itm": 0.0,
        "loss_weights.wpa": 0.0,
        "model.pad": settings.get("pad_token_id"),
        "dtype": "float32",
    }
    bias = tables.NEW_BIAS if has(tables.NEW_BIAS) or not has(tables.OLD_BIAS) else tables.OLD_BIAS
    table = tables.INDICES + tables.encoder(start) + tables.heads(bias)
    notes = (*notes, *more)
    return Plan("pretrain/vilt.py:size=base", changes, table, {}, unknown, notes=notes)


def sizes(weights, start: str, settings: Mapping) -> tuple[dict, dict, tuple[str, ...]]:
    """(changes, unknown, notes) that the shapes and config.json tell."""
    e = f"{start}embeddings."
    shape = lambda name, rank: plans.shape(weights, f"{e}{name}", rank)  # noqa: E731
    vocabulary, width = shape("text_embeddings.word_embeddings.weight", 2)
    channels, patch = (shape("patch_embeddings.projection.weight", 4)[i] for i in (1, 2))
    patches = shape("position_embeddings", 3)[1] - 1
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side or channels != 3:
        raise UserError(
            f"{e}position_embeddings is of {patches} patches and the images have {channels} "
            "channels; only square images of three channels are supported"
        )
    refuse(settings, patches)
    fc1 = rf"{start}encoder.layer.".replace(".", r"\.") + r"(\d+)\.intermediate\.dense\.weight$"
    mlp, _ = plans.shape(weights, f"{start}encoder.layer.0.intermediate.dense.weight", 2)
    changes, unknown = plans.encoder_sizes(weights, fc1, width, mlp)
    rows, _ = shape("text_embeddings.position_embeddings.weight", 2)
    eps = settings["layer_norm_eps"]
    biased = f"{start}encoder.layer.0.attention.attention.query.bias" in weights.tensors
    changes |= {
        "image_size": side * patch,
        "pair.length": rows,
        "model.patch_size": patch,
        "model.text_rows": rows,
        "model.vocabulary": vocabulary,
        "model.segments": shape("text_embeddings.token_type_embeddings.weight", 2)[0],
        "model.modalities": shape("token_type_embeddings.weight", 2)[0],
        "model.qkv_bias": "qkv" if biased else "none",
        "model.activation": settings["hidden_act"],
        "model.eps": eps,
        "model.text_eps": eps,
        "model.dropout": settings.get("hidden_dropout_prob", 0.0),
        "model.attention_dropout": settings.get("attention_probs_dropout_prob", 0.0),
        "model.activation_dropout": 0.0,
    }
    return changes, unknown, (SQUARES.format(side=side * patch),)


def refuse(settings: Mapping, patches: int) -> None:
    """UserError for a setting that would make another model of the same weights."""
    most, activation = settings["max_image_length"], settings["hidden_act"]
    if isinstance(most, int) and 0 <= most < patches:
        raise UserError(
            f"the model's config has max_image_length={most}, which draws as many of {patches} "
            "patches at random; only all of them are supported, set it to -1 in config.json"
        )
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(
            f"the model's config has hidden_act={activation!r}, which is not supported "
            f"({' and '.join(ACTIVATIONS)} are); give another file"
        )


def tokenizer(weights, folder, rows: int) -> tuple[dict, tuple[str, ...]]:
    """(changes, notes) for the tokenizer of a table of words with `rows` ids: what lies in the
    model's folder."""
    there = weights.kind == "huggingface" and any(
        all((folder / name).is_file() for name in names) for names in wordpiece.LAYOUTS
    )
    if not there:
        note = (
            "no tokenizer lies beside the weights: the model takes token ids alone; pass "
            "--config.tokenizer.kind=wordpiece --config.tokenizer.path=vocab.txt for texts"
        )
        return {"tokenizer.kind": "ids", "tokenizer.path": "", "tokenizer.size": rows}, (note,)
    found = tokenizers.load({"kind": "wordpiece", "path": str(folder)})
    if found.size > rows:
        raise UserError(
            f"the tokenizer in {folder} has {found.size} ids, the model has {rows}; put the "
            "model's own tokenizer there"
        )
    return {"tokenizer.kind": "wordpiece", "tokenizer.path": str(folder)}, ()


FAMILIES = {"vilt": {"huggingface": Layout(is_huggingface, huggingface)}}
EXPORTS = {"huggingface": vilt_export.HUGGINGFACE}
