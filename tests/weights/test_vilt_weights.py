"""ViLT under Hugging Face's names, converted without PyTorch: golden numbers."""

import functools
import json

import numpy as np
import pytest
import weight_writers

import bivl
import conversions
from bivl import convert
from bivl.core.errors import UserError
from bivl.weights import export, vilt, vilt_tables
from bivl.weights.files import open_weights

pytestmark = pytest.mark.usefixtures("quick_compile")
golden = functools.partial(conversions.golden, "vilt")
EPS = ("--config.model.eps=1e-5", "--config.model.text_eps=1e-5")
HEADS = ("--config.model.num_heads=3",)
WORDS = "vilt.embeddings.text_embeddings.word_embeddings.weight"
CLOSE = 2e-5


def batch():
    _, g = golden()
    return {
        "image": g["images"],
        "tokens": g["ids"].astype(np.int32),
        "padding": g["padding"].astype(bool),
    }


def converted(folder, tensors, *flags):
    """The tensors as a file, converted; conversion.json."""
    np.savez(folder / "theirs.npz", **tensors)
    out = folder / "ours"
    convert.main([f"--source={folder / 'theirs.npz'}", f"--out={out}", *flags])
    return out, conversions.read_report("vilt", out)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


def test_words(tmp_path):
    """ViltForMaskedLM whose decoder is its own."""
    params, g = golden()
    out, report = converted(tmp_path, params, *HEADS, *EPS)
    loaded = bivl.load(out)
    got = loaded.encode(batch(), layers=True)
    for ours, theirs in zip(got["layers"], g["layers"], strict=True):
        close(ours, theirs)
    for name in ("tokens", "pooled"):
        close(got[name], g[name])
    close(loaded.predict["logits"](batch()), g["logits"])
    close(loaded.predict["features"](batch()), g["pooled"])
    close(loaded.embed(batch()), g["pooled"] / np.linalg.norm(g["pooled"], axis=1, keepdims=True))
    np.testing.assert_array_equal(got["padding"][:, :7], g["padding"])
    assert loaded.predict["attention"](batch()).shape == (3, 3, 3, 3)
    assert not report["initialised"] and not report["dropped"] and "matching" not in loaded.predict
    c = loaded.config
    assert (c.image_size, c.model.patch_size, c.model.width, c.model.depth) == (12, 4, 24, 2)
    assert (c.model.text_rows, c.model.vocabulary, c.model.segments, c.model.modalities) == (
        8,
        30,
        2,
        2,
    )
    assert not c.model.tied and c.model.pooler and c.loss_weights.mlm == 1 and c.model.pad is None


def test_numbers_alone_have_no_pads_and_texts_are_refused(tmp_path):
    """Where no tokenizer lies beside the weights; what is a pad, `padding` says."""
    params, _ = golden()
    loaded = bivl.load(converted(tmp_path, params, *HEADS, *EPS)[0])
    given = batch() | {"tokens": np.arange(21, dtype=np.int32).reshape(3, 7)}
    del given["padding"]
    assert not loaded.encode(given)["padding"].any()
    with pytest.raises(UserError, match="knows numbers alone"):
        loaded.preprocess(image=[np.zeros((9, 9, 3), np.uint8)], text=["a"])
    with pytest.raises(UserError, match=r"reads a text and its image together; pass image=\["):
        loaded.preprocess(text=["a"])
    with pytest.raises(UserError, match="the batch has no image"):
        loaded.encode({"tokens": given["tokens"]})
    with pytest.raises(UserError, match="a text of 9 tokens is longer than 8; cut it"):
        loaded.encode(given | {"tokens": np.ones((3, 9), np.int32)})


def changed(*without, **changes):
    """The parameters less those whose names have one of these parts, and others."""
    found = {k: v for k, v in golden()[0].items() if not any(part in k for part in without)}
    return found | changes


def test_words_named_by_their_own_table(tmp_path):
    """A file without the decoder's kernel is tied; a file of an older version has one bias more."""
    params, _ = golden()
    old = {vilt_tables.OLD_BIAS: params[vilt_tables.NEW_BIAS]}
    out, report = converted(tmp_path, changed("decoder.weight", **old), *HEADS, *EPS)
    tied = bivl.load(out)
    assert tied.config.model.tied
    assert [row["key"] for row in report["dropped"]] == [vilt_tables.OLD_BIAS]
    (tmp_path / "again").mkdir()
    own = params | {"mlm_score.decoder.weight": params[WORDS]}
    own[vilt_tables.OLD_BIAS] = own.pop(vilt_tables.NEW_BIAS)
    other = bivl.load(converted(tmp_path / "again", own, *HEADS, *EPS)[0])
    close(*(model.predict["logits"](batch()) for model in (tied, other)))


