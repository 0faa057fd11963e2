"""data2vec 2.0's rule tables: fairseq's names, whether pre-trained or in a wrapper of fine-tuning.

Names: fairseq `examples/data2vec/models/data2vec2.py`, `models/modalities/`, and the wrappers
`mae_image_classification.py`, `data2vec_text_classification.py`, `wav2vec2_asr.py`.
"""

import dataclasses
import functools

from bivl.weights import data2vec_tables as tables
from bivl.weights.rules import Rule, norm, pair

POSITIONS = "fixed_positional_encoder.positions"
TUNED = "the model is fine-tuned"
SHARED = "the teacher's is the student's"

fused = functools.partial(tables.fused_blocks, biases=("qkv",))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the parts of a model are: what stands before all names, its one modality (`IMAGE`,
    `TEXT` or `AUDIO`), and how many blocks the context encoder has."""

    start: str
    kind: str
    prenet: int = 0

    @property
    def own(self) -> str:
        """What stands before the names of the modality."""
        return f"{self.start}modality_encoders.{self.kind}."

    def blocks(self) -> tuple[Rule, ...]:
        """First those of the context encoder, then the main ones; ours are one stack."""
        before = f"{self.own}context_encoder.blocks."
        first = fused(before, number=f"n<{self.prenet}") if self.prenet else ()
        slot = f"n+{self.prenet}" if self.prenet else "n"
        return (*first, *fused(f"{self.start}blocks.", slot=slot))


def image(parts: Parts, positions: tuple[Rule, ...] = ()) -> tuple[Rule, ...]:
    """All but blocks, decoder and head; `positions` is the rule of their table."""
    return (
        *tables.INDICES,
        Rule(f"{parts.own}extra_tokens", "embed/cls_token/value"),
        *tables.patches(f"{parts.own}local_encoder.proj"),
        *norm(f"{parts.own}context_encoder.norm", "trunk/input_norm"),
        *positions,
    )


IMAGE_HEAD = (*norm("fc_norm", "head/norm"), *pair("head", "head/logits"))


def text(parts: Parts) -> tuple[Rule, ...]:
    """All but blocks, decoder and head: RoBERTa's embedding."""
    return (*tables.INDICES, *tables.fairseq_words(f"{parts.own}local_encoder."))


def audio_front(parts: Parts) -> tuple[Rule, ...]:
    """What the teacher shares: from sound to frames."""
    layers = f"{parts.own}local_encoder.conv_layers.{{i}}."
    return (
        Rule(f"{layers}0.weight", "embed/extractor/conv{i}/kernel", "convolution"),
        *norm(f"{layers}2.1", "embed/extractor/norm{i}"),
        *norm(f"{parts.own}project_features.1", "embed/norm"),
        *pair(f"{parts.own}project_features.2", "embed/projection"),
    )


def audio_places(parts: Parts, alibi: str = "alibi") -> tuple[Rule, ...]:
    """What the teacher averages beside the blocks; `alibi` is the layout of the scales."""
    at = f"{parts.own}relative_positional_encoder.{{c}}.0"
    return (
        *tables.convolutions(at, "embed/positions/conv{c-1}"),
        *norm(f"{parts.own}context_encoder.norm", "trunk/input_norm"),
        Rule(f"{parts.own}alibi_scale", "embed/bias/scale/value", alibi),
    )


LETTERS = pair("w2v_encoder.proj", "letters")


def decoder(parts: Parts, layers: int) -> tuple[Rule, ...]:
    """The decoder, whose projection has one or two `layers`."""
    own = f"{parts.own}decoder."
    ends = {"proj.0": "fc", "proj.2": "projection"} if layers == 2 else {"proj": "projection"}
    rules = (rule for key, name in ends.items() for rule in pair(own + key, f"decoder/{name}"))
    return (*tables.convolutions(f"{own}blocks.{{c}}.0", "decoder/conv{c}"), *rules)


def averaged(parts: Parts, table: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The blocks and a table of the student's names, for those under `_ema`."""
    ema = f"{parts.start}_ema."
    return tuple(
        dataclasses.replace(rule, pattern=ema + rule.pattern.removeprefix(parts.start))
        for rule in (*table, *parts.blocks())
    )
