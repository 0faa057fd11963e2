"""ViLT's rule tables: Hugging Face's names (transformers `models/vilt/modeling_vilt.py`)."""

from bivl.weights.data2vec_tables import BUFFER, NO_OBJECTIVE, VISION, split_blocks
from bivl.weights.rules import Rule, norm, pair

INDICES = (Rule("*position_ids", drop=BUFFER), Rule("*text_embeddings.token_type_ids", drop=BUFFER))
OLD_BIAS = "mlm_score.bias"  # a second name of the bias in files of older versions
NEW_BIAS = "mlm_score.decoder.bias"


def encoder(prefix: str) -> tuple[Rule, ...]:
    """ViltModel behind `prefix`."""
    e = f"{prefix}embeddings."
    t = f"{e}text_embeddings."
    return (
        Rule(f"{t}word_embeddings.weight", "embed/words/table"),
        Rule(f"{t}position_embeddings.weight", "embed/text_positions/value"),
        Rule(f"{t}token_type_embeddings.weight", "embed/segment/value"),
        *norm(f"{t}LayerNorm", "embed/text_norm"),
        Rule(f"{e}cls_token", "embed/cls_token/value"),
        Rule(f"{e}position_embeddings", "embed/image_positions/value", "batched"),
        *pair(f"{e}patch_embeddings.projection", "embed/patch/projection", "convolution"),
        Rule(f"{e}token_type_embeddings.weight", "embed/modality/value"),
        *split_blocks(f"{prefix}encoder.layer.", VISION),
        *norm(f"{prefix}layernorm", "trunk/norm"),
        *pair(f"{prefix}pooler.dense", "pool"),
    )


def heads(bias: str = NEW_BIAS) -> tuple[Rule, ...]:
    """The head of masked words, whose last bias is called `bias`; the others have no place."""
    again = () if bias == OLD_BIAS else (Rule(OLD_BIAS, drop=f"{bias}, computed here once"),)
    return (
        *pair("mlm_score.transform.dense", "mlm_head/dense"),
        *norm("mlm_score.transform.LayerNorm", "mlm_head/norm"),
        Rule("mlm_score.decoder.weight", "mlm_head/decoder/kernel", "linear"),
        Rule(bias, "mlm_head/bias/value"),
        *again,
        Rule("classifier.*", drop=NO_OBJECTIVE),
        Rule("rank_output.*", drop=NO_OBJECTIVE),
    )
