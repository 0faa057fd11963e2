import importlib.util
import json
import pickle

import pytest

from bivl.core.errors import Undecodable, UserError
from bivl.data import easy_vqa
from bivl.data.images import decode_image
from bivl.data.sources import open_source

FIELDS = {"id": "id"}
QUESTIONS = {
    "train": [["what shape is it?", "circle", 7], ["is it red?", "no", 7], ["is it?", "yes", 0]],
    "test": [["is it blue?", "no", 0]],
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that layout with four questions, put in the place of the real one."""
    data = tmp_path / "easy_vqa" / "data"
    for split, questions in QUESTIONS.items():
        (data / split / "images").mkdir(parents=True)
        (data / split / "questions.json").write_text(json.dumps(questions))
        for _, _, number in questions:
            (data / split / "images" / f"{number}.png").write_bytes(f"{split} {number}".encode())
    (data / "answers.txt").write_text("circle\nyes\nno\n")
    (data.parent / "__init__.py").write_text("raise RuntimeError('it is never run')\n")
    place = str(data.parent / "__init__.py")
    spec = importlib.util.spec_from_file_location(
        "easy_vqa", place, submodule_search_locations=[str(data.parent)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return data


def message(**config):
    with pytest.raises(UserError) as error:
        open_source({"kind": "easy_vqa", **config})
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


def test_records(package):
    source = open_source({"kind": "easy_vqa", "split": "train+test", "fields": FIELDS})
    assert len(source) == 4 and source.classes == ("circle", "yes", "no")
    expected = {"image": b"train 7", "question": "is it red?", "answer": "no", "label": 2, "id": 7}
    assert source[1] == expected
    assert pickle.loads(pickle.dumps(source))[3]["image"] == b"test 0"
    assert len(open_source({"kind": "easy_vqa", "split": "train[1:]"})) == 2
    assert open_source({"kind": "easy_vqa"})[2]["id"] == 2  # the running number, unless named
    assert source.where(1).endswith("7.png, 'is it red?'")


def test_damage(package):
    source = open_source({"kind": "easy_vqa"})
    (package / "train" / "images" / "7.png").unlink()
    with pytest.raises(Undecodable, match="No such file"):
        source[0]
    questions = package / "train" / "questions.json"
    for content in ("{", "[" * 10**5, '[["a", "yes"]]', '[["a", "yes", "../x"]]', '[["a", 1, 1]]'):
        questions.write_text(content)
        assert "questions.json is damaged" in message()
    for content in ('[["a", "yes", -1]]', '[["a", "yes", true]]', '{"a": 1}', "7"):
        questions.write_text(content)
        assert "questions.json is damaged" in message()
    questions.write_text('[["a", "purple", 1]]')
    assert "lacks ['purple']" in message()
    questions.unlink()
    assert "cannot read" in message()


def test_bounds_and_splits(package, monkeypatch):
    assert "data.split" in message(split="dev")
    monkeypatch.setattr(easy_vqa, "MAX_BYTES", 10)
    assert "larger than 10" in message()


def test_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps easy-vqa" in message()


def test_the_published_set():
    if not importlib.util.find_spec("easy_vqa"):
        pytest.skip("easy-vqa is not installed")
    train, test = (open_source({"kind": "easy_vqa", "split": s}) for s in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (38_575, 9_673, 13)
    assert decode_image(train[0]["image"]).shape == (64, 64, 3)
    for source, count in ((train, 28_407), (test, 7_136)):
        answers = [source.classes[row[2]] for row in source.rows.rows]
        assert sum(answer in ("yes", "no") for answer in answers) == count
