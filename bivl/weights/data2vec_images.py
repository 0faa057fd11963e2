"""data2vec 1.0 on images, as the original code, fairseq's port and Hugging Face store it: which of
them a file is, and the config that it becomes."""

import dataclasses
import math
import re
from typing import NamedTuple

from bivl.core.errors import UserError
from bivl.weights import data2vec_tables as tables
from bivl.weights import plan as plans
from bivl.weights import vocabularies
from bivl.weights.plan import NO_HEAD, Plan
from bivl.weights.rules import Rule, norm, pair, under
from bivl.weights.stored import shown

NO_MASK = "the file has no mask token"
HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}  # of pixels, where not ImageNet's


class ImageNames(NamedTuple):
    """Where an image layout has what its sizes are read from; `@` is a block's number."""

    patch: str
    mask: str
    table: str
    own_table: str
    fc1: str
    scale: str
    norm: str
    head: str
    logits: str


def square(weights, patch: int, table: str | None) -> dict:
    """image_size, and num_heads where a bias table [R, H] tells: R = (2 g - 1)^2 + 3 for a grid of
    g x g patches, three rows being those of CLS."""
    if table is None:
        side = plans.setting(weights.config, "image_size", "input_size", default=224)
        if isinstance(side, list | tuple) and side and all(x == side[0] for x in side):
            side = side[0]
        if not isinstance(side, int) or not 0 < side < 2**31:
            raise UserError(
                f"the model's config has image_size={shown(repr(side))}; only squares are supported"
            )
        return {"image_size": side}
    rows, heads = plans.shape(weights, table, 2)
    root = math.isqrt(max(rows - 3, 0))
    if root * root != rows - 3 or root % 2 == 0:
        raise UserError(f"{table} has {rows} rows, which no square grid has; give another file")
    return {"image_size": (root + 1) // 2 * patch, "model.num_heads": heads}


def layer_scale(weights) -> float:
    """Where layer scales began, which only training anew would ask."""
    given = plans.setting(weights.config, "layer_scale_init_value")
    return float(given) if isinstance(given, int | float) and 0 < given < 2**31 else 1e-4


def statistics(weights, imagenet: bool) -> dict:
    """Changes for the statistics of pixels, which the original code is told by a flag: what the
    file says of it, else `imagenet`, what the family's models are trained with."""
    said = plans.setting(weights.config, "imagenet_default_mean_and_std")
    return {} if (said if isinstance(said, bool) else imagenet) else HALF


def image_plan(weights, names: ImageNames, table: tuple[Rule, ...], eps: float, head: str) -> Plan:
    """The plan of an image model; `head` is what stands on it: nothing, or a classifier of the
    `mean` of the patches or of the `first` token."""
    has, first = weights.tensors.__contains__, lambda name: name.replace("@", "0")
    width, _, patch, _ = plans.shape(weights, names.patch, 4)
    mlp, _ = plans.shape(weights, first(names.fc1), 2)
    blocks = re.escape(names.fc1).replace("@", r"(\d+)") + "$"
    changes, unknown = plans.encoder_sizes(weights, blocks, width, mlp)
    own = first(names.own_table)
    bias = next((name for name in (names.table, own) if has(name)), None)
    changes |= square(weights, patch, bias)
    changes |= {
        "model.patch_size": patch,
        "model.eps": eps,
        "model.layer_scale": layer_scale(weights) if has(first(names.scale)) else 0.0,
        "model.positions": {names.table: "relative", own: "relative_layers"}.get(bias, "none"),
        "model.final_norm": has(names.norm),
    }
    other = tables.RELATIVE if bias == own else f"{tables.RELATIVE}[n]"
    table = tuple(rule for rule in table if rule.path != other)
    fresh = {} if has(names.mask) else {"embed/mask_token": NO_MASK}
    chosen = f"data2vec_image.py:size={plans.size(width)}"
    if head:
        fresh |= {} if has(names.logits) else {"head/logits": "the file has no classifier"}
        changes |= {"classifier.pool": head, "classifier.norm": head == "mean"}
        changes["num_classes"] = (
            plans.shape(weights, names.logits, 2)[0] if has(names.logits) else 2
        )
        config = f"finetune/{chosen}"
    else:
        changes |= plans.pretraining(changes["model.depth"], 6)
        changes["masking.min_block"] = max(1, min(16, (changes["image_size"] // patch) ** 2 // 12))
        fresh |= {} if names.head and has(names.head) else {"head": NO_HEAD}
        config = f"pretrain/{chosen}"
    unknown = {key: why for key, why in unknown.items() if key not in changes}
    return Plan(config, changes, table, fresh, unknown)


BEIT = ImageNames(
    "patch_embed.proj.weight",
    "mask_token",
    f"rel_pos_bias.{tables.BIAS_TABLE}",
    f"blocks.@.attn.{tables.BIAS_TABLE}",
    "blocks.@.mlp.fc1.weight",
    "blocks.@.gamma_1",
    "norm.weight",
    "lm_head.weight",
    "head.weight",
)
# What BEiT's descendants have and data2vec has not.
OTHERS = re.compile(r"pos_embed|cls_pt_layers|encode_task_layer|.*(inner_attn_ln|ffn_layernorm)")


def is_beit(weights, asked: bool) -> bool:
    """data2vec_vision's names are BEiT's; its regression head [D, D] tells them apart. Fine-tuned
    files of either look the same, and of those with a table for each layer one must be asked for;
    with one table for all, which is no layout of BEiT's fine-tuning, they are taken for these."""
    t = weights.tensors
    if not {"cls_token", BEIT.patch, "blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias"} <= set(t):
        return False
    head = tuple(t[BEIT.head].shape) if BEIT.head in t else None
    if head and not asked:
        return len(set(head)) == 1
    return asked or not any(map(OTHERS.match, t))


def beit(weights, folder) -> Plan:
    """facebookresearch/data2vec_vision."""
    has = weights.tensors.__contains__
    head = "mean" if has("fc_norm.weight") else "first" if has("head.weight") else ""
    plan = image_plan(weights, BEIT, tables.BEIT_IMAGE, 1e-6, head)
    return dataclasses.replace(plan, changes={**plan.changes, **statistics(weights, True)})


PORT = BEIT._replace(
    patch="patch_embed.conv.weight",
    mask="mask_emb",
    table=f"encoder.{BEIT.table}",
    own_table=f"encoder.{BEIT.own_table}",
    fc1="encoder.blocks.@.mlp.0.weight",
    scale="encoder.blocks.@.gamma_1",
    norm="encoder.norm.weight",
    head="",
)


def is_port(weights, asked: bool) -> bool:
    """fairseq's port of the vision model, alone or in its fine-tuning wrapper `model.`."""
    start = plans.prefix(weights, PORT.patch)
    return start in ("", "model.") and f"{start}cls_emb" in weights.tensors


def port(weights, folder) -> Plan:
    """fairseq `examples/data2vec/models/data2vec_vision.py`, whose norms have eps 1e-5."""
    start = plans.prefix(weights, PORT.patch)
    ends = {"logits": PORT.logits, "head": ""}
    names = PORT._replace(**{k: f"{start}{v}" for k, v in PORT._asdict().items()} | ends)
    heads = (*norm("fc_norm", "head/norm"), *pair("head", "head/logits"))
    table = under(start, tables.FAIRSEQ_IMAGE) + heads
    head = "mean" if "fc_norm.weight" in weights.tensors else ""
    return image_plan(weights, names, table, 1e-5, head)


def huggingface_names(start: str) -> ImageNames:
    """Of Data2VecVision, behind `start`."""
    layer = f"{start}encoder.layer.@."
    return ImageNames(
        f"{start}embeddings.patch_embeddings.projection.weight",
        f"{start}embeddings.mask_token",
        f"{start}encoder.relative_position_bias.{tables.BIAS_TABLE}",
        f"{layer}attention.attention.relative_position_bias.{tables.BIAS_TABLE}",
        f"{layer}intermediate.dense.weight",
        f"{layer}lambda_1",
        f"{start}layernorm.weight",
        "",
        "classifier.weight",
    )


def require_tensors(weights, names: ImageNames) -> None:
    """UserError where config.json has layer scales or tables of positions that the file lacks."""
    for key, name in (
        ("layer_scale_init_value", names.scale),
        ("use_shared_relative_position_bias", names.table),
        ("use_relative_position_bias", names.own_table),
    ):
        said, name = weights.config.get(key), name.replace("@", "0")
        if isinstance(said, int | float) and said > 0 and name not in weights.tensors:
            raise UserError(
                f"config.json has {key}={said}, but the file no {name}; get all files of the model"
            )


def huggingface(weights, folder) -> Plan:
    """transformers' Data2VecVisionModel and what stands on it."""
    plans.require(
        weights.config,
        {"hidden_act": "gelu", "use_absolute_position_embeddings": False, "num_channels": 3},
    )
    start = plans.prefix(weights, "embeddings.patch_embeddings.projection.weight") or ""
    names, has = huggingface_names(start), weights.tensors.__contains__
    require_tensors(weights, names)
    table = under(start, tables.HUGGINGFACE_IMAGE) + tables.IMAGE_HEADS
    if has(names.table) and has(names.own_table.replace("@", "0")):
        raise UserError(f"the model has both {names.table} and tables of each layer; not supported")
    mean = has(f"{start}pooler.layernorm.weight")
    head = "mean" if mean else "first" if has(names.logits) else ""
    eps = weights.config.get("layer_norm_eps", 1e-12 if "model_type" in weights.config else 1e-6)
    plan = image_plan(weights, names, table, eps, head)
    return dataclasses.replace(plan, changes={**plan.changes, **vocabularies.views(folder)})
