"""Our data2vec 2.0 models under fairseq's names, as safetensors: transformers has no such model.

An encoder is one of these whatever trained it, if it is built alike. The averaged teacher stays
behind: it is of a training run.
"""

import re

from bivl.core.errors import UserError
from bivl.models.positions import sincos_2d
from bivl.weights import data2vec2_tables as tables
from bivl.weights.data2vec2_tables import Parts
from bivl.weights.data2vec_export import built, spelling, words
from bivl.weights.data2vec_tables import text_head
from bivl.weights.export import Export, Origin
from bivl.weights.rules import Rule

KINDS = {"image": "IMAGE", "text": "TEXT", "speech": "AUDIO"}
WRAPPERS = {"IMAGE": "model.", "TEXT": "model.", "AUDIO": "w2v_encoder.w2v_model."}
HEAD = "classification_heads.sentence_classification_head."


def official(config, ours, origin: Origin) -> Export | None:
    """A model of data2vec 2.0, pre-trained or fine-tuned."""
    m, kind = config.model, KINDS.get(config.modality)
    wanted = {"norm": "post", "qkv_bias": "qkv", "final_norm": False, "layer_scale": 0.0}
    wanted["input_norm"] = kind != "TEXT"
    tuned = config.objective in ("classify", "ctc")
    if kind is None or not (tuned or config.objective == "data2vec2") or not built(m, wanted):
        return None
    if kind == "AUDIO" and not m.alibi:
        return None  # data2vec 1.0's, which transformers has
    parts = placed(origin, kind, WRAPPERS[kind] if tuned else "")
    make = {"IMAGE": image, "TEXT": text, "AUDIO": audio}[kind]
    table, constants, settings, files = make(config, parts, origin)
    if not tuned:
        table = (*table, *tables.decoder(parts, config.decoder.projection_layers))
    shared = {
        "model_type": "data2vec2",
        "modality": kind,
        "embed_dim": m.width,
        "prenet_depth": parts.prenet,
        "depth": m.depth - parts.prenet,
        "num_heads": m.num_heads,
        "mlp_ratio": m.mlp_dim / m.width,
        "norm_eps": m.eps,
        "layer_norm_first": False,
    }
    return Export(shared | settings, (*table, *parts.blocks()), {}, constants, files)


def placed(origin: Origin, kind: str, start: str) -> Parts:
    """Where the source had its parts; without one, behind `start` and in one stack."""
    pattern = rf"((?:[\w-]+\.)*?)modality_encoders\.{kind}\.(.*)"
    found = [match for match in (re.fullmatch(pattern, name) for name in origin.names) if match]
    starts = [match[1] for match in found if not match[1].endswith("_ema.")]
    blocks = (re.match(r"context_encoder\.blocks\.(\d+)\.", match[2]) for match in found)
    return Parts(starts[0] if starts else start, kind, len({match[1] for match in blocks if match}))


def image(config, parts: Parts, origin: Origin):
    """(table, constants, settings, files)."""
    m, name = config.model, f"{parts.own}{tables.POSITIONS}"
    if m.positions not in ("sincos", "learned"):
        raise UserError(f"data2vec 2.0 has positions of its own, not model.positions={m.positions}")
    old = f"{parts.own}positional_encoder.pos_embed"
    name = old if old in origin.names else name
    grid = config.image_size // m.patch_size
    learned = (Rule(name, "embed/positions/table/value", "batched"),)
    table = tables.image(parts, learned if m.positions == "learned" else ())
    fixed = {name: sincos_2d((grid, grid), m.width)[None]} if m.positions == "sincos" else {}
    if config.objective == "classify":
        c = config.classifier
        if (c.pool, c.norm, c.hidden) != ("mean", True, False):
            raise UserError("data2vec 2.0 classifies by the mean of the patches and a norm alone")
        table = (*table, *tables.IMAGE_HEAD)
    settings = {"image_size": config.image_size, "patch_size": m.patch_size}
    return table, fixed, settings, {}


def text(config, parts: Parts, origin: Origin):
    """(table, constants, settings, files)."""
    table = tables.text(parts)
    if config.objective == "classify":
        c = config.classifier
        if (c.pool, c.norm, c.hidden) != ("first", False, True):
            raise UserError("RoBERTa's classifier is a tanh head on the first token alone")
        found = (re.fullmatch(r"(.*classification_heads\..*?)dense\.bias", n) for n in origin.names)
        table = (*table, *text_head(next((match[1] for match in found if match), HEAD)))
    return table, {}, {"max_source_positions": config.text.length}, words(config)


def audio(config, parts: Parts, origin: Origin):
    """(table, constants, settings, files); the settings in fairseq's words."""
    e, tuned = config.model.extractor, config.objective == "ctc"
    layers = zip(e.kernels, e.strides, strict=True)
    layers = ", ".join(f"({e.width}, {kernel}, {stride})" for kernel, stride in layers)
    settings = {"feature_encoder_spec": f"[{layers}]", "normalize": bool(config.audio.normalize)}
    table = (*tables.audio_front(parts), *tables.audio_places(parts))
    table = (*table, *tables.LETTERS) if tuned else table
    return table, {}, settings, spelling(config) if tuned else {}
