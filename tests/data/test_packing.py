"""Blocks of tokens: the rule written out in plain Python, the cache on disk, and its damage."""

import dataclasses
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
from absl import logging

from bivl.core.errors import Undecodable, UserError
from bivl.data import packing, token_files, tokenizers


@dataclasses.dataclass(frozen=True)
class Texts:
    """A source of texts in memory; None stands for a record that cannot be read."""

    texts: tuple
    title: str = "texts"
    split: str = "train"

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        if self.texts[index] is None:
            raise Undecodable("broken")
        return {"text": self.texts[index], "id": index}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load({"kind": "small"})


def document(rng, lines):
    """Lines of 0 to 39 tokens, the letters a to z, some of them blank."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return "\n".join(" ".join(rng.choice(letters, rng.integers(0, 40))) for _ in range(lines))


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    texts = [document(rng, lines) for lines in (3, 1, 12, 2, 30, 5, 1, 1)]
    return Texts((*texts[:4], "", None, " \n\t\n", *texts[4:], "q" * 900, "one\r\n\x0btwo\u2028x"))


def sentences_of(source, tokenizer):
    """One list of sentences (lists of ids) for each document with any."""
    for text in source.texts:
        lines = [line.strip() for line in (text or "").split("\n")]
        found = [tokenizer.encode(line).tolist() + [2] for line in lines if line]
        if found:
            yield found


def plain_complete_doc(documents, block):
    """fairseq's rule, sentence by sentence; an overlong one is a row of shorter ones."""
    blocks = []
    for sentences in documents:
        current = []
        for sentence in sentences:
            if current and len(current) + len(sentence) > block:
                blocks.append(current)
                current = []
            while len(current) + len(sentence) > block:
                blocks.append(sentence[:block])
                sentence = sentence[block:]
            current = current + sentence
        blocks.append(current)
    return [block for block in blocks if len(block) > 1]


def plain_none(documents, block):
    stream = [token for sentences in documents for sentence in sentences for token in sentence]
    return [stream[start : start + block] for start in range(0, len(stream), block)]


def records(blocks):
    return [blocks[i]["tokens"].tolist() for i in range(len(blocks))]


@pytest.mark.parametrize("length", [2, 3, 17, 48, 128, 5000])
@pytest.mark.parametrize("mode, rule", [("complete_doc", plain_complete_doc), ("none", plain_none)])
def test_blocks_equal_the_rule(source, tokenizer, tmp_path, mode, rule, length):
    expected = [[0, *block] for block in rule(list(sentences_of(source, tokenizer)), length - 1)]
    if not expected:
        assert (length, mode) == (2, "complete_doc")
        with pytest.raises(UserError, match="longer blocks"):
            packing.pack(source, tokenizer, length, mode)
        return
    for cache in (None, tmp_path):
        blocks = packing.pack(source, tokenizer, length, mode, cache)
        assert records(blocks) == expected
        assert all(1 < len(tokens) <= length for tokens in expected)
        assert blocks[0]["tokens"].dtype == np.int32 and blocks[0]["id"] == 0


def test_batches_of_lines_do_not_show(source, tokenizer, monkeypatch):
    whole = records(packing.pack(source, tokenizer, 32, "complete_doc"))
    monkeypatch.setattr(token_files, "_LINES", 1)
    assert records(packing.pack(source, tokenizer, 32, "complete_doc")) == whole
    monkeypatch.setattr(token_files, "_LINES", 4)
    monkeypatch.setattr(token_files, "_CHARACTERS", 100)
    assert records(packing.pack(source, tokenizer, 32, "complete_doc")) == whole


def test_lines_that_give_no_token_are_left_out(tokenizer, monkeypatch):
    encode = tokenizers.Tokenizer.encode_all
    empty = np.zeros(0, np.int32)
    monkeypatch.setattr(
        tokenizers.Tokenizer,
        "encode_all",
        lambda self, lines: [empty if "z" in line else encode(self, [line])[0] for line in lines],
    )
    source = Texts(("a\nz\nb", "z\nz", "c"))
    text = token_files.tokenized(source, tokenizer)
    assert text.sentences.tolist() == [2, 4, 6] and text.documents.tolist() == [2, 3]
    with pytest.raises(UserError, match="has no text"):
        packing.pack(Texts(("z",)), tokenizer, 8, "none")


def test_stands_in_for_a_source(source, tokenizer):
    blocks = packing.pack(source, tokenizer, 64, "none")
    assert (blocks.title, blocks.split, blocks.classes) == ("texts", "train", None)
    assert [field[0] for field in blocks.fields] == ["tokens"]
    assert f"{len(blocks)} blocks" in blocks.describe() and "block 3 of texts" in blocks.where(3)
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[index]


