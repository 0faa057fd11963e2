"""Tokenizers against byte-level BPE in plain Python, their ids, and files of other kinds."""

import hashlib
import io
import json
import multiprocessing
import pathlib
import pickle
import platform
import re
import shutil

import numpy as np
import pytest
import sentencepiece

from bivl import prepare as entry
from bivl.core.errors import UserError
from bivl.data import scene_things, scene_words, texts, tokenizers
from bivl.data.pieces import prepare as pieces_of
from bivl.data.vocabulary import prepare as vocabulary

SMALL = pathlib.Path(vocabulary.__file__).parent / "small"
PIECES = pathlib.Path(pieces_of.__file__).parent / "small_xlmr.model"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# Hashes of what the committed vocabulary was trained on, and of the result.
TEXTS_SHA256 = "6f6b5cc0fa3dba8d37855b369059831c44dcd29dbb495e9e114744772d64dd90"
VOCABULARY_SHA256 = "81e041d55a68d268534ee1c71b46f96e0fead741ccc7ebbdc2de29e8cb3c0eeb"
PIECES_TEXTS_SHA256 = "7ddd7b332165ff2d1bd32722f93d09e27ab7c683cbc6524734eed956b832f49a"
PIECES_SHA256 = "e77db3ba061a4e601594b42a4c03d6362e22a91ea9967021d57fa3020f621588"
TEXTS = [
    "",
    " ",
    "The function is called with a list.",
    "  two  spaces, 3 tabs\t\t\tand\r\nlines\n\n",
    "don't we'll it's 12345 x_y <s> </s> <mask> <pad>",
    "Größe, naïve, Ελληνικά, 日本語, עברית, 🦊👩‍🚀, \x00\x7f\u200b\u2028",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def small():
    return tokenizers.load({"kind": "small", "path": ""})


def message(kind, path):
    with pytest.raises(UserError) as error:
        tokenizers.load({"kind": kind, "path": str(path)})
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


def plain_bpe(text, vocabulary, merges):
    """Byte-level BPE as GPT-2's encoder describes it: split, bytes as letters, merge by rank."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + k) for k, byte in enumerate(others)}
    pattern = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    ranks, ids = {pair: rank for rank, pair in enumerate(merges)}, []
    for word in re.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged, k = [], 0
            while k < len(parts):
                both = tuple(parts[k : k + 2]) == best
                merged.append(parts[k] + parts[k + 1] if both else parts[k])
                k += 2 if both else 1
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


def small_files():
    pieces = json.loads((SMALL / "vocab.json").read_text("utf-8"))
    lines = (SMALL / "merges.txt").read_text("utf-8").rstrip("\n").split("\n")[1:]
    return pieces, [tuple(line.split(" ")) for line in lines]


def test_small_has_the_special_ids_of_roberta(small):
    assert (small.bos, small.pad, small.eos, small.unk, small.mask) == (0, 1, 2, 3, 2047)
    assert small.special == (0, 1, 2, 3, 2047) and small.size == 2048
    assert sum(file.stat().st_size for file in SMALL.iterdir()) < 100_000


@pytest.mark.parametrize("text", TEXTS)
def test_small_is_lossless_and_never_special(small, text):
    ids = small.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert small.decode(ids) == text and not set(ids.tolist()) & set(small.special)


@pytest.mark.parametrize(
    "text", [text for text in TEXTS if "\x00" not in text] + ["Größe naïve 日本語 Ελληνικά"]
)
def test_small_equals_plain_python(small, text):
    assert small.encode(text).tolist() == plain_bpe(text, *small_files())


def test_every_character_can_be_encoded(small):
    for text in ("\ud800", "a\udfffb", "\ud83e\udd8a", "\udc80" * 3):
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert small.decode(small.encode(text)) == whole
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [int(p) for p in rng.integers(0, 0x110000, 40) if not 0xD800 <= p < 0xE000]
        text = "".join(map(chr, points))
        assert small.decode(small.encode(text)) == text


def test_decode_passes_over_what_is_no_text(small):
    ids = [0, *small.encode("some text"), 2, 1, 2047, 99999, -5]
    assert small.decode(ids) == small.decode(np.array(ids)) == "some text"


def test_encode_all_is_encode_of_each(small):
    for one, row in zip(TEXTS, small.encode_all(TEXTS), strict=True):
        np.testing.assert_array_equal(small.encode(one), row)
    assert small.encode_all([]) == []


def _in_worker(tokenizer):
    return tokenizer.encode("a worker").tolist(), tokenizer.decode(tokenizer.encode("a worker"))


def test_travels_to_a_spawned_process(small, pieces):
    unigram = tokenizers.load({"kind": "sentencepiece", "path": str(pieces / "unigram.model")})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for tokenizer in (small, unigram):
            tokenizer.encode("used before it is sent")
            ids, text = pool.apply(_in_worker, (tokenizer,))
            assert ids == tokenizer.encode("a worker").tolist() and text == "a worker"
            copy = pickle.loads(pickle.dumps(tokenizer))
            assert copy == tokenizer and hash(copy) == hash(tokenizer)


def test_kinds_and_paths():
    with pytest.raises(UserError, match="did you mean 'small'"):
        tokenizers.load({"kind": "smal"})
    with pytest.raises(UserError, match="tokenizer.kind"):
        tokenizers.load({})
    assert "use kind=bpe" in message("small", "somewhere")
    assert "use kind=xlmr" in message("small_xlmr", "somewhere")
    assert "is empty" in message("bpe", "")
    assert "is not a folder" in message("bpe", "/nowhere/at/all")


def test_numbers_alone():
    """A vocabulary that is not at hand: its size and special ids, and a cure for texts."""
    ids = tokenizers.load({"kind": "ids", "size": 41})
    assert (ids.size, ids.special) == (41, (0, 1, 2, 3, 40))
    for use in (lambda: ids.encode("a text"), lambda: ids.decode([7])):
        with pytest.raises(UserError, match="--config.tokenizer.kind=bpe"):
            use()
    for size in (None, 4, 2**40, "many", 8.5):
        with pytest.raises(UserError, match="tokenizer.size"):
            tokenizers.load({"kind": "ids", "size": size})


# Files of byte-level BPE


BYTES = sorted(
    chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n")]


def vocabulary_of(pieces):
    return {piece: number for number, piece in enumerate(pieces)}


def roberta_pieces():
    return [*SPECIAL[:4], *BYTES, *("".join(pair) for pair in MERGES), "madeupword0000", "<mask>"]


def write_merges(path, merges=MERGES, version="#version: 0.2\n"):
    path.write_text(version + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")


@pytest.fixture
def roberta(tmp_path):
    """A folder in Hugging Face's layout."""
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary_of(roberta_pieces())))
    write_merges(tmp_path / "merges.txt")
    return tmp_path


