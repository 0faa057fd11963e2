"""VQ-KD, the visual tokenizer of BEiT v2, as microsoft/unilm stores it: `beit2/modeling_vqkd.py`,
`norm_ema_quantizer.py`. Encoder, codebook and decoder; what trained it is dropped.
"""

import math

from bivl.core.errors import UserError
from bivl.weights import plan as plans
from bivl.weights.data2vec_tables import fused_blocks
from bivl.weights.plan import Layout, Plan
from bivl.weights.rules import Rule, moved, norm, pair

CODES = "quantize.embedding.weight"
PATCH = "encoder.patch_embed.proj.weight"
FC1 = "encoder.blocks.@.mlp.fc1.weight"
COUNT = "a count of its training"


def transformer(part: str, embed: str, trunk: str) -> tuple[Rule, ...]:
    """BEiT's fine-tuning model without a head, `part` of a file; CLS has a position here."""
    return (
        Rule(f"{part}.cls_token", f"{embed}/cls_token/value"),
        Rule(f"{part}.pos_embed", f"{embed}/positions/table/value", "batched"),
        *pair(f"{part}.patch_embed.proj", f"{embed}/patch/projection", "convolution"),
        *moved("trunk", trunk, fused_blocks(f"{part}.blocks.")),
        *norm(f"{part}.fc_norm", f"{trunk}/norm"),
    )


TABLE = (
    *transformer("encoder", "embed", "trunk"),
    *transformer("decoder", "decode_embed", "decode_trunk"),
    *pair("encode_task_layer.0", "encode_task/hidden"),
    *pair("encode_task_layer.2", "encode_task/projection"),
    *pair("decode_task_layer.0", "decode_task/hidden"),
    *pair("decode_task_layer.2", "decode_task/projection"),
    Rule(CODES, "extras/codebook/vectors"),
    Rule("quantize.embedding.initted", "extras/codebook/fitted", "flat"),
    Rule("quantize.cluster_size", drop=COUNT),
    Rule("quantize.embedding.cluster_size", drop=COUNT),
    Rule("quantize.embedding.embed_avg", drop="nothing reads it"),
    *(
        Rule(f"{name}*", drop="of its training, no part of the tokenizer")
        for name in ("teacher", "scaling", "loss")
    ),
)


def is_vqkd(weights, asked: bool) -> bool:
    """By the codebook and the layers before it."""
    return {CODES, PATCH, "encode_task_layer.0.weight"} <= set(weights.tensors)


def vqkd(weights, folder) -> Plan:
    """Its teacher is not at hand: codes can be had at once, training on needs one."""
    width, _, patch, _ = plans.shape(weights, PATCH, 4)
    mlp, _ = plans.shape(weights, FC1.replace("@", "0"), 2)
    _, rows, _ = plans.shape(weights, "encoder.pos_embed", 3)
    codes, code_width = plans.shape(weights, CODES, 2)
    outputs, _ = plans.shape(weights, "decode_task_layer.2.weight", 2)
    pattern = FC1.replace(".", r"\.").replace("@", r"(\d+)") + "$"
    changes, unknown = plans.encoder_sizes(weights, pattern, width, mlp)
    side = math.isqrt(max(rows - 1, 0))
    if side * side != rows - 1 or not side:
        raise UserError(f"encoder.pos_embed has {rows} rows, not CLS and a square of patches")
    changes |= {
        "steps": 0,
        "model.patch_size": patch,
        "image_size": side * patch,
        "decoder.depth": plans.count(weights, r"decoder\.blocks\.(\d+)\.norm1\.weight$"),
        "codebook.size": codes,
        "codebook.width": code_width,
        "teacher.outputs": outputs,
    }
    fresh = {"extras/codebook/idle": "how long a code was not used is counted anew"}
    config = f"pretrain/vqkd.py:size={plans.size(width)}"
    return Plan(config, changes, TABLE, fresh, unknown)


FAMILIES = {"vqkd": {"official": Layout(is_vqkd, vqkd)}}
