"""Text tables: where records begin and end, what columns hold, and files that are damaged."""

import json
import pickle
import platform
from pydoc_data.topics import topics

import numpy as np
import pytest

from bivl.core.errors import Undecodable, UserError
from bivl.data import text_files, texts


def rows(table, *wanted):
    opened = pickle.loads(pickle.dumps(table.rows(wanted or tuple(table.columns))))
    return [opened[i] for i in range(len(opened))]


def message(make, **config):
    with pytest.raises(UserError) as error:
        make(config)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


def contents(table):
    return {name: column.content for name, column in table.columns.items()}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return path


def test_pydoc_holds_every_topic_once():
    train, test = (rows(texts.pydoc_table({"split": split})) for split in ("train", "test"))
    found = {row["topic"]: row["text"] for row in train + test}
    assert found == dict(topics) and len(found) == len(train) + len(test)
    assert 4 <= len(test) <= 16 and len(train) > 50
    table = texts.pydoc_table({})
    assert platform.python_version() in table.title and contents(table)["text"] == "text"
    assert len(rows(texts.pydoc_table({"split": "train[:10]"}))) == 10
    assert "did you mean 'test'" in message(texts.pydoc_table, split="tests")


# Plain text


def test_documents_of_one_file(tmp_path):
    path = write(
        tmp_path / "all.txt",
        *["", "one a", " one b", "", " \t\r", "two\r", "\x00", "three", "größe \udcff", ""],
    )
    found = [row["text"] for row in rows(texts.text_table({"dir": str(path)}))]
    assert found == ["one a\n one b", "two\r", "three\ngröße ���"]
    path.write_bytes(b"\xef\xbb\xbfmarked\n\nlast")
    assert [row["text"] for row in rows(texts.text_table({"dir": path}))] == ["marked", "last"]
    opened = texts.text_table({"dir": path}).rows(("text",))
    assert opened.where(1) == f"{path}, byte 11"


def plain_documents(data):
    """Runs of lines with a byte above the space."""
    documents, lines = [], []
    for line in [*data.split(b"\n"), b""]:
        if any(byte > 32 for byte in line):
            lines.append(line)
        elif lines:
            documents.append(b"\n".join(lines))
            lines = []
    return documents


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_index_does_not_depend_on_the_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    rng, path = np.random.default_rng(chunk), tmp_path / "a.txt"
    for _ in range(60):
        data = bytes(rng.choice(list(b"ab\n\n \r"), rng.integers(1, 40)).tolist())
        path.write_bytes(data)
        spans = text_files.documents([str(path)], False)
        assert [spans.read(i) for i in range(len(spans))] == plain_documents(data)
        _, start, stop = text_files.lines(str(path))
        kept = [line for line in data.split(b"\n") if line.strip()]
        assert [data[a:b] for a, b in zip(start, stop, strict=True)] == kept


def test_layouts_of_folders(tmp_path):
    def found(split):
        table = texts.text_table({"dir": str(tmp_path), "split": split})
        return [row["text"] for row in rows(table)]

    write(tmp_path / "b.txt", "b1", "", "b2")
    assert found("train") == ["b1", "b2"]  # a single file holds many documents
    write(tmp_path / "a.txt", "a1", "", "a2")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / "notes.md", "no")
    write(tmp_path / "empty.txt", " ")
    assert found("train") == ["a1\n\na2", "b1\n\nb2"]  # several are one each
    write(tmp_path / "dev.txt", "d1", "", "d2")
    assert found("dev") == ["d1", "d2"]
    assert "'train'" in message(texts.text_table, dir=str(tmp_path))  # dev is not trained on
    write(tmp_path / "train" / "y.txt", "y", "", "z")
    write(tmp_path / "train" / "x.txt", "x")
    write(tmp_path / "test-00001-of-00002.txt", "t2", "", "t3")
    write(tmp_path / "test-00000-of-00002.txt", "t1")
    assert found("train") == ["x", "y\n\nz"] and found("test") == ["t1", "t2", "t3"]
    assert found("train[1:]+test[:67%]+dev[-1:]") == ["y\n\nz", "t1", "t2", "d2"]


