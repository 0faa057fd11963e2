"""Hugging Face's data2vec, converted without PyTorch and given back: recorded numbers."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import weight_writers

import bivl
from bivl import convert
from bivl.core.errors import UserError
from bivl.weights.files import open_weights
from golden import data2vec_vision

pytestmark = pytest.mark.usefixtures("quick_compile")
GOLDEN = data2vec_vision.FILE.with_name("data2vec_huggingface.npz")
CLOSE = 2e-5


def recorded(kind):
    with np.load(GOLDEN) as file:
        found = {k.split("/", 1)[1]: file[k] for k in file.files if k.startswith(f"{kind}/")}
    params = {k.split("/", 1)[1]: v for k, v in found.items() if k.startswith("params/")}
    return params, found


def written(folder, params, config, dtype=np.float32):
    """A folder as `save_pretrained` writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(str(config))
    tensors = {k: v.astype(dtype) for k, v in params.items()}
    weight_writers.safetensors(folder / "model.safetensors", tensors)
    return folder


def converted(source, out, *flags):
    convert.main([f"--source={source}", f"--out={out}", *flags])
    report = json.loads((out / "conversion.json").read_text())
    assert not report["missing"] and not report["unused"]
    return report


def assert_the_same_file(one, two):
    """Names, types and numbers."""
    one, two = (open_weights(folder).tensors for folder in (one, two))
    assert set(one) == set(two)
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        np.testing.assert_array_equal(tensor.read(), two[key].read(), err_msg=key)


def batch_of(kind, found):
    given = found["input"]
    if kind == "image":
        return {"image": given.transpose(0, 2, 3, 1)}
    if kind == "text":
        return {"tokens": given.astype(np.int32), "padding": given == 1}
    return {"audio": given, "length": found["lengths"]}


@pytest.mark.parametrize("kind", ["image", "text", "audio"])
def test_converted_and_given_back(kind, tmp_path):
    params, found = recorded(kind)
    theirs = written(tmp_path / "theirs", params, found["config"])
    report = converted(theirs, tmp_path / "ours")
    assert (report["family"], report["layout"]) == ("data2vec", f"huggingface {kind}")
    loaded, batch = bivl.load(tmp_path / "ours"), batch_of(kind, found)
    got = loaded.encode(batch, layers=True)
    real = ~batch["padding"] if kind == "text" else np.s_[:]
    for ours, wanted in zip(got["layers"], found["layers"], strict=True):
        np.testing.assert_allclose(ours[real], wanted[real], rtol=0, atol=CLOSE)
    np.testing.assert_allclose(got["tokens"][real], found["last"][real], rtol=0, atol=CLOSE)
    if kind == "audio":
        wanted = jax.nn.log_softmax(found["logits"])
        logits = loaded.predict["log_probs"](batch)[0]
    else:
        wanted, logits = found["logits"], loaded.predict["logits"](batch)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=CLOSE)
    converted(tmp_path / "ours", tmp_path / "back", "--to=huggingface")
    assert_the_same_file(theirs, tmp_path / "back")
    given, back = (
        json.loads((tmp_path / x / "config.json").read_text()) for x in ("theirs", "back")
    )
    assert {key: back.get(key) for key in given} == given


def bare(kind):
    """The image model, or Beit's, under a head of six classes that none of ours is."""
    params, found = recorded("image")
    start = {"data2vec-vision": "data2vec_vision.", "beit": "beit."}[kind]
    params = {k.replace("data2vec_vision.", start): v for k, v in params.items()}
    params = {k: v for k, v in params.items() if not k.startswith("classifier.")}
    params["decode_head.classifier.weight"] = np.ones((6, 4, 1, 1), np.float32)
    config = json.loads(str(found["config"])) | {"model_type": kind}
    ending = {"data2vec-vision": "Data2VecVision", "beit": "Beit"}[kind]
    config["architectures"] = [f"{ending}ForSemanticSegmentation"]
    config["id2label"] = {str(i): f"part {i}" for i in range(6)}
    config["label2id"] = {f"part {i}": i for i in range(6)}
    return params, config


@pytest.mark.parametrize("kind", ["data2vec-vision", "beit"])
def test_the_classes_of_a_head_that_is_given_back(kind, tmp_path):
    """They are the file's, not those of the classifier that ours has and the file has not."""
    params, config = bare(kind)
    theirs = written(tmp_path / "theirs", params, json.dumps(config))
    converted(theirs, tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "back", "--to=huggingface")
    assert_the_same_file(theirs, tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back.get(key) for key in config} == config


@pytest.mark.parametrize("names", [None, 5, {"0": "one too few"}])
def test_classes_without_names_get_some(names, tmp_path):
    params, found = recorded("image")
    config = json.loads(str(found["config"])) | {"id2label": names}
    theirs = written(tmp_path / "theirs", params, json.dumps(config))
    converted(theirs, tmp_path / "ours")
    assert converted(tmp_path / "ours", tmp_path / "back", "--to=huggingface")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)}
    assert back["label2id"] == {f"LABEL_{i}": i for i in range(3)}


def test_half_precision_is_given_back_as_such(tmp_path):
    """And from official weights to another library there is no need for a checkpoint between."""
    params, found = recorded("image")
    theirs = written(tmp_path / "theirs", params, found["config"], ml_dtypes.bfloat16)
    converted(theirs, tmp_path / "back", "--to=huggingface")
    assert_the_same_file(theirs, tmp_path / "back")


def test_a_model_without_a_vocabulary_knows_numbers(tmp_path):
    params, found = recorded("text")
    converted(written(tmp_path / "theirs", params, found["config"]), tmp_path / "ours")
    loaded = bivl.load(tmp_path / "ours")
    assert loaded.config.tokenizer.kind == "ids" and loaded.config.tokenizer.size == 30
    with pytest.raises(UserError, match="--config.tokenizer.kind=bpe --config.tokenizer.path="):
        loaded.preprocess(text=["words"])


def test_transformers_has_no_such_model(tmp_path):
    """Nor has fairseq's data2vec 2.0 this one; each says where to try."""
    params, found = recorded("image")
    theirs = written(tmp_path / "theirs", params, found["config"])
    converted(theirs, tmp_path / "ours")
    with pytest.raises(UserError, match="try --to=huggingface"):
        converted(tmp_path / "ours", tmp_path / "back", "--to=official")
    assert not (tmp_path / "back").exists()
