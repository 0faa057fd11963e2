"""data2vec 2.0 on images, texts and speech, as fairseq stores it: which of them a file is, and the
config that it becomes. The averaged model under `_ema` becomes the teacher where it is asked for.
"""

import dataclasses
import math
import re

import numpy as np

from bivl.core.errors import UserError
from bivl.models.positions import sincos_2d
from bivl.weights import data2vec2_export, data2vec2_tables
from bivl.weights import data2vec_tables as tables
from bivl.weights import plan as plans
from bivl.weights.data2vec2_tables import Parts
from bivl.weights.data2vec_speech import Names, speech_plan
from bivl.weights.data2vec_texts import classifiers, text_plan
from bivl.weights.plan import Layout, Plan
from bivl.weights.rules import Rule

KEYS = {  # a name of each modality that every file has
    "IMAGE": "local_encoder.proj.weight",
    "TEXT": "local_encoder.embed_tokens.weight",
    "AUDIO": "local_encoder.conv_layers.0.0.weight",
}
FIXED = "the fixed positions, computed here"
NO_DECODER = "the file has no decoder"


def is_kind(kind: str):
    """-> `recognise` of a modality."""

    def recognise(weights, asked: bool) -> bool:
        return plans.prefix(weights, f"modality_encoders.{kind}.{KEYS[kind]}") is not None

    return recognise


def parts_of(weights, kind: str) -> Parts:
    """Where a file has its parts; UserError where it has several modalities or norms before."""
    plans.require_post_norm(weights)
    others = [k for k in KEYS if k != kind and is_kind(k)(weights, False)]
    if others:
        raise UserError(f"the file has {kind} and {others[0]}; one modality is supported")
    found = Parts(plans.prefix(weights, f"modality_encoders.{kind}.{KEYS[kind]}") or "", kind)
    pattern = re.escape(found.own) + r"context_encoder\.blocks\.(\d+)\.norm1"
    return dataclasses.replace(found, prenet=plans.count(weights, pattern))


def decoder(weights, parts: Parts, width: int) -> tuple[dict, tuple[Rule, ...]]:
    """(changes, table) of the decoder, by its shapes; `width` is the encoder's."""
    own = f"{parts.own}decoder."
    first = f"{own}blocks.0.0.weight"
    if first not in weights.tensors:
        return {}, ()
    inner, inputs, kernel = weights.tensors[first].shape[:3]
    layers = 2 if f"{own}proj.2.weight" in weights.tensors else 1
    changes = {
        "decoder.width": inner,
        "decoder.depth": plans.count(weights, re.escape(f"{own}blocks.") + r"(\d+)\.0\.weight"),
        "decoder.kernel": kernel,
        "decoder.groups": width // max(inputs, 1),
        "decoder.projection_layers": layers,
    }
    return changes, data2vec2_tables.decoder(parts, layers)


def finished(weights, parts: Parts, plan: Plan, teacher: tuple[Rule, ...]) -> Plan:
    """The plan with what all modalities share: blocks, decoder, and what is not of the model."""
    changes, table, fresh = dict(plan.changes), plan.table, dict(plan.fresh)
    if parts.prenet:
        changes["model.depth"] += parts.prenet
        changes["model.scan"] = changes["model.depth"] > 4
    if plan.config.startswith("pretrain/"):
        ours, rules = decoder(weights, parts, changes["model.width"])
        changes, table = changes | ours, (*table, *rules)
        fresh |= {} if ours else {"decoder": NO_DECODER}
    else:
        table = (*table, Rule(f"{parts.own}decoder.*", drop=data2vec2_tables.TUNED))
        teacher = ()
    dropped = (
        Rule(f"{parts.start}recon_proj.*", drop="not of the model"),
        Rule(f"{parts.start}shared_decoder.*", drop="no published model has one"),
        Rule(f"{parts.start}_ema.*", drop="the teacher; --teacher keeps it"),
    )
    if not any(name.startswith(f"{parts.start}_ema.") for name in weights.tensors):
        teacher = ()
    table = (*table, *parts.blocks(), *dropped)
    return dataclasses.replace(plan, changes=changes, table=table, fresh=fresh, teacher=teacher)


