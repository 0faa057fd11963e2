"""BERT's WordPiece: its files, checked, and the library's tokenizer that splits as BERT does.

Text is cleaned, lower-cased and rid of accents where the files say so, split at spaces and
punctuation, and each word cut into the longest pieces of the vocabulary from its start; those
inside a word begin with `##` (google-research/bert `tokenization.py`). Whoever wrote the files is
not trusted: every fault is a ValueError.
"""

import functools
import json
from typing import Any

import numpy as np

from bivl.data.vocabulary import layouts

PREFIX, LONGEST = "##", 100  # of a piece inside a word; of a word in characters
LAYOUTS = (("vocab.txt", "tokenizer_config.json"), ("tokenizer.json",), ("vocab.txt",))
SPECIAL = {"cls": "[CLS]", "pad": "[PAD]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
Rules = dict[str, Any]


@functools.lru_cache(4)
def make(names: tuple[str, ...], contents: tuple[bytes, ...]) -> tuple:
    """The contents of the files of one layout -> (the library's tokenizer as JSON, size, and the
    ids of [CLS], [PAD], [SEP], [UNK] and [MASK])."""
    texts, special = [content.decode("utf-8-sig") for content in contents], SPECIAL
    if names == ("tokenizer.json",):
        vocabulary, rules = _parse_tokenizer_json(json.loads(texts[0]))
    else:
        vocabulary = _parse_lines(texts[0])
        settings = json.loads(texts[1]) if len(texts) > 1 else {}
        rules, special = _rules(settings), _named(settings)
    layouts.check_vocabulary(vocabulary)
    for name in special.values():
        if name not in vocabulary:
            raise ValueError(f"the vocabulary has no {name}")
    data = build(vocabulary, rules, special["unk"]).to_str().encode()
    return data, len(vocabulary), *(vocabulary[name] for name in special.values())


def _parse_lines(text: str) -> dict[str, int]:
    """vocab.txt: a piece a line."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary = {piece: number for number, piece in enumerate(lines)}
    if len(vocabulary) < len(lines):
        raise ValueError("a piece stands twice in vocab.txt")
    return vocabulary


def _rules(settings: Any) -> Rules:
    """What tokenizer_config.json says of cleaning; else as BERT's uncased models."""
    if not isinstance(settings, dict):
        raise ValueError("tokenizer_config.json holds no settings")
    found = {
        "lowercase": settings.get("do_lower_case", True),
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),
    }
    if not settings.get("do_basic_tokenize", True):
        raise ValueError("it does without BERT's basic tokenizer")
    return _checked(found)


def _checked(rules: Rules) -> Rules:
    for name, value in rules.items():
        if not (isinstance(value, bool) or (value is None and name == "strip_accents")):
            raise ValueError(f"its {name} is {str(value)[:80]}")
    return rules


def _named(settings: dict) -> dict[str, str]:
    """Names of the special pieces."""
    found = {}
    for name, usual in SPECIAL.items():
        given = settings.get(f"{name}_token", usual)
        given = given.get("content") if isinstance(given, dict) else given
        if not isinstance(given, str):
            raise ValueError(f"its {name}_token is {str(given)[:80]}")
        found[name] = given
    return found


def _parse_tokenizer_json(tree: Any) -> tuple[dict[str, int], Rules]:
    """(vocabulary, rules). Rules other than BERT's are refused."""
    model, cleaned = (layouts.mapping(tree, key) for key in ("model", "normalizer"))
    kinds = model.get("type", "WordPiece"), cleaned.get("type")
    kinds = *kinds, layouts.mapping(tree, "pre_tokenizer").get("type")
    if kinds != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        raise ValueError("it is no WordPiece tokenizer of BERT's")
    for name, value in (
        ("continuing_subword_prefix", PREFIX),
        ("max_input_chars_per_word", LONGEST),
        ("unk_token", SPECIAL["unk"]),
    ):
        if model.get(name, value) != value:
            raise ValueError(f"its model.{name} is not {value}")
    if not cleaned.get("clean_text", True):
        raise ValueError("it does not clean text, which BERT does")
    vocabulary, added = dict(layouts.mapping(model, "vocab")), tree.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        name = token.get("content") if isinstance(token, dict) else None
        if type(name) is not str or vocabulary.setdefault(name, token.get("id")) != token.get("id"):
            raise ValueError(f"the added token {str(token)[:80]} contradicts the vocabulary")
    names = ("lowercase", "handle_chinese_chars", "strip_accents")
    defaults = (True, True, None)
    rules = {name: cleaned.get(name, value) for name, value in zip(names, defaults, strict=True)}
    return vocabulary, _checked(rules)


def build(vocabulary: dict[str, int], rules: Rules, unknown: str) -> Any:
    """The library's tokenizer; a word that the pieces do not make becomes `unknown`."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    options = {"continuing_subword_prefix": PREFIX, "max_input_chars_per_word": LONGEST}
    model = tokenizers.models.WordPiece(vocabulary, unk_token=unknown, **options)
    codec = tokenizers.Tokenizer(model)
    codec.normalizer = normalizers.BertNormalizer(clean_text=True, **rules)
    codec.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    codec.decoder = decoders.WordPiece(prefix=PREFIX)
    return codec


def pieces(data: bytes) -> list[str]:
    """What `build` gave, as JSON -> the pieces by id."""
    vocabulary = json.loads(data)["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


def continuing(data: bytes) -> np.ndarray:
    """What `build` gave, as JSON -> bool [V]: the pieces inside words."""
    return np.array([piece.startswith(PREFIX) for piece in pieces(data)])


def settings(data: bytes) -> dict[str, Any]:
    """What `build` gave, as JSON -> tokenizer_config.json's names for its rules."""
    rules = json.loads(data)["normalizer"]
    return {
        "do_lower_case": rules["lowercase"],
        "tokenize_chinese_chars": rules["handle_chinese_chars"],
        "strip_accents": rules["strip_accents"],
    }