def load(folder):
    return tokenizers.load({"kind": "bpe", "path": str(folder)})


def test_hugging_face_layout(roberta):
    tokenizer = load(roberta)
    pieces = roberta_pieces()
    assert tokenizer.special == (0, 1, 2, 3, len(pieces) - 1) and tokenizer.size == len(pieces)
    text = "the then and <mask>"
    ids = tokenizer.encode(text)
    assert ids.tolist() == plain_bpe(text, vocabulary_of(pieces), MERGES)
    assert [pieces[i] for i in ids][:3] == ["the", "Ġthe", "n"] and tokenizer.decode(ids) == text


def test_hugging_face_file_says_the_same(roberta, tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    pieces = roberta_pieces()
    for merges in ([list(pair) for pair in MERGES], [" ".join(pair) for pair in MERGES]):
        tree = tokenizer_json(vocabulary_of(pieces[:-1]), merges)
        tree["added_tokens"] = [{"id": 1, "content": "<pad>"}, {"id": len(pieces) - 1}]
        tree["added_tokens"][1]["content"] = "<mask>"
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        assert load(folder) == load(roberta)
    tree["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert load(folder).encode("the").tolist() == load(roberta).encode(" the").tolist()


def test_special_tokens_that_are_missing_come_last(roberta):
    pieces = [*BYTES, *("".join(pair) for pair in MERGES), "<|endoftext|>"]
    (roberta / "vocab.json").write_text(json.dumps(vocabulary_of(pieces)))
    tokenizer, count = load(roberta), len(pieces)
    assert tokenizer.special == tuple(range(count, count + 5)) and tokenizer.size == count + 5
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


@pytest.fixture
def fairseq(tmp_path):
    """GPT-2's files with a dict.txt that has another order, one filler and no 'an'."""
    pieces = [*BYTES, *("".join(pair) for pair in MERGES)]
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary_of(pieces)))
    write_merges(tmp_path / "vocab.bpe")
    order = [k for k in np.random.default_rng(0).permutation(len(pieces)) if pieces[k] != "an"]
    lines = [f"{k} {1000 - row}" for row, k in enumerate(order)] + ["madeupword0000 0"]
    (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n")
    return tmp_path, [*SPECIAL[:4], *(pieces[k] for k in order), "madeupword0000", "<mask>"]


def test_fairseq_layout(fairseq):
    folder, pieces = fairseq
    tokenizer = load(folder)
    assert tokenizer.size == len(pieces) and tokenizer.special == (0, 1, 2, 3, len(pieces) - 1)
    ids = tokenizer.encode("the then and")
    assert [pieces[i] for i in ids] == ["the", "Ġthe", "n", "Ġ", "<unk>", "d"]
    assert tokenizer.decode(ids) == "the then d"


def tokenizer_json(pieces, merges):
    return {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": pieces, "merges": merges},
    }


@pytest.mark.parametrize(
    "change, words",
    [
        ({"normalizer": {"type": "NFKC"}}, "otherwise than GPT-2"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no byte-level BPE"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "otherwise than GPT-2"),
        ({"pre_tokenizer": None}, "no mapping 'pre_tokenizer'"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "no byte-level BPE"),
        ({"model": {"vocab": {"a": 0}, "merges": [], "dropout": 0.1}}, "model.dropout"),
        ({"model": {"vocab": {"a": 0}, "merges": 3}}, "no list"),
        ({"model": {"vocab": ["a"], "merges": []}}, "no mapping 'vocab'"),
        ({"added_tokens": [{"id": 3, "content": "!"}]}, "added token"),
        ({"added_tokens": [{"id": 10**12, "content": "new"}]}, "0, 1, 2"),
        ({"added_tokens": ["x"]}, "added token"),
    ],
)
def test_tokenizer_json_of_another_kind(tmp_path, change, words):
    tree = tokenizer_json(vocabulary_of([*BYTES, *map("".join, MERGES)]), list(map(list, MERGES)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree | change))
    assert words in message("bpe", tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("vocab.json", b"{", "damaged"),
        ("vocab.json", b"[" * 10**6, "damaged"),
        ("vocab.json", b"", "is empty"),
        ("vocab.json", b"\xff\xfe\x00", "damaged"),
        ("vocab.json", b'["a"]', "no mapping"),
        ("vocab.json", b"{}", "no mapping"),
        ("vocab.json", b'{"a": 0, "b": 0}', "each once"),
        ("vocab.json", b'{"a": 0, "b": 7}', "each once"),
        ("vocab.json", b'{"a": -1, "b": 0}', "each once"),
        ("vocab.json", b'{"a": "0"}', "each once"),
        ("vocab.json", b'{"a": 0, "b": true}', "each once"),
        ("vocab.json", b'{"\\ud800": 0}', "damaged"),
        ("merges.txt", b"t h\nth q e\n", "no merge of two"),
        ("merges.txt", b"t  h\n", "no merge of two"),
        ("merges.txt", b"q q\n", "not in the vocabulary"),
        ("merges.txt", b" the\n", "not in the vocabulary"),
    ],
)
def test_damaged_files(roberta, name, content, words):
    if b"ud800" in content:
        write_merges(roberta / "merges.txt", [])
    (roberta / name).write_bytes(content)
    assert words in message("bpe", roberta)


def test_text_cannot_spell_a_special_token(roberta):
    pieces = [*roberta_pieces(), "<m", "ask>"]
    (roberta / "vocab.json").write_text(json.dumps(vocabulary_of(pieces)))
    write_merges(roberta / "merges.txt", [("<m", "ask>")])
    assert "makes the special token <mask>" in message("bpe", roberta)


def test_bounds_and_missing_files(roberta, monkeypatch):
    monkeypatch.setattr(tokenizers, "MAX_BYTES", 10)
    assert "larger than 10" in message("bpe", roberta)
    (roberta / "merges.txt").unlink()
    assert "vocab.json + merges.txt" in message("bpe", roberta)
    (roberta / "merges.txt").mkdir()
    assert "has no tokenizer" in message("bpe", roberta)


def test_damaged_dictionary(fairseq):
    folder, _ = fairseq
    lines = (folder / "dict.txt").read_text()
    for line in ("madeupword0000 0", lines.split("\n")[0]):
        (folder / "dict.txt").write_text(lines + line + "\n")
        assert f"[{line.split()[0]!r}] twice" in message("bpe", folder)
    (folder / "dict.txt").unlink()
    assert "has no tokenizer" in message("bpe", folder)


# SentencePiece


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A unigram model as T5 has them (no bos), and a BPE model with all special pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    text = texts.pydoc_table({"split": "test"}).rows(("text",))[0]["text"]
    for name, settings in (
        ("unigram", {"vocab_size": 100, "bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2}),
        ("bpe", {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "pad_id": 3}),
    ):
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.split("\n")), model_writer=file, minloglevel=2, **settings
        )
        (folder / f"{name}.model").write_bytes(file.getvalue())
    return folder


def test_sentencepiece_ids(pieces):
    unigram = tokenizers.load({"kind": "sentencepiece", "path": str(pieces / "unigram.model")})
    assert (unigram.pad, unigram.eos, unigram.unk) == (0, 1, 2)
    assert (unigram.bos, unigram.mask, unigram.size) == (100, 101, 102)
    bpe = tokenizers.load({"kind": "sentencepiece", "path": str(pieces / "bpe.model")})
    assert bpe.special == (1, 3, 2, 0, 400) and bpe.size == 401
    for tokenizer, name in ((unigram, "unigram"), (bpe, "bpe")):
        model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / f"{name}.model"))
        for text in ("the lost and the nine", "", "<s></s><mask> Ωx", "many words " * 500):
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and ids.tolist() == model.encode(text)
        many = tokenizer.encode_all(["the lost", ""] * 50)
        assert [row.tolist() for row in many[:2]] == [model.encode("the lost"), []]
        with_special = [tokenizer.bos, *tokenizer.encode("the nine"), *tokenizer.special, 999]
        assert tokenizer.decode(with_special) == "the nine"
        tokenizer.decode(tokenizer.encode("a\ud800b"))
    assert bpe.decode(bpe.encode("Größe 🦊")) == "Größe 🦊"


