import json

import numpy as np
import pytest
from weight_writers import headed, safetensors, torch_zip

from bivl.core.errors import UserError
from bivl.weights.files import open_weights

A, B = np.float32([1, 2]), np.float32([3])


def index(folder, places, base="model.safetensors"):
    (folder / f"{base}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def names(weights):
    return {key: tensor.read().tolist() for key, tensor in weights.tensors.items()}


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        open_weights(folder)
    line = str(error.value)
    assert line.startswith(f"weights {folder}") and line.isprintable() and "; " in line, line
    for word in words:
        assert word in line.removeprefix(f"weights {folder}"), line


def test_whole(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')
    torch_zip(tmp_path / "pytorch_model.bin", {"a": B})
    weights = open_weights(tmp_path)
    assert weights.kind == "huggingface" and names(weights) == {"a": [3]}
    assert weights.files == ("config.json", "pytorch_model.bin")
    safetensors(tmp_path / "model.safetensors", {"a": A}, {"format": "pt"})
    weights = open_weights(str(tmp_path))
    assert names(weights) == {"a": [1, 2]} and weights.config == {"model_type": "beit"}


@pytest.mark.parametrize("base", ["model.safetensors", "pytorch_model.bin"])
def test_shards(base, tmp_path):
    stem, suffix = base.split(".")
    files = [f"{stem}-0000{k}-of-00002.{suffix}" for k in (1, 2)]
    write = safetensors if suffix == "safetensors" else torch_zip
    write(tmp_path / files[0], {"a": A})
    write(tmp_path / files[1], {"b": B})
    index(tmp_path, {"b": files[1], "a": files[0]}, base)
    weights = open_weights(tmp_path)
    assert names(weights) == {"b": [3], "a": [1, 2]}
    assert weights.files == (f"{base}.index.json", files[1], files[0])
    write(tmp_path / files[0], {"a": A, "unlisted": A})
    refused(tmp_path, f"does not say that unlisted is in {files[0]}")
    write(tmp_path / files[0], {"a": A, "b": A})
    refused(tmp_path, f"does not say that b is in {files[0]}")
    write(tmp_path / files[0], {"a": A})
    index(tmp_path, {"a": files[0], "c": files[1]}, base)
    refused(tmp_path, "says that c is in")
    (tmp_path / files[1]).unlink()
    refused(tmp_path, "is missing")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\0", "x\n", "~"])
def test_names_that_leave(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors(tmp_path / "x", {"a": A})
    refused(index(folder, {"a": name}), "not in its folder")


def test_links_that_leave(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    outside = safetensors(tmp_path / "x", {"a": A})
    (folder / "shard").symlink_to(outside)
    refused(index(folder, {"a": "shard"}), "leaves its folder")
    (folder / "shard").unlink()
    safetensors(folder / "inside", {"a": A})
    (folder / "shard").symlink_to("inside")
    assert names(open_weights(folder)) == {"a": [1, 2]}
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "leaves its folder")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").symlink_to(tmp_path / "x")
    refused(folder, "leaves its folder")


def test_cache_of_the_hub(tmp_path):
    """snapshots/REVISION/FILE is a link to blobs/HASH of the same model, and to no other place."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1f", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    safetensors(blobs / "cafe", {"a": A})
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    assert names(open_weights(snapshot)) == {"a": [1, 2]}
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(safetensors(tmp_path / "x", {"a": A}))
    refused(snapshot, "leaves its folder")


def test_broken_folders(tmp_path):
    refused(tmp_path, "has no model.safetensors")
    for data in (b"[]", b"{", b'{"a":1,"a":2}', b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(data)
        headed(tmp_path / "model.safetensors", b"{}")
        refused(tmp_path, "config.json", "JSON")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no tensors")
    (tmp_path / "model.safetensors").unlink()
    for places in ({}, [], {"a": 1}):
        refused(index(tmp_path, places), "index.json")
    (tmp_path / "loop").symlink_to("loop")
    refused(index(tmp_path, {"a": "loop"}), "is missing")
    (tmp_path / "sub").mkdir()
    refused(index(tmp_path, {"a": "sub"}), "no regular file")
