"""CLIP's rule tables: OpenAI's and Hugging Face's names.

Sources of the names: openai/CLIP (`clip/model.py`), transformers
(`models/clip/modeling_clip.py`).
"""

import dataclasses

from bivl.weights.data2vec_tables import BUFFER, NO_OBJECTIVE, Names, split_blocks
from bivl.weights.rules import Rule, norm, pair

SIZE = "a size, read from the shapes"
BLOCK = Names(
    tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    "layer_norm1",
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm2",
)


def _split(prefix: str, tower: str) -> tuple[Rule, ...]:
    """Hugging Face's blocks of a tower."""
    rules = split_blocks(prefix, BLOCK)
    return tuple(dataclasses.replace(rule, path=f"{tower}_{rule.path}") for rule in rules)


def _fused(prefix: str, tower: str) -> tuple[Rule, ...]:
    """OpenAI's blocks `prefix{n}.`: `nn.MultiheadAttention` and a named MLP."""
    b, blocks = f"{prefix}{{n}}.", f"{tower}_trunk/blocks"
    attention = f"{blocks}/attention"
    return (
        Rule(f"{b}attn.in_proj_weight", f"{attention}/qkv/kernel[n]", "linear"),
        *(
            Rule(f"{b}attn.in_proj_bias[{i}/3]", f"{attention}/{part}_bias/value[n]", "flat")
            for i, part in enumerate("qkv")
        ),
        *pair(f"{b}attn.out_proj", f"{attention}/out[n]", "merge"),
        *norm(f"{b}ln_1", f"{blocks}/norm1[n]"),
        *pair(f"{b}mlp.c_fc", f"{blocks}/mlp/fc1[n]"),
        *pair(f"{b}mlp.c_proj", f"{blocks}/mlp/fc2[n]"),
        *norm(f"{b}ln_2", f"{blocks}/norm2[n]"),
    )


PATCHES = "image_embed/patch/projection/kernel"
SCALE = Rule("logit_scale", "heads/logit_scale/value")

OPENAI = (
    *(Rule(name, drop=SIZE) for name in ("input_resolution", "context_length", "vocab_size")),
    Rule("*attn_mask", drop="the mask of causal attention, computed here"),
    Rule("visual.class_embedding", "image_embed/cls_token/value", "flat"),
    Rule("visual.positional_embedding", "image_embed/positions/table/value"),
    Rule("visual.conv1.weight", PATCHES, "convolution"),
    *norm("visual.ln_pre", "image_trunk/input_norm"),
    *_fused("visual.transformer.resblocks.", "image"),
    *norm("visual.ln_post", "image_trunk/norm"),
    Rule("visual.proj", "heads/vision_head/kernel"),
    Rule("token_embedding.weight", "text_embed/words/table"),
    Rule("positional_embedding", "text_embed/positions/value"),
    *_fused("transformer.resblocks.", "text"),
    *norm("ln_final", "text_trunk/norm"),
    Rule("text_projection", "heads/language_head/kernel"),
    SCALE,
)

INDICES = (Rule("*position_ids", drop=BUFFER),)


def huggingface_image(prefix: str) -> tuple[Rule, ...]:
    """CLIPVisionModel behind `prefix`; `pre_layrnorm` is spelled so."""
    e = f"{prefix}embeddings."
    return (
        Rule(f"{e}class_embedding", "image_embed/cls_token/value", "flat"),
        Rule(f"{e}position_embedding.weight", "image_embed/positions/table/value"),
        Rule(f"{e}patch_embedding.weight", PATCHES, "convolution"),
        *norm(f"{prefix}pre_layrnorm", "image_trunk/input_norm"),
        *_split(f"{prefix}encoder.layers.", "image"),
        *norm(f"{prefix}post_layernorm", "image_trunk/norm"),
    )


def huggingface_text(prefix: str) -> tuple[Rule, ...]:
    """CLIPTextModel behind `prefix`."""
    e = f"{prefix}embeddings."
    return (
        Rule(f"{e}token_embedding.weight", "text_embed/words/table"),
        Rule(f"{e}position_embedding.weight", "text_embed/positions/value"),
        *_split(f"{prefix}encoder.layers.", "text"),
        *norm(f"{prefix}final_layer_norm", "text_trunk/norm"),
    )


HUGGINGFACE_HEADS = (
    Rule("visual_projection.weight", "heads/vision_head/kernel", "linear"),
    Rule("text_projection.weight", "heads/language_head/kernel", "linear"),
    SCALE,
    Rule("classifier.*", drop=NO_OBJECTIVE),
)
