"""The packaged emoji set is whole and fixed, its splits share no concept, and it can be rebuilt."""

import hashlib
import io
import json
import pathlib
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

import bivl.data.emoji
from bivl import prepare as entry
from bivl.core.errors import UserError
from bivl.data import sources
from bivl.data.emoji import prepare as emoji

PACKAGED = pathlib.Path(bivl.data.emoji.__file__).parent / "emoji" / "1.0.0"
TEST_NAMES_SHA256 = "e684d83de6fc0d0536c0e30f56b17df8bcbff00748c7a7ca3914df2c92c14d8a"


def read(directory):
    builder = tfds.builder_from_directory(str(directory))
    skip = {"image": tfds.decode.SkipDecoding()}
    return builder.info, {
        split: list(builder.as_data_source(split=split, decoders=skip))
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def packaged():
    return read(PACKAGED)


def pixels(records):
    images = [Image.open(io.BytesIO(record["image"])) for record in records]
    assert {image.format for image in images} == {"WEBP"}
    assert {image.mode for image in images} == {"RGB"}
    return np.stack([np.asarray(image) for image in images])


def test_counts_and_categories(packaged):
    info, splits = packaged
    assert {name: len(records) for name, records in splits.items()} == {"train": 1507, "test": 399}
    assert info.features["category"].num_classes == 9
    assert "Component" not in info.features["category"].names
    assert info.features["subcategory"].num_classes == 98
    for key in ("category", "subcategory"):
        labels = {split: {record[key] for record in splits[split]} for split in splits}
        assert labels["train"] | labels["test"] == set(range(info.features[key].num_classes))
    train = {record["category"] for record in splits["train"]}
    assert {record["category"] for record in splits["test"]} == train == set(range(9))


def test_the_split_is_the_recorded_one(packaged):
    names = sorted(record["text"].decode() for record in packaged[1]["test"])
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == TEST_NAMES_SHA256


def test_no_concept_in_both_splits(packaged):
    info, splits = packaged
    concepts = {split: {record["concept"] for record in splits[split]} for split in splits}
    assert not concepts["train"] & concepts["test"]
    # The same told from the names alone, for the people, without the code points of the set.
    people = info.features["category"].str2int("People & Body")
    person = re.compile(r"\b(wo)?(man|men)\b|\bpe(rson|ople)\b|\bfacing right\b")
    bare = {
        split: {
            " ".join(person.sub(" ", record["text"].decode()).split())
            for record in records
            if record["category"] == people
        }
        for split, records in splits.items()
    }
    assert len(bare["test"]) > 30
    assert not bare["train"] & bare["test"]


def test_images_decode_and_no_drawing_is_in_both_splits(packaged):
    small = {}
    for split, records in packaged[1].items():
        images = pixels(records)
        assert images.shape == (len(records), 64, 64, 3)
        assert images.reshape(len(records), -1).std(1).min() > 3  # none is blank
        small[split] = images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4))
    test = small["test"].reshape(399, -1)
    for train in (small["train"], small["train"][:, :, ::-1]):
        train = train.reshape(1507, -1)
        square = (test**2).sum(1)[:, None] + (train**2).sum(1) - 2 * test @ train.T
        assert np.sqrt(square.min() / train.shape[1]) > 7


def test_texts(packaged):
    records = packaged[1]["train"] + packaged[1]["test"]
    names = [record["text"].decode() for record in records]
    assert "grinning face" in names
    assert all(name and name == name.lower() for name in names)
    assert len(set(names)) == 1905  # two emoji are called "man in tuxedo"
    keywords = dict(zip(names, (record["keywords"].decode() for record in records), strict=True))
    assert keywords["grinning face"].split(", ")[:3] == ["grinning face", "face", "smile"]
    assert sum(not words for words in keywords.values()) == 0


def test_words_are_the_keywords_without_commas():
    options = {"kind": "emoji", "split": "test"}
    rows = [
        sources.open_source({**options, "fields": {"text": name}}) for name in ("keywords", "words")
    ]
    for index in range(0, len(rows[0]), 40):
        keywords, words = (source[index]["text"] for source in rows)
        assert words.split() == keywords.replace(", ", " ").split()