def test_what_stands_on_it_is_dropped(tmp_path):
    """A bare model, without a pooler here, and the heads of tuned ones."""
    heads = {"classifier.weight": np.zeros((2, 24)), "rank_output.bias": np.zeros(1)}
    out, report = converted(tmp_path, changed("mlm_score", "pooler", **heads), *HEADS, *EPS)
    loaded, (_, g) = bivl.load(out), golden()
    assert {row["key"] for row in report["dropped"]} == set(heads)
    got = loaded.encode(batch())
    close(got["tokens"], g["tokens"])
    close(got["pooled"], g["tokens"][:, 0])
    assert "logits" not in loaded.predict


def test_and_on_to_huggingface(tmp_path):
    """Names, layouts and a config.json that convert reads."""
    params, g = golden()
    out, _ = converted(tmp_path, params, *HEADS, *EPS)
    convert.main([f"--source={out}", f"--out={tmp_path}/there", "--to=huggingface"])
    there = open_weights(tmp_path / "there").tensors
    assert set(there) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(there[name].read(), value, err_msg=name)
    settings = json.loads((tmp_path / "there" / "config.json").read_text())
    assert settings["architectures"] == ["ViltForMaskedLM"] and settings["image_size"] == 12
    assert settings["num_attention_heads"] == 3 and settings["tie_word_embeddings"] is False
    convert.main([f"--source={tmp_path}/there", f"--out={tmp_path}/again"])
    close(bivl.load(tmp_path / "again").predict["logits"](batch()), g["logits"])


def folder(path, tensors, settings, **texts):
    """A Hugging Face folder."""
    path.mkdir()
    weight_writers.safetensors(path / "model.safetensors", tensors)
    config = {"model_type": "vilt", "num_attention_heads": 3, "layer_norm_eps": 1e-5} | settings
    (path / "config.json").write_text(json.dumps(config))
    for name, text in texts.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_the_tokenizer_and_images_of_a_folder(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "c"]
    seen = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.4], "size_divisor": 4}
    files = {"vocab__txt": "\n".join(pieces), "preprocessor_config__json": json.dumps(seen)}
    theirs = folder(tmp_path / "theirs", golden()[0], {}, **files)
    convert.main([f"--source={theirs}", f"--out={tmp_path}/ours"])
    loaded = bivl.load(tmp_path / "ours")
    assert loaded.config.image_mean == (0.1, 0.2, 0.3)
    given = loaded.preprocess(image=[np.zeros((30, 20, 3), np.uint8)] * 2, text=["C", "abb, x"])
    assert given["tokens"].tolist() == [[2, 7, 3, 0, 0, 0, 0], [2, 5, 6, 6, 1, 1, 3]]
    assert given["image"].shape == (2, 12, 12, 3)
    np.testing.assert_array_equal(given["padding"], given["tokens"] == 0)
    inferred = {name: given[name] for name in ("image", "tokens")}
    close(loaded.encode(inferred)["tokens"], loaded.encode(given)["tokens"])
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join([*pieces, *map(str, range(30))]))
    with pytest.raises(UserError, match="has 38 ids, the model has 30; put the model's own"):
        convert.main([f"--source={theirs}", f"--out={tmp_path}/other"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_image_length": 5}, "max_image_length=5, which draws as many of 9 patches"),
        ({"hidden_act": "swish"}, "hidden_act='swish', which is not supported"),
    ],
)
def test_settings_of_another_model_are_refused(tmp_path, settings, words):
    theirs = folder(tmp_path / "theirs", golden()[0], settings)
    with pytest.raises(UserError, match=words) as caught:
        convert.main([f"--source={theirs}", f"--out={tmp_path}/ours"])
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("without", "changes", "words"),
    [
        ((), {"vilt.embeddings.position_embeddings": (1, 9, 24)}, "is of 8 patches and"),
        (("word_embeddings",), {}, "of no known family"),
        (("layernorm.bias",), {}, "vilt.layernorm.bias is missing"),
        ((), {"vilt.encoder.layer.2.output.dense.bias": (24,)}, "is not used"),
        ((), {"vilt.pooler.dense.weight": (24, 25)}, "needs"),
        (("text_embeddings.token_type",), {}, "has no .*token_type_embeddings.weight"),
    ],
)
def test_what_is_refused(tmp_path, without, changes, words):
    zeros = {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    with pytest.raises(UserError, match=words) as caught:
        converted(tmp_path, changed(*without, **zeros), *HEADS, *EPS)
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("norm", "post", "ViLT has norm='pre'; this model has 'post'"),
        ("text_eps", 1e-3, "ViLT has eps=0.001; this model has 1e-05"),
        ("pooler", False, "ViLT has a pooler; this model has none"),
        ("qkv_bias", "qv", "this model has qv"),
    ],
)
def test_no_model_of_transformers(tmp_path, key, value, words):
    out, _ = converted(tmp_path, golden()[0], *HEADS, *EPS)
    config = bivl.load(out).config
    config.model[key] = value
    with pytest.raises(UserError, match=words):
        vilt.EXPORTS["huggingface"][0](config, {}, export.Origin())