def test_one_line_in_the_log(source, tokenizer, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *parts: lines.append(text % parts))
    monkeypatch.setattr(logging, "warning", lambda text, *parts: lines.append(text % parts))
    blocks = packing.pack(source, tokenizer, 64, "none")
    documents = len(list(sentences_of(source, tokenizer)))
    assert lines[0].startswith("left out 1 of 13 records") and len(lines) == 2
    wanted = f"{documents} documents, {len(blocks.tokens)} tokens, {len(blocks)} blocks"
    assert wanted in lines[1]


def test_wrong_arguments(source, tokenizer):
    for arguments, words in (
        ((source, tokenizer, 8, "nune"), "did you mean 'none'"),
        ((source, tokenizer, 1, "none"), "too short"),
        ((Texts(()), tokenizer, 8, "none"), "has no text"),
        ((Texts((None, " ")), tokenizer, 8, "complete_doc"), "has no text"),
        (([{"label": 1}], tokenizer, 8, "none"), "data.fields.text"),
    ):
        with pytest.raises(UserError, match=words) as error:
            packing.pack(*arguments)
        assert "\n" not in str(error.value)


def _in_worker(blocks, index):
    return type(blocks.tokens).__name__, blocks[index]["tokens"].tolist()


def test_pickles_as_arrays_or_as_paths(source, tokenizer, tmp_path):
    memory = packing.pack(source, tokenizer, 64, "none")
    mapped = packing.pack(source, tokenizer, 64, "none", tmp_path)
    assert len(pickle.dumps(mapped)) < 1000 < len(pickle.dumps(memory))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for blocks, kind in ((memory, "ndarray"), (mapped, "memmap")):
            assert pool.apply(_in_worker, (blocks, 2)) == (kind, blocks[2]["tokens"].tolist())


def test_the_cache_is_written_once(source, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    first = packing.pack(source, tokenizer, 64, "none", cache)
    (folder,) = cache.iterdir()
    names = ["documents.npy", "none-64.npy", "sentences.npy", "tokens.npy"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert isinstance(first.tokens, np.memmap) and first.tokens.dtype == np.uint16
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.Tokenizer, "encode_all", None)
        assert records(packing.pack(source, tokenizer, 64, "none", cache)) == records(first)
        packing.pack(source, tokenizer, 32, "complete_doc", cache)
    assert times.items() <= {file: file.stat().st_mtime_ns for file in folder.iterdir()}.items()
    # Another split, source or tokenizer has a folder of its own.
    for changes in ({"split": "test"}, {"title": "other"}, {"texts": source.texts[:5]}):
        packing.pack(dataclasses.replace(source, **changes), tokenizer, 64, "none", cache)
    packing.pack(source, dataclasses.replace(tokenizer, eos=5), 64, "none", cache)
    assert len(list(cache.iterdir())) == 5


def test_large_vocabularies(source, tokenizer, tmp_path):
    large = dataclasses.replace(tokenizer, size=2**16 + 1, eos=2**16)
    for cache in (None, tmp_path):
        blocks = packing.pack(source, large, 64, "none", cache)
        assert blocks.tokens.dtype == np.uint32 and blocks.tokens.max() == 2**16


def test_several_writers_leave_one_whole_result(source, tokenizer, tmp_path):
    results = []

    def work():
        results.append(records(packing.pack(source, tokenizer, 64, "complete_doc", tmp_path)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [records(packing.pack(source, tokenizer, 64, "complete_doc"))] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_write_leaves_nothing(source, tokenizer, tmp_path, monkeypatch):
    def interrupt(self, lines):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.Tokenizer, "encode_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            packing.pack(source, tokenizer, 64, "none", tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        packing.pack(source, tokenizer, 64, "none", tmp_path / "file" / "cache")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def _pickled(path):
    np.save(path, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize("name", ["tokens", "sentences", "documents", "none-64"])
@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _pickled,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no array"),
        lambda path: np.save(path, np.zeros((3, 3))),
        lambda path: np.save(path, np.zeros(4, np.int64)),
        lambda path: np.save(path, np.array([[0, 10**9], [5, -5]])),
    ],
)
def test_damaged_caches(source, tokenizer, tmp_path, name, damage):
    packing.pack(source, tokenizer, 64, "none", tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder / f"{name}.npy")
    with pytest.raises(UserError, match="remove the folder") as error:
        packing.pack(source, tokenizer, 64, "none", tmp_path)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_cache_without_a_file(source, tokenizer, tmp_path):
    packing.pack(source, tokenizer, 64, "none", tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "sentences.npy").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        packing.pack(source, tokenizer, 64, "none", tmp_path)
