"""BEiT-3: which of its models a file is, and the config that it becomes.

Pre-trained, contrastive (itc, retrieval), ImageNet, VQA, NLVR2 and captioning models as
microsoft/unilm writes them, torchscale's bare encoder, and the image branch in timm. Any image
size: tables of positions are resized where --config.image_size is another.
"""

import math

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.weights import beit3_export
from bivl.weights import beit3_tables as tables
from bivl.weights import plan as plans
from bivl.weights.plan import Layout, Plan

PATCH = "vision_embed.proj.weight"
FIRST = "encoder.layers.0.self_attn.q_proj.A.weight"
HEADS = {1408: 16}  # of the giant, 88 wide; those of the released models are 64 wide
TOKENIZER = "beit3.spm"
TOKENIZER_SIZE = 64_002  # of the 64,010 rows of the table of words
NO_MASK = "the file has no mask token"


def is_official(weights, asked: bool) -> bool:
    """unilm's wrapper `beit3.`, or the encoder alone."""
    start = plans.prefix(weights, PATCH)
    return start is not None and f"{start}{FIRST}" in weights.tensors


def is_timm(weights, asked: bool) -> bool:
    """A vision transformer with the inner norms of sub-LN."""
    wanted = {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.norm.weight"}
    return wanted | {"blocks.0.mlp.norm.weight", "blocks.0.attn.qkv.bias"} <= set(weights.tensors)


def sizes(weights, patch: str, fc1: str, rows: int) -> tuple[dict, dict]:
    """(changes, unknown) of the image branch; `rows` of its table of positions, CLS among them."""
    width, _, size, _ = plans.shape(weights, patch, 4)
    mlp, _ = plans.shape(weights, fc1.replace("@", "0"), 2)
    blocks = fc1.replace(".", r"\.").replace("@", r"(\d+)") + "$"
    changes, unknown = plans.encoder_sizes(weights, blocks, width, mlp)
    if width in HEADS:
        changes["model.num_heads"], unknown = HEADS[width], {}
    side = math.isqrt(max(rows - 1, 0))
    if side * side != rows - 1 or not side:
        raise UserError(
            f"the image has positions for CLS and {rows - 1} patches, which no square grid has; "
            "give another file"
        )
    return changes | {"model.patch_size": size, "image_size": side * size}, unknown


def named(width: int) -> str:
    """The published size whose training settings are nearest."""
    return "giant" if width in HEADS else plans.size(width)


def official(weights, folder) -> Plan:
    """microsoft/unilm `beit3/`, by the heads that there are."""
    start, has = plans.prefix(weights, PATCH), weights.tensors.__contains__
    rows, width = plans.shape(weights, f"{start}encoder.embed_positions.A.weight", 2)
    fc1 = f"{start}encoder.layers.@.ffn.A.fc1.weight"
    changes, unknown = sizes(weights, f"{start}{PATCH}", fc1, rows - 2)
    if has("head.weight") or not has(f"{start}text_embed.weight"):
        table = tables.official(start, texts=False, last_norm=False) + tables.CLASSIFIED
        return classes(weights, changes, unknown, table)
    found, notes = texts(weights, start, folder)
    changes |= found | {
        "model.final_norm": has(f"{start}encoder.layer_norm.A.weight"),
        "masking.min_block": max(1, min(16, (rows - 3) // 12)),
    }
    if has("vision_head.weight"):
        changes["contrast.width"] = plans.shape(weights, "vision_head.weight", 2)[0]
        table = tables.official(start) + tables.CONTRASTED
        config = f"finetune/contrastive.py:size={named(width)}"
        return Plan(config, changes, table, {}, unknown, notes=notes)
    if has("pooler.dense.weight") or has("head.dense1.weight"):
        return answers(weights, start, changes, unknown, notes)
    changes |= masked(weights)
    table = (*tables.official(start), *tables.MASKED)
    length = min(512, changes["model.text_rows"] - 2)
    config = f"pretrain/beit3.py:size={named(width)}"
    return Plan(config, changes | {"text.length": length}, table, {}, unknown, notes=notes)


def texts(weights, start: str, folder) -> tuple[dict, tuple[str, ...]]:
    """(changes, notes) of the words, their positions and the tokenizer beside the file."""
    vocabulary, _ = plans.shape(weights, f"{start}text_embed.weight", 2)
    rows, _ = plans.shape(weights, f"{start}encoder.embed_positions.B.weight", 2)
    changes = {"model.vocabulary": vocabulary, "model.text_rows": rows}
    changes |= {"pair.length": min(64, rows - 2), "augment.squash": True}
    file = folder / TOKENIZER if folder else None
    if file and file.is_file():
        found = tokenizers.load({"kind": "xlmr", "path": str(file)})
        if found.size > vocabulary:
            raise UserError(
                f"{file} has {found.size} ids, the model {vocabulary}; put the model's own there"
            )
        return changes | {"tokenizer.kind": "xlmr", "tokenizer.path": str(file)}, ()
    note = (
        f"no {TOKENIZER} lies beside the weights: the model takes token ids alone; pass "
        f"--config.tokenizer.kind=xlmr --config.tokenizer.path={TOKENIZER} for texts"
    )
    ids = {"kind": "ids", "path": "", "size": min(vocabulary, TOKENIZER_SIZE)}
    return changes | {f"tokenizer.{key}": value for key, value in ids.items()}, (note,)


def masked(weights) -> dict:
    """Changes for masked data modeling with the heads that there are: none, too, which is an
    encoder alone. The tokenizer of images is not at hand, so nothing is trained before one is."""
    has, changes = weights.tensors.__contains__, {"steps": 0}
    for name, losses in (
        ("mim_head", ("images", "pairs_image")),
        ("mlm_head", ("texts", "pairs_text")),
    ):
        if not has(f"{name}.weight"):
            changes |= {f"loss_weights.{loss}": 0.0 for loss in losses}
    if has("mim_head.weight"):
        changes["teacher.outputs"] = plans.shape(weights, "mim_head.weight", 2)[0]
    return changes


def answers(weights, start: str, changes: dict, unknown: dict, notes) -> Plan:
    """The plan of VQA, whose head reads what no final norm has seen, or of NLVR2."""
    vqa = "pooler.dense.weight" in weights.tensors
    last = "head.3.weight" if vqa else "head.dense2.weight"
    changes["num_classes"] = plans.shape(weights, last, 2)[0]
    if vqa:
        changes["model.final_norm"] = False
    table = tables.official(start, last_norm=not vqa)
    table += tables.ANSWERED if vqa else tables.COMPARED
    name = f"finetune/{'vqa' if vqa else 'nlvr2'}.py"
    config = f"{name}:size={plans.size(changes['model.width'])}"
    return Plan(config, changes, table, {}, unknown, notes=notes)


def classes(weights, changes: dict, unknown: dict, table, fresh=()) -> Plan:
    """The plan of a classifier of images; without one, the branch alone under two fresh classes."""
    missing, changes = dict(fresh), changes | {"num_classes": 2}
    if "head.weight" in weights.tensors:
        changes["num_classes"] = plans.shape(weights, "head.weight", 2)[0]
    else:
        missing["head/logits"] = "the file has no classifier"
    if "fc_norm.weight" not in weights.tensors:
        missing["head/norm"] = "the file has no classifier"
    c = weights.config
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        given = plans.setting(c, name)
        if isinstance(given, list | tuple) and len(given) == 3:
            changes[key] = tuple(given)
    config = f"finetune/beit3_image.py:size={plans.size(changes['model.width'])}"
    return Plan(config, changes, table, missing, unknown)


def timm(weights, folder) -> Plan:
    """timm's vision transformers `beit3_*`: classifiers, or without their last map."""
    _, rows, _ = plans.shape(weights, "pos_embed", 3)
    fc1 = "blocks.@.mlp.fc1.weight"
    changes, unknown = sizes(weights, "patch_embed.proj.weight", fc1, rows)
    fresh = {"embed/mask_token": NO_MASK}
    return classes(weights, changes, unknown, tables.TIMM, fresh)


FAMILIES = {
    "beit3": {"official": Layout(is_official, official), "timm": Layout(is_timm, timm)},
}
EXPORTS = {"official": (beit3_export.official,)}
