"""The files of byte-level BPE tokenizers, as Hugging Face and fairseq lay them out.

Whoever wrote the files is not trusted: all that is read is checked, and every fault is a
ValueError.
"""

import collections
import json
from collections.abc import Mapping
from typing import Any

# In the order of RoBERTa's ids, the last of which stands at the end of the vocabulary.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LAYOUTS = (
    ("encoder.json", "vocab.bpe", "dict.txt"),
    ("vocab.json", "merges.txt"),
    ("tokenizer.json",),
)
MAX_PIECES = 2**21
Merges = list[tuple[str, str]]


def parse(
    names: tuple[str, ...], contents: tuple[bytes, ...]
) -> tuple[dict[str, int], Merges, int, bool]:
    """The contents of the files of one layout -> (vocabulary, merges, size, add_prefix_space).

    vocabulary: piece -> id, the five special pieces included. Pieces that only merges need have
      ids from `size` on.
    """
    texts = [content.decode("utf-8-sig") for content in contents]
    vocabulary, prefix = json.loads(texts[0]), False
    if names == ("tokenizer.json",):
        vocabulary, merges, prefix = _parse_tokenizer_json(vocabulary)
    else:
        merges = parse_merges(texts[1])
    check_vocabulary(vocabulary)
    if "dict.txt" in names:
        vocabulary, size = _fairseq_ids(vocabulary, texts[2])
    else:
        for name in SPECIAL:
            vocabulary.setdefault(name, len(vocabulary))
        size = len(vocabulary)
    for left, right in merges:
        if not (left and right and {left, right, left + right} <= vocabulary.keys()):
            raise ValueError(f"the merge {left!r} {right!r} is not in the vocabulary")
        if left + right in SPECIAL:
            raise ValueError(f"a merge makes the special token {left + right}")
    return vocabulary, merges, size, prefix


def parse_merges(text: str) -> Merges:
    """The lines of merges.txt."""
    # Only \n ends a line: pieces hold other characters that splitlines would take for ends.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return [pair(line.split(" ")) for line in lines if line]


def pair(parts: Any) -> tuple[str, str]:
    """One merge."""
    if not (isinstance(parts, list) and len(parts) == 2 and all(type(p) is str for p in parts)):
        raise ValueError(f"{str(parts)[:80]} is no merge of two pieces")
    return parts[0], parts[1]


def _parse_tokenizer_json(tree: Any) -> tuple[dict[str, int], Merges, bool]:
    """(vocabulary, merges, add_prefix_space). Rules other than GPT-2's are refused."""
    model, splitter = (mapping(tree, key) for key in ("model", "pre_tokenizer"))
    if model.get("type", "BPE") != "BPE" or splitter.get("type") != "ByteLevel":
        raise ValueError("it is no byte-level BPE")
    if tree.get("normalizer") or not splitter.get("use_regex", True):
        raise ValueError("it changes or splits text otherwise than GPT-2")
    rules = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for rule in (*rules, "ignore_merges"):
        if model.get(rule):
            raise ValueError(f"its model.{rule} is set, which GPT-2 has not")
    return *pieces_of(tree, model), bool(splitter.get("add_prefix_space"))


def pieces_of(tree: dict[str, Any], model: dict[str, Any]) -> tuple[dict[str, int], Merges]:
    """(vocabulary, merges) of a tokenizer.json whose rules are known, added tokens included."""
    vocabulary = dict(mapping(model, "vocab"))
    merges, added = model.get("merges"), tree.get("added_tokens") or []
    if not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError("its merges or added_tokens are no list")
    for token in added:
        name = token.get("content") if isinstance(token, dict) else None
        if type(name) is not str or vocabulary.setdefault(name, token.get("id")) != token.get("id"):
            raise ValueError(f"the added token {str(token)[:80]} contradicts the vocabulary")
    return vocabulary, [pair(m.split(" ") if isinstance(m, str) else m) for m in merges]


def mapping(tree: Any, key: str) -> dict[str, Any]:
    """tree[key], if it is a mapping."""
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, dict):
        raise ValueError(f"it has no mapping {key!r}")
    return value


def check_vocabulary(vocabulary: Any) -> None:
    """ValueError unless the pieces have the ids 0, 1, 2 and so on."""
    if not isinstance(vocabulary, dict) or not 0 < len(vocabulary) <= MAX_PIECES:
        raise ValueError("the vocabulary is no mapping of pieces to ids, or too large")
    ids = set(vocabulary.values()) if all(type(i) is int for i in vocabulary.values()) else ()
    if len(ids) != len(vocabulary) or min(ids) != 0 or max(ids) != len(ids) - 1:
        raise ValueError("the ids of the vocabulary are not 0, 1, 2 and so on, each once")


def _fairseq_ids(encoder: Mapping[str, int], dictionary: str) -> tuple[dict[str, int], int]:
    """(piece -> fairseq's id, V) from encoder.json and the text of dict.txt."""
    pieces = {str(number): piece for piece, number in encoder.items()}
    symbols = [line.split()[0] for line in dictionary.split("\n") if line.strip()]
    twice = [symbol for symbol, count in collections.Counter(symbols).items() if count > 1]
    if twice or len(symbols) > MAX_PIECES:
        raise ValueError(f"dict.txt is too long, or has {twice[:1]} twice")
    # A filler (madeupword0000) has no piece; with a space in it, its name is that of no piece.
    ordered = [*SPECIAL[:4], *(pieces.pop(symbol, " " + symbol) for symbol in symbols), SPECIAL[4]]
    vocabulary = {piece: number for number, piece in enumerate(ordered)}
    if len(vocabulary) < len(ordered):
        raise ValueError("encoder.json has a special token as a piece")
    size = len(vocabulary)
    for piece in pieces.values():
        vocabulary.setdefault(piece, len(vocabulary))
    return vocabulary, size
