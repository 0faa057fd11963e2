"""BEiT and BEiT v2: which of their models a file is, and the config that it becomes.

Pre-trained (masked image modeling, with the aggregation of v2) or fine-tuned to classes, as
microsoft/unilm and Hugging Face store them. A fine-tuned file of BEiT looks like one of BEiT v2 or
data2vec, which are the same model on other pixels: --family tells them apart.
"""

import dataclasses
import functools

from bivl.core.errors import UserError
from bivl.weights import beit_export, vocabularies
from bivl.weights import beit_tables as tables
from bivl.weights import data2vec_images as images
from bivl.weights import plan as plans
from bivl.weights.plan import Layout, Plan

NAMES = images.BEIT
CODES = 8192
AGGREGATION = "cls_pt_layers.0.norm1.weight"


def is_official(version: int, weights, asked: bool) -> bool:
    """v2 has an aggregation; a head of visual tokens is not as wide as the model. Fine-tuned, with
    a table for each layer, both versions look the same."""
    t = weights.tensors
    if not {"cls_token", NAMES.patch, "blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias"} <= set(t):
        return False
    if asked or AGGREGATION in t:
        return asked or version == 2
    if NAMES.head in t:
        return version == 1 and len(set(t[NAMES.head].shape)) == 2
    return NAMES.own_table.replace("@", "0") in t


def official(version: int, weights, folder) -> Plan:
    """microsoft/unilm `beit/` or `beit2/`."""
    has = weights.tensors.__contains__
    changes = images.statistics(weights, imagenet=version == 2)
    if has("head.weight") or has("fc_norm.weight"):
        head = "mean" if has("fc_norm.weight") else "first"
        plan = images.image_plan(weights, NAMES, tables.CLASSIFIED, 1e-6, head)
        if plan.changes["image_size"] >= 384:  # large ones are evaluated whole
            changes = changes | {"augment.crop_ratio": 1.0}
        return dataclasses.replace(plan, changes={**plan.changes, **changes})
    plan = pretrained(weights, NAMES, tables.PRETRAINED, 1e-6)
    return dataclasses.replace(plan, changes={**plan.changes, **changes})


def pretrained(weights, names, table, eps: float) -> Plan:
    """The plan of masked image modeling. The tokenizer is not at hand, so nothing is trained before
    one is. The patches that v2 aggregates are those of the third layer from the end."""
    has = weights.tensors.__contains__
    plan = images.image_plan(weights, names, table, eps, "")
    changes = {k: v for k, v in plan.changes.items() if k not in ("top_k_layers", "teacher_dtype")}
    depth = plans.count(weights, r"cls_pt_layers\.(\d+)\.norm1\.weight$")
    layer = max(1, changes["model.depth"] - 3) if depth else 0
    outputs = plans.setting(weights.config, "vocab_size", default=CODES)
    if has(names.head):
        outputs = plans.shape(weights, names.head, 2)[0]
    changes |= {"steps": 0, "teacher.outputs": outputs}
    changes |= {"aggregation.layer": layer, "aggregation.depth": depth}
    fresh = {path: why for path, why in plan.fresh.items() if path != "head"}
    if not has(names.head):
        fresh["lm_head"] = tables.NO_HEAD
    size = plans.size(changes["model.width"])
    config = f"pretrain/beit2.py:size={size}"
    return dataclasses.replace(plan, config=config, changes=changes, fresh=fresh)


def is_huggingface(weights, asked: bool) -> bool:
    """transformers' Beit, by its config, else by the names."""
    start = plans.prefix(weights, "embeddings.patch_embeddings.projection.weight")
    if start is None or "model_type" in weights.config:
        return weights.config.get("model_type") == "beit"
    return start == "beit." or (asked and start == "")


def huggingface(weights, folder) -> Plan:
    """transformers' BeitModel and what stands on it."""
    config, has = weights.config, weights.tensors.__contains__
    wanted = {"hidden_act": "gelu", "use_absolute_position_embeddings": False, "num_channels": 3}
    plans.require(config, wanted)
    start = plans.prefix(weights, "embeddings.patch_embeddings.projection.weight") or ""
    names = images.huggingface_names(start)
    images.require_tensors(weights, names)
    if has(names.table) and has(names.own_table.replace("@", "0")):
        raise UserError(f"the model has both {names.table} and tables of each layer; not supported")
    eps = config.get("layer_norm_eps", 1e-12)
    changes = images.HALF | vocabularies.views(folder)
    pooler = has(f"{start}pooler.layernorm.weight")
    bare = not (has(names.norm) or has("layernorm.weight"))  # under a head of another kind, say
    if pooler or bare or has(names.logits):
        head = "mean" if pooler or bare else "first"
        plan = images.image_plan(weights, names, tables.classified(start), eps, head)
        fresh = {} if pooler or head == "first" else {"head/norm": "the file has no last norm"}
        both = {**plan.changes, **changes}
        return dataclasses.replace(plan, changes=both, fresh={**plan.fresh, **fresh})
    last = "layernorm" if start and has("layernorm.weight") else f"{start}layernorm"
    if last != names.norm.removesuffix(".weight") and has(names.norm):
        raise UserError(
            f"the model has both {names.norm} and layernorm.weight, one norm after the other, as "
            "use_mean_pooling=False makes it; not supported"
        )
    names = names._replace(norm=f"{last}.weight", head="lm_head.weight")
    plan = pretrained(weights, names, tables.masked(start, last), eps)
    return dataclasses.replace(plan, changes={**plan.changes, **changes})


def is_huggingface_2(weights, asked: bool) -> bool:
    """v2 has no class of its own there, so it must be asked for."""
    return asked and is_huggingface(weights, asked)


def _layouts(version: int, recognise) -> dict[str, Layout]:
    own = (functools.partial(f, version) for f in (is_official, official))
    return {"official": Layout(*own), "huggingface": Layout(recognise, huggingface)}


FAMILIES = {"beit": _layouts(1, is_huggingface), "beit2": _layouts(2, is_huggingface_2)}
EXPORTS = {"huggingface": (beit_export.huggingface,)}
