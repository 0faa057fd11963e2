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
