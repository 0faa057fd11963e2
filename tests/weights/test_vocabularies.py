"""What lies beside weights, and what plans take from names, shapes and a file's own config."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bivl.core.errors import UserError
from bivl.data import vocabulary
from bivl.data.decoding import LIBRISPEECH
from bivl.weights import plan as plans
from bivl.weights import vocabularies

SMALL = Path(vocabulary.__file__).parent / "small"


@pytest.fixture
def words(tmp_path):
    """A folder with the packaged byte-level BPE."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SMALL / name, tmp_path)
    return tmp_path


def test_the_tokenizer_beside_the_weights(words):
    changes, notes = vocabularies.tokens(words, 2048)
    assert changes == {"tokenizer.kind": "bpe", "tokenizer.path": str(words)} and not notes
    assert [file.name for file in vocabularies.files(str(words))] == ["vocab.json", "merges.txt"]
    with pytest.raises(UserError, match="has 2048 ids .* the model has 2049"):
        vocabularies.tokens(words, 2049)


def test_without_a_tokenizer_the_cure_is_told(tmp_path):
    changes, (note,) = vocabularies.tokens(tmp_path, 41)
    assert (changes["tokenizer.kind"], changes["tokenizer.size"]) == ("ids", 41)
    assert "--config.tokenizer.path=FOLDER" in note


def test_small_files_come_along_but_not_the_neighbours_of_a_file(words):
    for name in ("model.safetensors", "model.safetensors.index.json", "conversion.json"):
        (words / name).write_text("{}")
    (words / "folder.json").mkdir()
    assert [file.name for file in vocabularies.small(words)] == ["merges.txt", "vocab.json"]
    assert vocabularies.small(words / "model.safetensors") == ()
    assert vocabularies.files("") == ()
    piece = words / "beit3.spm"
    piece.write_text("")
    assert vocabularies.files(str(piece)) == (piece,)


def letters_file(folder, symbols):
    (folder / "dict.ltr.txt").write_text("".join(f"{symbol} 10\n" for symbol in symbols))


def test_letters_of_fairseq(tmp_path):
    """Four special ids stand before the lines; the blank is the first of them."""
    letters_file(tmp_path, "|ABC")
    found, notes = vocabularies.letters(tmp_path, 8)
    assert len(found) == 7 and found.endswith("|ABC") and not notes
    assert all(ord(letter) >= vocabularies.UNWRITTEN for letter in found[:3])
    with pytest.raises(UserError, match="has 4 letters, the model 5"):
        vocabularies.letters(tmp_path, 9)
    letters_file(tmp_path, "ABCD")
    with pytest.raises(UserError, match="no word boundary"):
        vocabularies.letters(tmp_path, 8)
    (tmp_path / "dict.ltr.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        vocabularies.letters(tmp_path, 8)


def test_letters_that_nobody_names_are_librispeechs(tmp_path):
    for classes in (29, 32):
        found, (note,) = vocabularies.letters(tmp_path, classes)
        assert found.endswith(LIBRISPEECH) and len(found) == classes - 1 and "guessed" in note


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"<pad>": 0, "|": 1, "A": 2}, ""),
        ({"<pad>": 0, "|": 1}, "does not name the 3 classes"),
        ({"<pad>": 0, "|": 1, "A": 1}, "does not name the 3 classes"),
        ({"<pad>": 0, "|": 1, "A": [2]}, "does not name the 3 classes"),
        ({"<pad>": 0, "|": 1, "A": 2, "B": "x"}, "does not name the 3 classes"),
        ([1, 2, 3], "does not name the 3 classes"),
        ({"|": 0, "<pad>": 1, "A": 2}, "the first class is '|'"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_letters_of_hugging_face(content, said, tmp_path):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "vocab.json").write_text(text)
    if said:
        with pytest.raises(UserError, match=said.replace("|", r"\|")) as error:
            vocabularies.letters(tmp_path, 3)
        assert "\n" not in str(error.value)
    else:
        assert vocabularies.letters(tmp_path, 3) == ("|A", ())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (None, {}),
        (
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False, "size": 224},
            {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "augment.squash": True},
        ),
        (
            {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}},
            {"augment.crop_ratio": 0.875},
        ),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "size": "big"}, {}),
        ({"image_mean": [0.1, 0.2, 0.3]}, {"image_mean": (0.1, 0.2, 0.3)}),
        ({"do_center_crop": False, "size": {"height": 8, "width": 8}}, {"augment.squash": True}),
        ({"size": {"shortest_edge": 256}, "crop_size": 192}, {"augment.crop_ratio": 0.75}),
        ({"size": 224, "crop_size": {"height": 224}}, {"augment.crop_ratio": 1.0}),
        ({"size": "large"}, {}),
        # statistics that are no three numbers are passed over
        ({"image_mean": ["a", "b", "c"], "image_std": [1, 2, None]}, {}),
        ({"image_mean": [0, 0.5, 1], "image_std": [1, 2]}, {"image_mean": (0.0, 0.5, 1.0)}),
    ],
)
def test_how_images_are_seen(settings, wanted, tmp_path):
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert vocabularies.views(tmp_path) == wanted
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no settings"):
        vocabularies.views(tmp_path)


def weights(config=None, **names):
    shapes = {name.replace("__", "."): SimpleNamespace(shape=x) for name, x in names.items()}
    return SimpleNamespace(tensors=shapes, config=config or {})


@pytest.mark.parametrize(
    ("width", "config", "heads"),
    [
        (768, {}, 12),
        (1280, {}, 16),  # ViT-H: 80 wide
        (1408, {}, 16),  # ViT-g: 88 wide
        (1280, {"cfg": {"model": {"num_heads": 20}}}, 20),
        (48, {}, None),
        (48, {"num_attention_heads": 3}, 3),
    ],
)
def test_how_many_heads(width, config, heads):
    changes, unknown = plans.encoder_sizes(
        weights(config, blocks__0__w=(1,), blocks__1__w=(1,)), r"blocks\.(\d+)\.w", width, 7
    )
    assert changes.get("model.num_heads") == heads and changes["model.depth"] == 2
    assert set(unknown) == ({"model.num_heads"} if heads is None else set())


def test_norms_that_come_first_are_refused():
    plans.require_post_norm(weights({"model": {"layer_norm_first": False}}))
    with pytest.raises(UserError, match="layer_norm_first=True"):
        plans.require_post_norm(weights({"model": {"w2v_args": {"layer_norm_first": True}}}))