def image(weights, folder) -> Plan:
    """Its norms have eps 1e-6; positions that are not the fixed ones become learned ones."""
    parts, t = parts_of(weights, "IMAGE"), weights.tensors
    own, fc1 = parts.own, f"{parts.start}blocks.@.mlp.fc1.weight"
    width, _, patch, _ = plans.shape(weights, f"{own}local_encoder.proj.weight", 4)
    mlp, _ = plans.shape(weights, fc1.replace("@", "0"), 2)
    blocks = re.escape(fc1).replace("@", r"(\d+)") + "$"
    changes, unknown = plans.encoder_sizes(weights, blocks, width, mlp)
    places = (f"{own}{data2vec2_tables.POSITIONS}", f"{own}positional_encoder.pos_embed")
    places = next((name for name in places if name in t), None)
    grid, kind, rule = positions(weights, places, width)
    changes |= {
        "model.patch_size": patch,
        "image_size": grid * patch,
        "model.positions": kind,
        "model.eps": plans.setting(weights.config, "norm_eps", default=1e-6),
    }
    table = data2vec2_tables.image(parts, rule)
    teacher = data2vec2_tables.averaged(parts, table)
    name = "huge" if width == 1280 else plans.size(width)
    if "head.weight" in t:
        changes["num_classes"] = plans.shape(weights, "head.weight", 2)[0]
        table = (*data2vec2_tables.IMAGE_HEAD, *table)
        config = f"finetune/data2vec2_image.py:size={name}"
    else:
        changes |= plans.pretraining(changes["model.depth"], 10 if name == "base" else 24)
        config = f"pretrain/data2vec2_image.py:size={name}"
    return finished(weights, parts, Plan(config, changes, table, {}, unknown), teacher)


def positions(weights, name: str | None, width: int) -> tuple[int, str, tuple[Rule, ...]]:
    """(patches a side, model.positions, table) of the positions [1, T, D] called `name`."""
    if name is None:
        return 14, "sincos", ()
    _, count, _ = plans.shape(weights, name, 3)
    grid = math.isqrt(count)
    if grid * grid != count:
        raise UserError(f"{name} has {count} positions, which no square grid has")
    if width % 4 == 0 and tuple(weights.tensors[name].shape) == (1, count, width):
        fixed = sincos_2d((grid, grid), width)
        if np.abs(np.asarray(weights.tensors[name].read(), np.float32)[0] - fixed).max() < 1e-5:
            return grid, "sincos", (Rule(name, drop=FIXED),)
    return grid, "learned", (Rule(name, "embed/positions/table/value", "batched"),)


def text(weights, folder) -> Plan:
    """RoBERTa's embedding and classifier; its norms have eps 1e-5."""
    parts = parts_of(weights, "TEXT")
    own, heads = f"{parts.own}local_encoder.", classifiers(weights)
    table = (*data2vec2_tables.text(parts), *(tables.text_head(heads) if heads else ()))
    names = (f"{own}embed_tokens.weight", f"{own}embed_positions.weight")
    names = (*names, f"{parts.start}blocks.@.mlp.fc1.weight")
    eps = plans.setting(weights.config, "norm_eps", default=1e-5)
    head = f"{heads}out_proj.weight" if heads else ""
    plan = text_plan(weights, folder, names, head, table, eps, "2")
    ema = f"{parts.start}_ema."
    fused = data2vec2_tables.fused
    teacher = (*fused(ema), *fused(f"{ema}blocks."))
    return finished(weights, parts, plan, teacher)


def audio(weights, folder) -> Plan:
    """One scale of ALiBi a head, which also tells how many heads there are."""
    parts, t = parts_of(weights, "AUDIO"), weights.tensors
    own, alibi = parts.own, f"{parts.own}alibi_scale"
    names = Names(
        f"{own}project_features.2.weight",
        f"{own}local_encoder.conv_layers.@.0.weight",
        f"{own}relative_positional_encoder.@.0.weight",
        f"{parts.start}blocks.@.mlp.fc1.weight",
        "",
        "w2v_encoder.proj.weight",
    )
    places = data2vec2_tables.audio_places(parts, _alibi(weights, alibi))
    front = data2vec2_tables.audio_front(parts)
    table = (*tables.INDICES, *front, *places, *data2vec2_tables.LETTERS)
    plan = speech_plan(weights, folder, names, table, "2", first=1)
    changes, unknown = dict(plan.changes), dict(plan.unknown)
    changes |= {"model.alibi": alibi in t}
    changes["model.eps"] = plans.setting(weights.config, "norm_eps", default=1e-5)
    if alibi in t:
        changes["model.num_heads"] = t[alibi].shape[-3]
        unknown.pop("model.num_heads", None)
    ema = own.replace(parts.start, f"{parts.start}_ema.", 1)
    shared = (
        Rule(f"{ema}{name}.*", drop=data2vec2_tables.SHARED)
        for name in ("local_encoder", "project_features")
    )
    teacher = (*data2vec2_tables.averaged(parts, places), *shared)
    plan = dataclasses.replace(plan, changes=changes, unknown=unknown)
    return finished(weights, parts, plan, teacher)


def _alibi(weights, name: str) -> str:
    """The layout of the scales; old files have one axis less."""
    rank = len(weights.tensors[name].shape) if name in weights.tensors else 5
    if rank not in (4, 5):
        raise UserError(f"{name} has {rank} axes, wanted 5 or 4; give a file that is whole")
    return "alibi" if rank == 5 else "old_alibi"


FAMILIES = {
    "data2vec2": {
        kind.lower(): Layout(is_kind(kind), plan)
        for kind, plan in (("IMAGE", image), ("TEXT", text), ("AUDIO", audio))
    }
}
EXPORTS = {"official": (data2vec2_export.official,)}
