"""BERT's WordPiece against plain Python, its files and their faults."""

import json
import unicodedata

import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary import wordpiece

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "un", "##aff", "##able", "a", "##f", "!", "'", "cafe", "日", "[", "]", "mask"]
TEXTS = [
    "",
    "  unaffable\taffable, a! aff\n",
    "Café [MASK] 'un' 日本日 \u0000a\u00adf\ufffd",
    "a" * 101 + " a",
]


def plain(text, pieces=PIECES):
    """The longest piece first, of words of cleaned, lower-cased text without accents."""
    text = "".join(
        " " if c.isspace() else c
        for c in text
        if c not in "\0\ufffd" and (c in "\t\n\r" or not unicodedata.category(c).startswith("C"))
    )
    text = "".join(f" {c} " if 0x4E00 <= ord(c) <= 0x9FFF else c for c in text)
    text = unicodedata.normalize("NFD", text.lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    words = "".join(f" {c} " if not c.isalnum() and not c.isspace() else c for c in text).split()
    ids = []
    for word in words:
        found, start = [], 0
        while start < len(word) <= 100:
            ends = range(len(word), start, -1)
            cut = ((end, "##" * bool(start) + word[start:end]) for end in ends)
            start, piece = next((pair for pair in cut if pair[1] in pieces), (len(word) + 1, ""))
            if not piece:
                break
            found.append(pieces.index(piece))
        ids += found if start == len(word) else [1]
    return ids


def written(folder, pieces=PIECES, **settings):
    (folder / "vocab.txt").write_text("\n".join((*pieces, "")), "utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load(path):
    return tokenizers.load({"kind": "wordpiece", "path": str(path)})


@pytest.mark.parametrize("text", TEXTS)
def test_it_equals_plain_python(text, tmp_path):
    assert load(written(tmp_path)).encode(text).tolist() == plain(text)


def test_ids_and_text_again(tmp_path):
    found = load(written(tmp_path))
    assert (found.size, *found.special) == (len(PIECES), 2, 0, 3, 1, 4)
    assert found.decode([2, *found.encode("unaffable a!"), 3, 0, 99]) == "unaffable a!"
    assert not set(found.encode("[MASK] [CLS]").tolist()) & {0, 2, 3, 4}
    np.testing.assert_array_equal(
        wordpiece.continuing(found.data), [piece.startswith("##") for piece in PIECES]
    )
    assert load(tmp_path / "vocab.txt") == found


def test_rules_and_names_are_the_files(tmp_path):
    """Case, accents, Chinese and other names of special pieces."""
    pieces = ["<pad>", *SPECIAL[1:], "A", "a", "é", "日本"]
    rules = {"do_lower_case": False, "pad_token": {"content": "<pad>"}}
    found = load(written(tmp_path, pieces, **rules, tokenize_chinese_chars=False))
    assert found.encode("A a é 日本").tolist() == [5, 6, 7, 8] and found.pad == 0
    assert wordpiece.settings(found.data)["do_lower_case"] is False


def tree(**changes):
    """tokenizer.json of PIECES."""
    found = {
        "added_tokens": [{"id": i, "content": name} for i, name in enumerate(SPECIAL)],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "vocab": {p: i for i, p in enumerate(PIECES)}},
    }
    for name, value in changes.items():
        group, key = name.split("__")
        found[group] = {**found[group], key: value} if key else value
    return found


def test_tokenizer_json_says_the_same(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree()))
    (tmp_path / "plain").mkdir()
    assert load(tmp_path) == load(written(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__type": "BPE"}, "no WordPiece tokenizer of BERT's"),
        ({"pre_tokenizer__type": "Whitespace"}, "no WordPiece tokenizer of BERT's"),
        ({"normalizer__": None}, "it has no mapping 'normalizer'"),
        ({"normalizer__clean_text": False}, "it does not clean text"),
        ({"normalizer__lowercase": 3}, "its lowercase is 3"),
        ({"model__unk_token": "?"}, "its model.unk_token is not"),
        ({"model__max_input_chars_per_word": 10}, "its model.max_input_chars_per_word is not 100"),
        ({"model__vocab": {"a": 1}}, "contradicts the vocabulary|are not 0, 1, 2"),
        ({"added_tokens__": [{"id": 3, "content": "[PAD]"}]}, "contradicts the vocabulary"),
        ({"added_tokens__": "many"}, "contradicts the vocabulary"),
    ],
)
def test_other_rules_are_refused(tmp_path, changes, words):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree(**changes)))
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "a BERT tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    ("pieces", "settings", "words"),
    [
        (PIECES[1:], {}, r"the vocabulary has no \[PAD\]"),
        ([*PIECES, "a"], {}, "a piece stands twice"),
        (PIECES, {"do_lower_case": "yes"}, "its lowercase is yes"),
        (PIECES, {"do_basic_tokenize": False}, "without BERT's basic tokenizer"),
        (PIECES, {"mask_token": 5}, "its mask_token is 5"),
        (PIECES, {"mask_token": "[M]"}, r"the vocabulary has no \[M\]"),
    ],
)
def test_damaged_files_are_refused(tmp_path, pieces, settings, words):
    with pytest.raises(UserError, match=words):
        load(written(tmp_path, pieces, **settings))


def test_a_folder_without_files(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer; name one with vocab.txt, or tokenizer"):
        load(tmp_path)
