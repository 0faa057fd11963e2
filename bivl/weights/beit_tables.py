"""Rule tables of BEiT and BEiT v2: microsoft/unilm's names (`beit/`, `beit2/modeling_pretrain.py`)
and Hugging Face's (`models/beit/modeling_beit.py`). data2vec took over the encoder with its names.
"""

from bivl.weights import data2vec_tables as encoder
from bivl.weights.rules import Rule, moved, norm, pair, under

NO_HEAD = "the file has no head of visual tokens"
TUNED = "the model is fine-tuned"

# Masked image modeling has its norm beside the encoder, which the aggregation shares.
PRETRAINED = (
    *moved(
        "head/projection",
        "lm_head",
        moved("trunk/norm", "norm", encoder.BEIT_IMAGE),
    ),
    *moved("trunk/blocks", "aggregator/blocks", encoder.fused_blocks("cls_pt_layers.")),
)
CLASSIFIED = (
    *(Rule(f"{name}.*", drop=TUNED) for name in ("lm_head", "cls_pt_layers")),
    *encoder.BEIT_IMAGE,
)


def masked(start: str, last: str) -> tuple[Rule, ...]:
    """Hugging Face's encoder behind `start`, its norm called `last`, and the head."""
    table = (rule for rule in encoder.HUGGINGFACE_IMAGE if not rule.path.startswith("trunk/norm"))
    return (*under(start, table), *norm(last, "norm"), *pair("lm_head", "lm_head"))


def classified(start: str) -> tuple[Rule, ...]:
    """Hugging Face's encoder behind `start`, a classifier, or what stands on it and is none."""
    return under(start, encoder.HUGGINGFACE_IMAGE) + encoder.IMAGE_HEADS
