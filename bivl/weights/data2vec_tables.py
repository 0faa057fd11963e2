"""data2vec 1.0's rule tables: the original code's, fairseq's and Hugging Face's names.

Sources of the names: facebookresearch/data2vec_vision (`modeling_cyclical.py`,
`modeling_finetune.py`), fairseq (`examples/data2vec/models`), transformers
(`models/data2vec/modeling_data2vec_*.py`).
"""

from typing import NamedTuple

from bivl.weights.rules import Rule, norm, pair

BLOCKS = "trunk/blocks"
ATTENTION = f"{BLOCKS}/attention"
NO_OBJECTIVE = "no objective has such a head"
BUFFER = "a table of indices, computed here"
BIAS_TABLE = "relative_position_bias_table"
INDICES = (
    Rule("*relative_position_index", drop=BUFFER),
    Rule("*position_ids", drop=BUFFER),
    Rule("*.version", drop="a version number, no weight"),
)


class Names(NamedTuple):
    """What the parts of a block are called, where q, k and v are stored apart."""

    maps: tuple[str, ...]
    """Of q, k, v, and from the heads back."""
    norm1: str
    fc1: str
    fc2: str
    norm2: str


FAIRSEQ = Names(
    tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    "self_attn_layer_norm",
    "fc1",
    "fc2",
    "final_layer_norm",
)
VISION = Names(
    (*(f"attention.attention.{p}" for p in ("query", "key", "value")), "attention.output.dense"),
    "layernorm_before",
    "intermediate.dense",
    "output.dense",
    "layernorm_after",
)
TEXT = Names(
    (*(f"attention.self.{p}" for p in ("query", "key", "value")), "attention.output.dense"),
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
AUDIO = Names(
    tuple(f"attention.{part}_proj" for part in ("q", "k", "v", "out")),
    "layer_norm",
    "feed_forward.intermediate_dense",
    "feed_forward.output_dense",
    "final_layer_norm",
)


def split_blocks(prefix: str, names: Names) -> tuple[Rule, ...]:
    """Blocks `prefix{n}.` with q, k and v apart; a bias that the model has not, has no key."""
    b, parts = f"{prefix}{{n}}.", tuple(zip("qkv", names.maps, strict=False))
    return (
        *(
            Rule(f"{b}{name}.weight", f"{ATTENTION}/qkv/kernel[n,:,{i}]", "linear")
            for i, (_, name) in enumerate(parts)
        ),
        *(
            Rule(f"{b}{name}.bias", f"{ATTENTION}/{part}_bias/value[n]", "flat")
            for part, name in parts
        ),
        *pair(f"{b}{names.maps[3]}", f"{ATTENTION}/out[n]", "merge"),
        *norm(f"{b}{names.norm1}", f"{BLOCKS}/norm1[n]"),
        *pair(f"{b}{names.fc1}", f"{BLOCKS}/mlp/fc1[n]"),
        *pair(f"{b}{names.fc2}", f"{BLOCKS}/mlp/fc2[n]"),
        *norm(f"{b}{names.norm2}", f"{BLOCKS}/norm2[n]"),
    )


def fused_blocks(
    prefix: str,
    fc1: str = "mlp.fc1",
    fc2: str = "mlp.fc2",
    number: str = "n",
    slot: str = "n",
    biases: tuple[str, ...] = ("qv", "qkv"),
) -> tuple[Rule, ...]:
    """Blocks `prefix{number}.` of BEiT and timm: one matrix of q, k and v; `biases` of q and v
    beside it, of all three as one, or either."""
    b = f"{prefix}{{{number}}}."
    return (
        Rule(f"{b}attn.qkv.weight", f"{ATTENTION}/qkv/kernel[{slot}]", "linear"),
        *(
            Rule(f"{b}attn.{part}_bias", f"{ATTENTION}/{part}_bias/value[{slot}]", "flat")
            for part in "qv"
            if "qv" in biases
        ),
        *(
            Rule(f"{b}attn.qkv.bias[{i}/3]", f"{ATTENTION}/{part}_bias/value[{slot}]", "flat")
            for i, part in enumerate("qkv")
            if "qkv" in biases
        ),
        *pair(f"{b}attn.proj", f"{ATTENTION}/out[{slot}]", "merge"),
        *norm(f"{b}norm1", f"{BLOCKS}/norm1[{slot}]"),
        *norm(f"{b}norm2", f"{BLOCKS}/norm2[{slot}]"),
        *pair(f"{b}{fc1}", f"{BLOCKS}/mlp/fc1[{slot}]"),
        *pair(f"{b}{fc2}", f"{BLOCKS}/mlp/fc2[{slot}]"),
        *(Rule(f"{b}gamma_{i}", f"{BLOCKS}/scale{i}/value[{slot}]") for i in (1, 2)),
    )


def patches(source: str) -> tuple[Rule, ...]:
    """The convolution that embeds patches."""
    return pair(source, "embed/patch/projection", "convolution")


RELATIVE = "embed/relative_position/table/value"

BEIT_IMAGE = (
    *INDICES,
    Rule("cls_token", "embed/cls_token/value"),
    Rule("mask_token", "embed/mask_token/value"),
    *patches("patch_embed.proj"),
    Rule(f"rel_pos_bias.{BIAS_TABLE}", RELATIVE),
    *fused_blocks("blocks."),
    Rule(f"blocks.{{n}}.attn.{BIAS_TABLE}", f"{RELATIVE}[n]"),
    *norm("norm", "trunk/norm"),
    *pair("lm_head", "head/projection"),
    *norm("fc_norm", "head/norm"),
    *pair("head", "head/logits"),
)

FAIRSEQ_IMAGE = (
    *INDICES,
    Rule("cls_emb", "embed/cls_token/value"),
    Rule("mask_emb", "embed/mask_token/value"),
    *patches("patch_embed.conv"),
    Rule(f"encoder.rel_pos_bias.{BIAS_TABLE}", RELATIVE),
    *fused_blocks("encoder.blocks.", "mlp.0", "mlp.2"),
    Rule(f"encoder.blocks.{{n}}.attn.{BIAS_TABLE}", f"{RELATIVE}[n]"),
    *norm("encoder.norm", "trunk/norm"),
    Rule("final_proj.*", drop="never applied by the code that trained it"),
    Rule("_ema.*", drop="the teacher"),
    *norm("fc_norm", "head/norm"),
    *pair("head", "head/logits"),
)

HUGGINGFACE_IMAGE = (
    *INDICES,
    Rule("embeddings.cls_token", "embed/cls_token/value"),
    Rule("embeddings.mask_token", "embed/mask_token/value"),
    *patches("embeddings.patch_embeddings.projection"),
    Rule(f"encoder.relative_position_bias.{BIAS_TABLE}", RELATIVE),
    *split_blocks("encoder.layer.", VISION),
    *(Rule(f"encoder.layer.{{n}}.lambda_{i}", f"{BLOCKS}/scale{i}/value[n]") for i in (1, 2)),
    Rule(
        f"encoder.layer.{{n}}.attention.attention.relative_position_bias.{BIAS_TABLE}",
        f"{RELATIVE}[n]",
    ),
    *norm("layernorm", "trunk/norm"),
    *norm("pooler.layernorm", "head/norm"),
)
IMAGE_HEADS = (
    *pair("classifier", "head/logits"),
    *(Rule(f"{name}.*", drop=NO_OBJECTIVE) for name in ("decode_head", "auxiliary_head")),
    *(Rule(f"fpn{i}.*", drop=NO_OBJECTIVE) for i in (1, 2)),
)


def fairseq_words(prefix: str, normed: str = "layernorm_embedding") -> tuple[Rule, ...]:
    """The embedding of texts."""
    return (
        Rule(f"{prefix}embed_tokens.weight", "embed/tokens/table"),
        Rule(f"{prefix}embed_positions.weight", "embed/positions/value"),
        *norm(f"{prefix}{normed}", "embed/norm"),
    )


def fairseq_text(encoder: str = "encoder", normed: str = "layernorm_embedding"):
    """`encoder`: `decoder` in old files; `normed`: `emb_layer_norm` there."""
    sentences = f"{encoder}.sentence_encoder."
    heads = ("regression_head", "lm_head")
    return (
        *INDICES,
        *fairseq_words(sentences, normed),
        *split_blocks(f"{sentences}layers.", FAIRSEQ),
        *(rule for head in heads for rule in pair(f"{encoder}.{head}.0", "head/fc")),
        *(rule for head in heads for rule in pair(f"{encoder}.{head}.2", "head/projection")),
        Rule(f"{encoder}.lm_head.*", drop=NO_OBJECTIVE),
        Rule(f"{encoder}._ema.*", drop="the teacher"),
    )


def text_head(source: str) -> tuple[Rule, ...]:
    """RoBERTa's classifier."""
    return (*pair(f"{source}dense", "head/dense"), *pair(f"{source}out_proj", "head/logits"))


def huggingface_text(types: int) -> tuple[Rule, ...]:
    """`types`: rows of the token types; ours have none, so the first is added to the positions."""
    others = range(1, types)
    source = "embeddings.token_type_embeddings.weight"
    part = (lambda i: f"[{i}/{types}]") if types > 1 else lambda i: ""
    return (
        *INDICES,
        Rule("embeddings.word_embeddings.weight", "embed/tokens/table"),
        Rule("embeddings.position_embeddings.weight", "embed/positions/value"),
        Rule(f"{source}{part(0)}", "+embed/positions/value", "every_row"),
        *(Rule(f"{source}{part(i)}", drop="texts are of one type here") for i in others),
        *norm("embeddings.LayerNorm", "embed/norm"),
        *split_blocks("encoder.layer.", TEXT),
        Rule("pooler.*", drop="random in published models, and read by no objective"),
    )


TEXT_HEADS = (
    *text_head("classifier."),
    *(Rule(f"{name}.*", drop=NO_OBJECTIVE) for name in ("lm_head", "qa_outputs", "classifier")),
)


def convolutions(source: str, path: str) -> tuple[Rule, ...]:
    """Numbered convolutions with bias."""
    return pair(source, path, "convolution")


FAIRSEQ_AUDIO = (
    *INDICES,
    Rule("mask_emb", "embed/fill/value"),
    Rule(
        "feature_extractor.conv_layers.{i}.0.weight",
        "embed/extractor/conv{i}/kernel",
        "convolution",
    ),
    *norm("feature_extractor.conv_layers.{i}.2.1", "embed/extractor/norm{i}"),
    *norm("layer_norm", "embed/norm"),
    *pair("post_extract_proj", "embed/projection"),
    *convolutions("encoder.pos_conv.{i}.0", "embed/positions/conv{i}"),
    *norm("encoder.layer_norm", "trunk/input_norm"),
    *split_blocks("encoder.layers.", FAIRSEQ),
    *pair("final_proj.0", "head/projection"),  # as released
    *pair("final_proj", "head/projection"),
    Rule("_ema.*", drop="the teacher"),
)

HUGGINGFACE_AUDIO = (
    *INDICES,
    Rule("masked_spec_embed", "embed/fill/value"),
    Rule(
        "feature_extractor.conv_layers.{i}.conv.weight",
        "embed/extractor/conv{i}/kernel",
        "convolution",
    ),
    *norm("feature_extractor.conv_layers.{i}.layer_norm", "embed/extractor/norm{i}"),
    *norm("feature_projection.layer_norm", "embed/norm"),
    *pair("feature_projection.projection", "embed/projection"),
    *convolutions("encoder.pos_conv_embed.layers.{i}.conv", "embed/positions/conv{i}"),
    *norm("encoder.layer_norm", "trunk/input_norm"),
    *split_blocks("encoder.layers.", AUDIO),
)
AUDIO_HEADS = (
    *pair("lm_head", "letters"),
    *(Rule(f"{name}.*", drop=NO_OBJECTIVE) for name in ("projector", "classifier", "tdnn")),
    Rule("layer_weights", drop=NO_OBJECTIVE),
    *(Rule(f"feature_extractor.{part}", drop=NO_OBJECTIVE) for part in ("weight", "bias")),
    Rule("objective.*", drop=NO_OBJECTIVE),
)
