"""ALIGN's rule tables: Hugging Face's names.

Source of the names: transformers (`models/align/modeling_align.py`).
"""

from bivl.weights.data2vec_tables import INDICES as BUFFERS
from bivl.weights.data2vec_tables import TEXT, split_blocks
from bivl.weights.rules import Rule, moved, norm, pair

COUNT = "num_batches_tracked"
STATISTICS = "extras/statistics"
INDICES = (*BUFFERS, Rule(f"*.{COUNT}", drop="a number of updates, which inference never reads"))


def batch_norm(source: str, path: str) -> tuple[Rule, ...]:
    """A batch norm: its parameters, and what it has seen."""
    return (
        *norm(source, path),
        Rule(f"{source}.running_mean", f"{STATISTICS}/{path}/mean"),
        Rule(f"{source}.running_var", f"{STATISTICS}/{path}/variance"),
    )


def image(prefix: str) -> tuple[Rule, ...]:
    """AlignVisionModel behind `prefix`."""
    b, block = f"{prefix}encoder.blocks.{{n}}.", "image_trunk/block{n}"
    return (
        Rule(f"{prefix}embeddings.convolution.weight", "image_trunk/stem/kernel", "convolution"),
        *batch_norm(f"{prefix}embeddings.batchnorm", "image_trunk/stem_norm"),
        Rule(f"{b}expansion.expand_conv.weight", f"{block}/expand/kernel", "pointwise"),
        *batch_norm(f"{b}expansion.expand_bn", f"{block}/expand_norm"),
        Rule(
            f"{b}depthwise_conv.depthwise_conv.weight", f"{block}/depthwise/kernel", "convolution"
        ),
        *batch_norm(f"{b}depthwise_conv.depthwise_norm", f"{block}/depthwise_norm"),
        *pair(f"{b}squeeze_excite.reduce", f"{block}/reduce", "pointwise"),
        *pair(f"{b}squeeze_excite.expand", f"{block}/excite", "pointwise"),
        Rule(f"{b}projection.project_conv.weight", f"{block}/project/kernel", "pointwise"),
        *batch_norm(f"{b}projection.project_bn", f"{block}/project_norm"),
    )


def text(prefix: str, types: int) -> tuple[Rule, ...]:
    """AlignTextModel behind `prefix`; `types`: rows of the token types, of which texts have the
    first: it is added to the positions."""
    e, positions = f"{prefix}embeddings.", "text_embed/positions/value"
    source = f"{e}token_type_embeddings.weight"
    part = (lambda i: f"[{i}/{types}]") if types > 1 else lambda i: ""
    return (
        Rule(f"{e}word_embeddings.weight", "text_embed/words/table"),
        Rule(f"{e}position_embeddings.weight", positions),
        Rule(f"{source}{part(0)}", f"+{positions}", "every_row"),
        *(Rule(f"{source}{part(i)}", drop="texts are of one type") for i in range(1, types)),
        *norm(f"{e}LayerNorm", "text_trunk/input_norm"),
        *moved("trunk", "text_trunk", split_blocks(f"{prefix}encoder.layer.", TEXT)),
        Rule(f"{prefix}pooler.*", drop="ALIGN reads the first token itself"),
    )


HEADS = (
    *pair("text_projection", "heads/language_head"),
    Rule("temperature", "heads/temperature/value"),
)