def test_directory_is_small_and_names_no_machine():
    files = [path for path in PACKAGED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2.6e6
    texts = [path.read_text() for path in files if path.suffix in (".json", ".txt")]
    assert len(texts) == 4
    for text in texts:
        assert not re.search(r"(^|[\s\"'])(/|~|[A-Z]:\\)|\b20\d\d-\d\d|npmjs|pypi", text)
    notice = (PACKAGED.parent.parent / "NOTICE").read_text()
    for word in ("Apache", "Google", "Cal Henderson", "Mu-An Chiou", *emoji.PACKAGES.values()):
        assert word in notice


def test_records_are_serialized_in_fixed_order():
    shards = list(PACKAGED.glob("*.array_record*"))
    assert len(shards) == 2
    for shard in shards:
        for record in ArrayRecordReader(str(shard)).read_all():
            example = tf_example_pb2.Example.FromString(record)
            assert record == example.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("codes", "concept"),
    [
        ("1F600", "1f600"),
        ("1F468-200D-1F680", "1f9d1-1f680"),  # man astronaut
        ("1F9D1-200D-1F680", "1f9d1-1f680"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1f3c3"),  # woman running facing right
        ("1F468-200D-1F469-200D-1F466", "1f46a"),  # a family
        ("1F46A", "1f46a"),
        ("1F469-200D-2764-FE0F-200D-1F468", "1f491"),  # couple with heart
        ("1F934", "1fac5"),  # prince, person with crown
        ("2640-FE0F", "2640"),  # the female sign alone
        ("1F1E6-1F1FA", "1f1e6-1f1fa"),
    ],
)
def test_concept_of(codes, concept):
    assert emoji.concept_of(codes) == concept


FAKE = {  # name -> code points, category, colour
    "GRINNING FACE": ("1F600", "Smileys & Emotion", "yellow"),
    "MAN PILOT": ("1F468-200D-2708-FE0F", "People & Body", "blue"),
    "WOMAN PILOT": ("1F469-200D-2708-FE0F", "People & Body", "navy"),
    "HEART": ("2764-FE0F", "Smileys & Emotion", "red"),
    "CRIMSON HEART": ("1F970", "Smileys & Emotion", (254, 0, 0)),
    "TREE": ("1F333", "Animals & Nature", "green"),
    "LEAF": ("1F343", "Animals & Nature", "lime"),
    "EMOJI MODIFIER": ("1F3FB", "Component", "brown"),
}


@pytest.fixture
def node_modules(tmp_path):
    source = tmp_path / "node_modules"
    art = source / "emoji-datasource-google"
    (art / "img" / "google" / "64").mkdir(parents=True)
    (source / "emojilib" / "dist").mkdir(parents=True)
    for package, version in emoji.PACKAGES.items():
        (source / package / "package.json").write_text(json.dumps({"version": version}))
    entries = []
    for name, (codes, category, colour) in FAKE.items():
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.paste(Image.new("RGB", (32, 64), colour), (16, 0))
        file = f"{codes.lower()}.png"
        image.save(art / "img" / "google" / "64" / file)
        subcategory = category.lower().split()[0]
        entries.append({"name": name, "unified": codes, "image": file, "category": category})
        entries[-1]["subcategory"] = subcategory
    (art / "emoji.json").write_text(json.dumps(entries))
    words = {"\U0001f600": ["grinning_face", "smile", "face", "smile", "a, b"], "\u2764": ["love"]}
    (source / "emojilib" / "dist" / "emoji-en-US.json").write_text(json.dumps(words))
    return source


def test_prepare_builds_from_a_source(node_modules, tmp_path):
    target = emoji.prepare(node_modules, tmp_path / "out")
    assert target == tmp_path / "out" / "emoji" / "1.0.0"
    assert [path.name for path in target.parent.iterdir()] == ["1.0.0"]  # no scratch left
    info, splits = read(target)
    assert info.features["category"].names == [
        "Animals & Nature",
        "People & Body",
        "Smileys & Emotion",
    ]
    records = {r["text"].decode(): r for records in splits.values() for r in records}
    assert set(records) == {name.lower() for name in FAKE} - {"emoji modifier"}
    assert records["grinning face"]["keywords"] == b"grinning face, smile, face, a b"
    assert records["heart"]["keywords"] == b"love"  # though only one side writes the selector
    assert records["tree"]["keywords"] == b""
    assert records["man pilot"]["concept"] == records["woman pilot"]["concept"] == b"1f9d1-2708"
    assert records["heart"]["concept"] == records["crimson heart"]["concept"] == b"1f970"
    image = pixels([records["tree"]])[0].astype(int)
    assert np.abs(image[32, 4] - 255).max() < 8  # transparent became white
    assert np.abs(image[32, 32] - (0, 128, 0)).max() < 16
    with pytest.raises(UserError, match="exists already"):
        emoji.prepare(node_modules, tmp_path / "out")


def test_prepare_rejects_a_wrong_source(node_modules, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="package.json"):
        emoji.prepare(tmp_path, out)
    package = node_modules / "emojilib" / "package.json"
    package.write_text('{"version": "3.0.0"}')
    with pytest.raises(UserError, match="has version 3.0.0, not 4.0.3"):
        emoji.prepare(node_modules, out)
    package.write_text('{"version": "4.0.3"}')
    image = node_modules / "emoji-datasource-google" / "img" / "google" / "64" / "1f600.png"
    Image.new("RGB", (32, 32)).save(image)
    with pytest.raises(UserError, match="not 64x64"):
        emoji.prepare(node_modules, out)
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match="1f600.png"):
        emoji.prepare(node_modules, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emojy", "--source=.", "--out=."], "unknown KIND 'emojy'; choose one of: .*emoji"),
        (["emoji", "--out=."], "--source"),
        (["emoji", "--source=/nowhere", "--out=/nowhere"], "cannot read /nowhere"),
    ],
)
def test_command_line_ends_bad_input_with_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["prepare", *arguments])
    with pytest.raises(SystemExit) as stop:
        entry.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error) and error.count("\n") == 1