def test_sentencepiece_paths(pieces, tmp_path):
    assert "holds 2 .model files" in message("sentencepiece", pieces)
    assert "holds 0 .model files" in message("sentencepiece", tmp_path)
    shutil.copy(pieces / "bpe.model", tmp_path)
    assert tokenizers.load({"kind": "sentencepiece", "path": str(tmp_path)}).size == 401
    assert "cannot read" in message("sentencepiece", tmp_path / "none.model")
    data = (pieces / "bpe.model").read_bytes()
    for content in (b"", b"no model", data[: len(data) // 3]):
        (tmp_path / "bad.model").write_bytes(content)
        assert "bad.model" in message("sentencepiece", tmp_path / "bad.model")


# SentencePiece with the ids of XLM-R


@pytest.fixture(scope="module")
def xlmr_file(tmp_path_factory):
    """A unigram model whose first pieces are <unk>, <s> and </s>, as beit3.spm's are."""
    text = texts.pydoc_table({"split": "test"}).rows(("text",))[0]["text"]
    file, path = io.BytesIO(), tmp_path_factory.mktemp("xlmr") / "sentencepiece.bpe.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_writer=file, minloglevel=2, vocab_size=300
    )
    path.write_bytes(file.getvalue())
    return path


def test_xlmr_ids(xlmr_file):
    tokenizer = tokenizers.load({"kind": "xlmr", "path": str(xlmr_file)})
    assert tokenizer.special == (0, 1, 2, 3, 301) and tokenizer.size == 302
    model = sentencepiece.SentencePieceProcessor(model_file=str(xlmr_file))
    # The rule by names: four of fairseq's own, then the pieces in their order, then <mask>.
    names = [*SPECIAL[:4], *(model.id_to_piece(k) for k in range(3, 300)), "<mask>"]
    for text in ("the lost and the nine", "", "Ωx, <mask> </s>", "many words " * 300):
        ids = tokenizer.encode(text)
        found = [names[i] for i in ids]
        split = model.encode(text, out_type=str)
        assert [p if p in names[4:-1] else "<unk>" for p in split] == found
        assert ids.dtype == np.int32 and not set(ids.tolist()) & {0, 1, 2, 301}
    assert 3 in tokenizer.encode("Ω")
    ids = [0, *tokenizer.encode("the nine"), 2, 1, 3, 301, 302, -1]
    assert tokenizer.decode(ids) == "the nine"
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer and copy.encode("nine").tolist() == tokenizer.encode("nine").tolist()


def test_xlmr_needs_its_first_pieces(pieces):
    assert "use kind=sentencepiece" in message("xlmr", pieces / "unigram.model")
    assert "cannot read" in message("xlmr", pieces / "none.model")
    assert "is empty" in message("xlmr", "")


@pytest.mark.live
def test_xlmr_equals_transformers(xlmr_file):
    from transformers import XLMRobertaTokenizer

    for name, value in (("tokenizer_config", "XLMRobertaTokenizer"), ("config", "xlm-roberta")):
        key = "tokenizer_class" if name == "tokenizer_config" else "model_type"
        (xlmr_file.parent / f"{name}.json").write_text(json.dumps({key: value}))
    theirs = XLMRobertaTokenizer.from_pretrained(xlmr_file.parent, local_files_only=True)
    ours = tokenizers.load({"kind": "xlmr", "path": str(xlmr_file)})
    assert len(theirs) == ours.size and theirs.mask_token_id == ours.mask
    special = (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id)
    assert special == ours.special[:4]
    for text in ("the lost and the nine", "Ωx many  words", "Größe, naïve: 日本語", "ﬁne Ａ", ""):
        assert theirs(text)["input_ids"] == [0, *ours.encode(text).tolist(), 2]


def test_small_xlmr():
    tokenizer = tokenizers.load({"kind": "small_xlmr"})
    assert tokenizer.special == (0, 1, 2, 3, 8191) and tokenizer.size == 8192
    for text in TEXTS + ["\ud800", "Größe naïve 日本語 Ελληνικά"]:
        ids = tokenizer.encode(text)
        assert not set(ids.tolist()) & set(tokenizer.special)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # As any SentencePiece model it takes many spaces for one, but loses no character.
        assert tokenizer.decode(ids) == re.sub(" +", " ", whole).strip(" ")
    names = (*scene_things.COLOURS, *scene_things.SHAPES, *scene_words.ANSWERS)
    assert all(len(tokenizer.encode(word)) == 1 for word in names)


def test_the_packaged_pieces_are_the_recorded_ones():
    assert digest(PIECES.read_bytes()) == PIECES_SHA256
    assert PIECES.stat().st_size < 150_000
    notice = (PIECES.parent / "NOTICE").read_text()
    for words in ("CPython 3.11.7", "Python Software Foundation", "Cal Henderson", "Mu-An Chiou"):
        assert words in notice


def test_the_packaged_pieces_can_be_made_again(tmp_path, capsys):
    entry.run(["pieces", "--source=packaged", f"--out={tmp_path}"])
    made = pathlib.Path(capsys.readouterr().out.strip())
    assert tokenizers.load({"kind": "xlmr", "path": str(made)}).size == 8192
    found = digest("\0".join(sorted(pieces_of.read_texts("packaged"))).encode())
    if found == PIECES_TEXTS_SHA256:  # other words in scenes, or another Python, give others
        assert digest(made.read_bytes()) == PIECES_SHA256
    with pytest.raises(UserError, match="exists already"):
        pieces_of.prepare("packaged", tmp_path)


def test_pieces_from_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("too little")
    with pytest.raises(UserError, match="add texts"):
        pieces_of.prepare(str(tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match="write packaged"):
        pieces_of.prepare(str(tmp_path / "none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The script that made the packaged vocabulary


def digest(data):
    return hashlib.sha256(data).hexdigest()


def test_the_packaged_vocabulary_is_the_recorded_one():
    files = [(SMALL / name).read_bytes() for name in ("vocab.json", "merges.txt")]
    assert digest(b"".join(files)) == VOCABULARY_SHA256
    notice = (SMALL.parent / "NOTICE").read_text()
    assert "CPython 3.11.7" in notice and "Python Software Foundation" in notice


def test_the_packaged_vocabulary_can_be_made_again(tmp_path):
    texts = vocabulary.read_texts("packaged")
    made = vocabulary.prepare("packaged", tmp_path)
    tokenizer = tokenizers.load({"kind": "bpe", "path": str(made)})
    assert tokenizer.special == (0, 1, 2, 3, 2047)
    if digest("\0".join(sorted(texts)).encode()) == TEXTS_SHA256:  # those of Python 3.11.7
        for file in SMALL.iterdir():
            assert (made / file.name).read_bytes() == file.read_bytes()
    else:
        assert platform.python_version() != "3.11.7"


def test_prepare_from_a_folder(tmp_path, capsys):
    text = " ".join(f"word{k * 7919 % 100003:x}" for k in range(4000))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    arguments = ["vocabulary", f"--source={tmp_path / 'texts'}", f"--out={tmp_path}"]
    entry.run(arguments)
    assert capsys.readouterr().out.strip() == str(tmp_path / "small")
    assert load(tmp_path / "small").size == 2048
    with pytest.raises(UserError, match="exists already"):
        entry.run(arguments)
    (tmp_path / "texts" / "a.txt").write_text("too little")
    with pytest.raises(UserError, match="add texts"):
        vocabulary.prepare(str(tmp_path / "texts"), tmp_path / "other")
    with pytest.raises(UserError, match="write packaged"):
        vocabulary.prepare(str(tmp_path / "none"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
