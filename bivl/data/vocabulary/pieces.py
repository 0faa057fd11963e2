"""SentencePiece models: ids of their own, and the ids that XLM-R gives the same pieces."""

import functools
from collections.abc import Callable
from typing import Any

from bivl.data.vocabulary.layouts import MAX_PIECES


@functools.lru_cache(2)
def _model(data: bytes) -> Any:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    if not 0 < model.get_piece_size() <= MAX_PIECES:
        raise ValueError("no pieces, or too many")
    return model


def make(data: bytes) -> tuple[int, ...]:
    """Size, bos, pad, eos, unk, mask: the model's own, or appended in this order; mask always is.

    Raises what the library raises for bytes that are no model.
    """
    model = _model(data)
    size = model.get_piece_size()
    special = []
    for own in (model.bos_id(), model.pad_id(), model.eos_id(), model.unk_id(), -1):
        special.append(own if own >= 0 else size)
        size += own < 0
    return size, *special


def make_xlmr(data: bytes) -> tuple[int, ...]:
    """The same in XLM-R's ids: <s>, <pad>, </s>, <unk>, then each piece's number + 1, and <mask>.

    Raises ValueError for a model whose first pieces are others than XLM-R's.
    """
    model = _model(data)
    if (model.unk_id(), model.bos_id(), model.eos_id()) != (0, 1, 2):
        raise ValueError(
            "its first pieces are not <unk>, <s>, </s>, which XLM-R's ids need: use "
            "kind=sentencepiece"
        )
    pieces = model.get_piece_size()
    return pieces + 2, 0, 1, 2, 3, pieces + 1


def opened(data: bytes) -> tuple[Callable, Callable]:
    """encode: texts -> lists of ids; decode: ids -> text."""
    model = _model(data)
    pieces = model.get_piece_size()

    def encode(texts: list[str]) -> list[list[int]]:
        # Threads are started for each call: 200 us, not worth it for a few texts.
        return model.encode(texts, num_threads=1 if len(texts) < 64 else -1)

    return encode, lambda ids: model.decode([i for i in ids if i < pieces])


def opened_xlmr(data: bytes) -> tuple[Callable, Callable]:
    """`opened` in XLM-R's ids."""
    encode, decode = opened(data)

    def encode_shifted(texts: list[str]) -> list[list[int]]:
        return [[piece + 1 if piece else 3 for piece in row] for row in encode(texts)]

    return encode_shifted, lambda ids: decode([i - 1 for i in ids])