def test_links_stay_inside(tmp_path):
    outside = write(tmp_path / "outside" / "secret.txt", "secret")
    inside = write(tmp_path / "in" / "a.txt", "a")
    (tmp_path / "in" / "b.txt").symlink_to(outside)
    (tmp_path / "in" / "dev").symlink_to(outside.parent)
    (tmp_path / "in" / "c.txt").symlink_to(inside)
    assert [row["text"] for row in rows(texts.text_table({"dir": tmp_path / "in"}))] == ["a", "a"]


def test_bad_places(tmp_path):
    for make, suffix in (
        (texts.text_table, "txt"),
        (texts.jsonl_table, "jsonl"),
        (texts.tsv_table, "tsv"),
    ):
        assert "data.dir is empty" in message(make)
        assert "neither" in message(make, dir=str(tmp_path / "none"))
        assert f"holds no *.{suffix}" in message(make, dir=str(tmp_path))
        empty = write(tmp_path / f"empty.{suffix}", "")
        assert "is empty" in message(make, dir=str(empty)) or suffix == "tsv"
        assert "split" in message(make, dir=str(empty), split="../empty")
    assert "does not name the columns" in message(texts.tsv_table, dir=str(tmp_path / "empty.tsv"))


def test_files_that_change(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "first", "", "second document")
    opened = texts.text_table({"dir": path}).rows(("text",))
    path.write_text("first\n\nsec")
    assert opened[0]["text"] == "first"
    with pytest.raises(Undecodable, match="shorter"):
        opened[1]
    path.unlink()
    with pytest.raises(Undecodable, match="FileNotFoundError"):
        opened[0]
    monkeypatch.setattr(text_files, "MAX_BYTES", 4)
    with pytest.raises(Undecodable, match="longer than 4"):
        opened[0]


# JSON lines


def jsonl(path, *records):
    return write(path, *(r if isinstance(r, str) else json.dumps(r) for r in records))


def test_jsonl_columns(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "größe\u2028\ud800", "count": 1, "score": 1, "flag": True, "tags": ["a"], "o": {}},
        "",
        {"text": "b", "count": -3, "score": 0.5, "flag": False, "tags": None, "late": "x"},
        {"text": None, "count": 2.0, "score": 2, "mixed": 1},
        {"mixed": "a", "nothing": None},
    )
    table = texts.jsonl_table({"dir": str(path)})
    assert contents(table) == {
        **{"text": "text", "score": "number", "count": "number", "flag": "integer"},
        **{"tags": "list", "o": "dict", "late": "text", "mixed": "integer/text", "nothing": "text"},
    }
    found = rows(table, "text", "late")
    assert [row["text"] for row in found] == ["größe\u2028\ud800", "b", "", ""]
    assert found[1]["late"] == "x" and found[0]["late"] == ""
    opened = table.rows(("score", "flag"))
    assert opened[0] == {"score": 1.0, "flag": 1} and type(opened[0]["score"]) is float
    assert opened[1] == {"score": 0.5, "flag": 0} and type(opened[1]["flag"]) is int
    with pytest.raises(Undecodable, match="score holds 'None', no number"):
        opened[3]
    with pytest.raises(Undecodable, match="flag holds 'None', no whole number"):
        opened[2]


def test_jsonl_lines_that_do_not_fit(tmp_path):
    good = [{"text": "a", "label": 1}] * texts._LOOKED_AT
    bad = ["{", "3", "[" * 100_000, '{"text": "x", "label": 1.5}', '{"text": [1], "label": 1}']
    bad += ['{"text": "x", "label": 1e400}', '{"text": "x", "label": NaN}', '{"text": "\\ud8"}']
    bad += ['{"text": "x", "label": 99999999999999999999999}', '{"label": "1x", "text": ""}']
    path = jsonl(tmp_path / "a.jsonl", *bad[:3], *good, *bad)
    opened = texts.jsonl_table({"dir": path}).rows(("text", "label"))
    assert len(opened) == len(good) + len(bad) + 3 and opened[3] == good[0]
    for index in [0, 1, 2, *range(3 + len(good), len(opened))]:
        with pytest.raises(Undecodable) as error:
            opened[index]
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    write(tmp_path / "a.jsonl", "no json", "none here")
    assert "no line can be read as jsonl" in message(texts.jsonl_table, dir=str(path))


