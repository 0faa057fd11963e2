import io
import os
import pickle
import shutil

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bivl.core.errors import Undecodable, UserError
from bivl.data.images import decode_image
from bivl.data.sources import open_source


def png(value, height=4, width=5):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


class Pairs(tfds.core.GeneratorBasedBuilder):
    """A tiny image-text set; row k is grey level k with the caption 'größe k'."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "number": np.int64,
                "score": np.float32,
                "wave": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                "captions": tfds.features.Sequence(tfds.features.Text()),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for k in range(count):
            yield (
                k,
                {
                    "image": png(k),
                    "caption": f"größe {k}",
                    "label": k % 2,
                    "number": k,
                    "score": k / 2,
                    "wave": np.arange(k + 1, dtype=np.int16),
                    "captions": [f"a{k}", f"b{k}"],
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Pairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_config(folder, **settings):
    return {"kind": "tfds", "name": "pairs", "dir": str(folder), "split": "train", **settings}


def message(config):
    with pytest.raises(UserError) as error:
        open_source(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_kind_names_the_nearest():
    assert "did you mean 'emoji'" in message({"kind": "emojis"})
    assert "synthetic" in message({"kind": "quux"})
    assert "data.kind" in message({})


def test_tfds_record(prepared):
    source = open_source(tfds_config(prepared, fields={"text": "caption"}))
    assert len(source) == 10 and source.classes == ("even", "odd")
    seen = set()
    for i in range(10):
        record = source[i]
        assert set(record) == {"image", "text", "label", "id"} and record["id"] == i
        assert isinstance(record["image"], bytes) and type(record["label"]) is int
        level = int(decode_image(record["image"])[0, 0, 0])
        assert record["text"] == f"größe {level}" and record["label"] == level % 2
        seen.add(level)
    assert seen == set(range(10))
    with pytest.raises(IndexError):
        source[10]


def test_tfds_fields(prepared):
    fields = {"text": "label", "audio": "wave", "label": "number", "id": "number", "image": ""}
    source = open_source(tfds_config(prepared, fields=ml_collections.ConfigDict(fields)))
    record = source[3]
    assert record["text"] == ["even", "odd"][record["label"] % 2]
    assert record["id"] == record["label"] == len(record["audio"]) - 1
    assert record["audio"].dtype == np.int16 and source.classes is None
    # Without fields: our own names, as far as the set has them; `captions` is no `text`.
    assert set(open_source(tfds_config(prepared))[0]) == {"image", "label", "id"}


@pytest.mark.parametrize(
    "split, count",
    [
        ("train[:80%]", 8),
        ("train[2:5]", 3),
        ("train[-3:]", 3),
        ("test", 4),
        ("train[:50%]+test", 9),
    ],
)
def test_tfds_splits(prepared, split, count):
    source = open_source(tfds_config(prepared, split=split))
    assert len(source) == len([source[i] for i in range(count)]) == count


def test_tfds_errors(prepared):
    def error(**settings):
        return message(tfds_config(prepared, **settings))

    wrong = error(fields={"text": "caption_"})
    assert "data.fields.text" in wrong and "did you mean 'caption'" in wrong and "wave" in wrong
    assert "data.fields: our field 'txt'" in error(fields={"txt": "caption"})
    assert "holds Sequence" in error(fields={"text": "captions"})
    assert "holds number" in error(fields={"text": "score"})
    assert "no mapping" in error(fields="caption")
    assert "did you mean 'train'" in error(split="tran")
    assert "empty" in error(split="train[3:3]")
    assert "stay within 10" in error(split="train[:11]")
    assert "stay within 100%" in error(split="train[:101%]")
    assert "cannot be read" in error(split="train[a:b]")
    assert "did you mean 'pairs'" in error(name="pair")
    assert "version '2.0.0'" in error(name="pairs:2.0.0")
    assert "is not a folder" in error(dir=str(prepared / "nowhere"))
    assert "mount" in error(dir="gs://bucket/data")
    assert "data.name is empty" in message({"kind": "tfds"})
    for name in ("../" + prepared.name, "pairs/../..", "/etc"):
        assert "leaves data.dir" in error(name=name)


def test_tfds_reads_the_directory_it_is_given(prepared, tmp_path):
    version = prepared / "pairs" / "1.0.0"
    for place in (version, version.parent):
        for name in ("", "pairs"):
            assert len(open_source(tfds_config(place, name=name))) == 10
    assert "holds 'pairs'" in message(tfds_config(version, name="mnist"))
    # A name that TFDS knows: the files here count, not the builder.
    shutil.copytree(version, tmp_path / "mnist" / "1.0.0")
    source = open_source(tfds_config(tmp_path, name="mnist"))
    assert source.classes == ("even", "odd")


def test_tfds_newest_version_and_configurations(prepared, tmp_path):
    for name in ("1.0.9", "1.0.10", "1.0.2"):
        shutil.copytree(prepared / "pairs" / "1.0.0", tmp_path / "a" / "pairs" / name)
    (tmp_path / "a" / "pairs" / "2.0.0").mkdir()  # not prepared
    assert "1.0.10" in open_source(tfds_config(tmp_path / "a")).describe()
    assert "1.0.2" in open_source(tfds_config(tmp_path / "a", name="pairs:1.0.2")).describe()
    for name in ("big", "small"):
        shutil.copytree(prepared / "pairs", tmp_path / "b" / "pairs" / name)
    assert "big, small" in message(tfds_config(tmp_path / "b"))
    assert "small" in open_source(tfds_config(tmp_path / "b", name="pairs/small")).describe()
    assert "did you mean 'small'" in message(tfds_config(tmp_path / "b", name="pairs/smal"))
    shutil.rmtree(tmp_path / "b" / "pairs" / "big")
    assert "small" in open_source(tfds_config(tmp_path / "b")).describe()


def test_tfds_damage(prepared, tmp_path):
    version = tmp_path / "pairs" / "1.0.0"
    shutil.copytree(prepared / "pairs" / "1.0.0", version)
    shard = next(version.glob("*train*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:1000])
    assert "cut short" in message(tfds_config(tmp_path))
    assert len(open_source(tfds_config(tmp_path, split="test"))) == 4
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        open_source(tfds_config(tmp_path))[0]
    shard.unlink()
    shard.symlink_to(next((prepared / "pairs" / "1.0.0").glob("*train*")))
    assert "leaves data.dir" in message(tfds_config(tmp_path))
    (tmp_path / "linked").symlink_to(prepared / "pairs")
    assert "leaves data.dir" in message(tfds_config(tmp_path, name="linked"))
    (version / "features.json").write_text("{")
    assert "damaged" in message(tfds_config(version))


def test_tfds_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "did you mean 'mnist'" in message({"kind": "tfds", "name": "mnistt"})
    assert "not prepared" in message({"kind": "tfds", "name": "mnist"})
    with tfds.testing.mock_data(num_examples=5):
        source = open_source({"kind": "tfds", "name": "mnist", "fields": {"text": "label"}})
        record = source[4]
    assert len(source) == 5 and record["image"].shape == (28, 28, 1)
    assert type(record["label"]) is int and record["text"] == source.classes[record["label"]]


def test_emoji_has_all_records():
    train, test = (open_source({"kind": "emoji", "split": split}) for split in ("train", "test"))
    assert len(train) + len(test) == 1906 and 350 < len(test) < 450
    assert len(train.classes) == 9 and train.classes == test.classes
    for source in (train, test):
        record = source[0]
        assert set(record) == {"image", "text", "label", "id"} and record["text"]
        assert record["image"][8:12] == b"WEBP"
        assert decode_image(record["image"]).shape == (64, 64, 3)
        assert 0 <= record["label"] < 9
    fine = open_source({"kind": "emoji", "fields": {"label": "subcategory", "text": "keywords"}})
    assert len(fine.classes) > 50 and fine[0]["text"] != train[0]["text"]
    assert "emoji, train" in train.describe() and "label (its category)" in train.describe()


def test_digits():
    train, test = (open_source({"kind": "digits", "split": split}) for split in ("train", "test"))
    assert (len(train), len(test)) == (1400, 397) and len(train.classes) == 10
    record = test[5]
    assert record["image"].shape == (8, 8) and record["image"].dtype == np.uint8
    assert max(train[i]["image"].max() for i in range(50)) == 255
    assert {train[i]["label"] for i in range(100)} == set(range(10))
    images = {source[i]["image"].tobytes() for source in (train, test) for i in range(len(source))}
    assert len(images) > 1790  # the splits share no row
    tail = open_source({"kind": "digits", "split": "train[-10%:]"})
    assert len(tail) == 140 and tail[0]["id"] == 0
    np.testing.assert_array_equal(tail[0]["image"], train[1260]["image"])
    assert "test" in message({"kind": "digits", "split": "valid"})


@pytest.fixture
def images(tmp_path):
    """DIR/CLASS/k.png with grey level k; 20 in each of three classes."""
    for number, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / name).mkdir()
        for k in range(20):
            (tmp_path / name / f"{k}.PNG").write_bytes(png(20 * number + k))
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    return tmp_path


def folder_config(folder, split="train"):
    return {"kind": "folder", "dir": str(folder), "split": split}


def test_folder_of_classes_is_one_split(images):
    source = open_source(folder_config(images))
    assert len(source) == 60 and source.classes == ("ant", "bee", "cat")
    levels = []
    for i in range(60):
        record = source[i]
        levels.append(int(decode_image(record["image"])[0, 0, 0]))
        assert record["label"] == levels[-1] // 20 and record["id"] == i
        assert source.where(i).endswith(f"{source.classes[record['label']]}/{levels[-1] % 20}.PNG")
    assert sorted(levels) == list(range(60))
    # Slices mix the classes and are disjoint.
    parts = [open_source(folder_config(images, s)) for s in ("train[:90%]", "train[90%:]")]
    assert [len(part) for part in parts] == [54, 6]
    assert len({part.where(i) for part in parts for i in range(len(part))}) == 60
    assert (
        len({open_source(folder_config(images, "train[:12]"))[i]["label"] for i in range(12)}) == 3
    )
    wrong = message(folder_config(images, "test"))
    assert "test" in wrong and "train[90%:]" in wrong


def test_folder_with_splits(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    shutil.copytree(images, root / "train", dirs_exist_ok=True)
    (root / "val" / "bee").mkdir(parents=True)
    (root / "val" / "bee" / "a.png").write_bytes(png(7))
    source = open_source(folder_config(root, "val"))
    # One class here, but numbered as in train.
    assert len(source) == 1 and source[0]["label"] == 1 and len(source.classes) == 3
    assert len(open_source(folder_config(root, "train[:50%]+val"))) == 31
    wrong = message(folder_config(root, "test"))
    assert "train, val" in wrong


def test_folder_errors(tmp_path):
    assert "data.dir is empty" in message({"kind": "folder"})
    assert "is not a folder" in message(folder_config(tmp_path / "nowhere"))
    assert "holds no images" in message(folder_config(tmp_path))
    assert "holds no images" in message(folder_config(tmp_path, "../x"))


def test_folder_never_leaves_its_directory(images, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "dog").mkdir()
    (outside / "dog" / "secret.png").write_bytes(png(99))
    (images / "dog").symlink_to(outside / "dog")
    (images / "cat" / "secret.png").symlink_to(outside / "dog" / "secret.png")
    (images / "cat" / "again.png").symlink_to(images / "cat" / "0.PNG")
    source = open_source(folder_config(images))
    assert source.classes == ("ant", "bee", "cat")
    assert len(source) == 61  # the link that stays inside counts
    assert not any("secret" in source.where(i) for i in range(len(source)))


def test_folder_bounds_and_missing_files(images, monkeypatch):
    source = open_source(folder_config(images))
    os.unlink(source.where(0))
    with pytest.raises(Undecodable, match="FileNotFoundError"):
        source[0]
    monkeypatch.setattr("bivl.data.images.MAX_BYTES", 10)
    with pytest.raises(Undecodable, match="larger than 10"):
        source[1]


def test_synthetic():
    train = open_source({"kind": "synthetic"})
    test = open_source({"kind": "synthetic", "split": "test"})
    assert (len(train), len(test), len(train.classes)) == (1024, 256, 10)
    record = train[17]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    assert train.classes[record["label"]] in record["text"]
    np.testing.assert_array_equal(record["image"], train[17]["image"])
    images = {s[i]["image"].tobytes() for s in (train, test) for i in range(256)}
    assert len(images) == 512
    big = open_source(
        {"kind": "synthetic", "num_examples": 7, "image_size": 48, "split": "train[2:]"}
    )
    assert len(big) == 5 and big[0]["image"].shape == (48, 48, 3)
    assert "image_size" in message({"kind": "synthetic", "image_size": -1})


def test_synthetic_shapes_can_be_told_apart():
    """Nearest mean image over classes beats chance (0.1) clearly: the label is in the pixels."""
    source = open_source({"kind": "synthetic", "num_examples": 600, "image_size": 16})
    shapes = [source[i] for i in range(600)]
    edges = np.stack(
        [np.abs(np.diff(s["image"].astype(float), axis=0)).mean(2).sum(1) for s in shapes]
    )
    labels = np.array([s["label"] for s in shapes])
    means = np.stack([edges[:400][labels[:400] == k].mean(0) for k in range(10)])
    guess = ((edges[400:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == labels[400:]).mean() > 0.2


@pytest.mark.parametrize("kind", ["emoji", "digits", "synthetic", "folder", "tfds"])
def test_sources_travel_to_workers(kind, images, prepared):
    folder = {"folder": images, "tfds": prepared}.get(kind, "")
    name = "pairs" if kind == "tfds" else ""
    source = open_source({"kind": kind, "dir": str(folder), "name": name, "split": "train[5:9]"})
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 4 and copy.classes == source.classes
    for i in range(4):
        mine, other = source[i], copy[i]
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[key], other[key]) for key in mine)
