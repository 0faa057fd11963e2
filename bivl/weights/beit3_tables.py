"""Rule tables of BEiT-3: microsoft/unilm's names, whose encoder is torchscale's, and timm's.

Every map exists twice there, A for images and B for texts. Sources of the names: torchscale 0.2.0
(`model/BEiT3.py`, `architecture/encoder.py`), `beit3/modeling_finetune.py`, and timm
(`models/vision_transformer.py`, which renames branch A).
"""

from bivl.weights.data2vec_tables import fused_blocks, patches
from bivl.weights.rules import Rule, moved, norm, pair, under

SIDES = {"image": "A", "text": "B"}
IMAGES_ALONE = "the classifier reads images alone"
CONTRAST = "the model is tuned to contrast"
ANSWERS = "the model is tuned to answer"


def blocks(modality: str) -> tuple[Rule, ...]:
    """The layers of one side."""
    s, layer, ours = SIDES[modality], "encoder.layers.{n}.", f"trunk/{modality}_blocks"
    attention, theirs = f"{ours}/attention", f"{layer}self_attn."
    return (
        *(
            Rule(f"{theirs}{p}_proj.{s}.weight", f"{attention}/qkv/kernel[n,:,{i}]", "linear")
            for i, p in enumerate("qkv")
        ),
        *(
            Rule(f"{theirs}{p}_proj.{s}.bias", f"{attention}/{p}_bias/value[n]", "flat")
            for p in "qkv"
        ),
        *pair(f"{theirs}out_proj.{s}", f"{attention}/out[n]", "merge"),
        *norm(f"{theirs}inner_attn_ln.{s}", f"{attention}/norm[n]"),
        *norm(f"{layer}self_attn_layer_norm.{s}", f"{ours}/norm1[n]"),
        *pair(f"{layer}ffn.{s}.fc1", f"{ours}/mlp/fc1[n]"),
        *pair(f"{layer}ffn.{s}.fc2", f"{ours}/mlp/fc2[n]"),
        *norm(f"{layer}ffn.{s}.ffn_layernorm", f"{ours}/mlp/norm[n]"),
        *norm(f"{layer}final_layer_norm.{s}", f"{ours}/norm2[n]"),
    )


IMAGE = (
    Rule("vision_embed.cls_token", "embed/cls_token/value"),
    Rule("vision_embed.mask_token", "embed/mask_token/value"),
    *patches("vision_embed.proj"),
    Rule("encoder.embed_positions.A.weight", "embed/image_positions/value", "positions"),
    *blocks("image"),
    *norm("encoder.layer_norm.A", "trunk/image_norm"),
)
TEXT = (
    Rule("text_embed.weight", "embed/words/table"),
    Rule("encoder.embed_positions.B.weight", "embed/text_positions/value"),
    *blocks("text"),
    *norm("encoder.layer_norm.B", "trunk/text_norm"),
)
NO_TEXT = tuple(Rule(name, drop=IMAGES_ALONE) for name in ("text_embed.*", "encoder.*.B.*"))
LAST_NORM = Rule("encoder.layer_norm.*", drop="the head has a norm of its own")

MASKED = (*pair("mlm_head", "heads/mlm_head"), *pair("mim_head", "heads/mim_head"))
CONTRASTED = (
    Rule("vision_head.weight", "heads/vision_head/kernel", "linear"),
    Rule("language_head.weight", "heads/language_head/kernel", "linear"),
    Rule("logit_scale", "heads/logit_scale/value"),
    *(Rule(f"{name}_head.*", drop=CONTRAST) for name in ("mlm", "mim")),
)
UNASKED = tuple(Rule(f"{name}_head.*", drop=ANSWERS) for name in ("mlm", "mim"))
CLASSIFIED = (*norm("fc_norm", "head/norm"), *pair("head", "head/logits"))
ANSWERED = (  # VQA
    *norm("pooler.norm", "head/pooler_norm"),
    *pair("pooler.dense", "head/pooler"),
    *pair("head.0", "head/fc"),
    *norm("head.1", "head/norm"),
    *pair("head.3", "head/logits"),
    *UNASKED,
)
COMPARED = (  # NLVR2
    *norm("head.norm1", "head/norm1"),
    *pair("head.dense1", "head/dense"),
    *norm("head.norm2", "head/norm2"),
    *pair("head.dense2", "head/logits"),
    *UNASKED,
)


def official(start: str, texts: bool = True, last_norm: bool = True) -> tuple[Rule, ...]:
    """The encoder behind `start`; without `texts` what they need is dropped, and without
    `last_norm` that."""
    table = (*IMAGE, *TEXT) if texts else (*NO_TEXT, *IMAGE)
    return under(start, table if last_norm else (LAST_NORM, *table))


TIMM = (
    Rule("cls_token", "embed/cls_token/value"),
    *patches("patch_embed.proj"),
    Rule("pos_embed", "embed/image_positions/value", "read_positions"),
    *moved("trunk/blocks", "trunk/image_blocks", fused_blocks("blocks.")),
    *norm("blocks.{n}.attn.norm", "trunk/image_blocks/attention/norm[n]"),
    *norm("blocks.{n}.mlp.norm", "trunk/image_blocks/mlp/norm[n]"),
    *CLASSIFIED,
)