def test_labels_of_strings_agree_between_splits(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"text": "1", "label": "yes"}, {"text": "2", "label": "no"})
    jsonl(tmp_path / "dev.jsonl", {"text": "3", "label": "yes"}, {"text": "4", "label": "maybe"})
    jsonl(tmp_path / "test.jsonl", {"text": "5"}, "broken")
    table = texts.jsonl_table({"dir": tmp_path, "split": "dev"})
    assert table.columns["label"].names == ("maybe", "no", "yes")
    assert [row["label"] for row in rows(table, "label")] == [2, 0]
    assert contents(texts.jsonl_table({"dir": tmp_path, "split": "test"})) == {"text": "text"}
    by_text = texts.jsonl_table({"dir": tmp_path, "fields": {"label": "text"}})
    assert by_text.columns["text"].names == ("1", "2", "3", "4", "5")
    assert contents(by_text)["label"] == "text"


def test_labels_are_not_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_CLASSES", 3)
    path = jsonl(tmp_path / "a.jsonl", *({"text": str(k)} for k in range(5)))
    assert contents(texts.jsonl_table({"dir": path})) == {"text": "text"}
    wrong = message(texts.jsonl_table, dir=str(path), fields={"label": "text"})
    assert "more than 3 different values" in wrong and "data.fields.label" in wrong


# Tab-separated values


@pytest.fixture
def glue(tmp_path):
    """A task of two sentences as GLUE has it: names of classes, quotes, a broken line, \\r."""
    write(
        tmp_path / "train.tsv",
        "index\tsentence1\tsentence2\tlabel\tscore\tgrade\r",
        "0\ta \"quoted\t'b\tentailment\t1\t5.000\r",
        "1\tc\td\tnot_entailment\t2\t4.750",
        "2\tone cell is missing\t3",
        "",
        "3\te  f\t\tentailment\t3\t.5",
    )
    write(tmp_path / "dev.tsv", "sentence2\tlabel\tsentence1", "7\tneutral\tx", "8\tneutral\ty")
    return tmp_path


def test_tsv_columns(glue):
    table = texts.tsv_table({"dir": glue})
    assert contents(table) == {
        **{"index": "integer", "sentence1": "text", "sentence2": "text"},
        **{"label": "label", "score": "integer", "grade": "number"},
    }
    assert table.columns["label"].names == ("entailment", "neutral", "not_entailment")
    opened = table.rows(tuple(table.columns))
    assert list(opened[0].values()) == [0, 'a "quoted', "'b", 0, 1, 5.0]
    assert list(opened[3].values()) == [3, "e  f", "", 0, 3, 0.5]
    with pytest.raises(Undecodable, match="3 cells for 6 columns"):
        opened[2]
    mixed = texts.tsv_table({"dir": glue, "split": "train[:1]+dev[1:]"})
    assert rows(mixed, "sentence1", "label") == [
        {"sentence1": 'a "quoted', "label": 0},
        {"sentence1": "y", "label": 1},
    ]


def test_tsv_without_names_of_columns(tmp_path):
    path = write(tmp_path / "train.tsv", "gj04\t1\t\tOur friends.", "gj04\t0\t*\tThey.")
    assert "does not name the columns" in message(texts.tsv_table, dir=str(tmp_path))
    write(path, "a\ta", "1\t2")
    assert "does not name the columns" in message(texts.tsv_table, dir=str(tmp_path))
    write(path, "a\tb")
    assert "is empty" in message(texts.tsv_table, dir=str(tmp_path))
