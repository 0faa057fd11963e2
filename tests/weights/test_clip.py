"""CLIP under OpenAI's and Hugging Face's names, converted without PyTorch: golden numbers."""

import functools
import json

import numpy as np
import pytest

import bivl
import conversions
from bivl import convert
from bivl.core.errors import UserError
from bivl.data.vocabulary import clip as vocabulary
from bivl.weights import clip, export
from bivl.weights.files import open_weights

pytestmark = pytest.mark.usefixtures("quick_compile")
golden = functools.partial(conversions.golden, "clip")
HEADS = ("--config.model.num_heads=3", "--config.model.text.num_heads=2")
CLOSE = 2e-5


def batches():
    _, g = golden()
    return {"image": g["images"]}, {"tokens": g["ids"].astype(np.int32)}


def converted(folder, tensors, *flags, name="theirs.npz"):
    """The tensors as a file, converted; conversion.json."""
    np.savez(folder / name, **tensors)
    out = folder / "ours"
    convert.main([f"--source={folder / name}", f"--out={out}", *flags])
    return out, conversions.read_report("clip", out)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


def assert_layers(got, name):
    _, g = golden()
    assert len(got["layers"]) == len(g[f"{name}/layers"])
    for ours, theirs in zip(got["layers"], g[f"{name}/layers"], strict=True):
        close(ours, theirs)
    close(got["tokens"], g[f"{name}/tokens"])


def to_huggingface(params):
    """The same tensors under transformers' names."""
    found = {}
    names = (
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.conv1", "vision_model.embeddings.patch_embedding"),
        ("visual.proj", "visual_projection.weight"),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("ln_final", "text_model.final_layer_norm"),
        ("text_projection", "text_projection.weight"),
        ("attn.", "self_attn."),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    )
    for name, value in params.items():
        start, own = "", name
        for old, new in names:
            if own.startswith(old):
                start, own = start + new, own[len(old) :]
            elif f".{old}" in own:
                own = own.replace(f".{old}", f".{new}")
        name = start + own
        if name.endswith("_projection.weight"):
            value = value.T
        if "in_proj_" in name:
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            found[name] = value
    return found


def test_openai(tmp_path):
    """What is no weight is dropped; the file may be wrapped."""
    params, g = golden()
    beside = {"input_resolution": np.int64(12), "context_length": np.int64(9)}
    out, report = converted(tmp_path, params | beside, *HEADS)
    loaded, (images, texts) = bivl.load(out), batches()
    assert_layers(loaded.encode(images, layers=True), "image")
    read = loaded.encode(texts, layers=True)
    assert_layers(read, "text")
    close(read["pooled"], g["text/pooled"])
    close(loaded.encode(images)["pooled"], g["image/tokens"][:, 0])
    close(loaded.embed(images), g["image/embeddings"])
    close(loaded.embed(texts), g["text/embeddings"])
    close(loaded.predict["logits"](images | texts), g["logits"])
    close(loaded.predict["patch_features"](images), g["image/patches"])
    assert {row["key"] for row in report["dropped"]} == set(beside)
    assert not report["initialised"]
    c = loaded.config
    assert (c.image_size, c.model.patch_size, c.model.width, c.model.depth) == (12, 4, 24, 2)
    assert (c.model.text.rows, c.model.text.vocabulary, c.model.text.pool) == (9, 40, "highest")
    assert c.image_mean == (0.48145466, 0.4578275, 0.40821073) and c.augment.crop_ratio == 1


def test_huggingface_is_the_same_model(tmp_path):
    params, g = golden()
    theirs = to_huggingface(params)
    theirs["vision_model.embeddings.position_ids"] = np.arange(10)
    flags = (*HEADS, "--config.model.text.pool=end", "--config.model.text.end=39")
    out, report = converted(tmp_path, theirs, *flags)
    loaded, (images, texts) = bivl.load(out), batches()
    close(loaded.predict["logits"](images | texts), g["logits"])
    assert [row["key"] for row in report["dropped"]] == ["vision_model.embeddings.position_ids"]


@pytest.mark.parametrize(("start", "head"), [("vision_model.", True), ("", False)])
def test_the_image_tower_alone(tmp_path, start, head):
    params, g = golden()
    theirs = {
        name.replace("vision_model.", start): value
        for name, value in to_huggingface(params).items()
        if name.startswith("vision_model.") or (head and name == "visual_projection.weight")
    }
    out, _ = converted(tmp_path, theirs, HEADS[0])
    loaded, (images, texts) = bivl.load(out), batches()
    assert_layers(loaded.encode(images, layers=True), "image")
    first = g["image/tokens"][:, 0]
    unit = first / np.linalg.norm(first, axis=-1, keepdims=True)
    close(loaded.embed(images), g["image/embeddings"] if head else unit)
    assert ("image_embeddings" in loaded.predict) == head and "logits" not in loaded.predict
    with pytest.raises(UserError, match="the batch has no image; the data set needs that field"):
        loaded.embed(texts)
    with pytest.raises(UserError, match="no tower of texts; leave text out"):
        loaded.preprocess(text=["a"])


def test_the_text_tower_alone(tmp_path):
    params, g = golden()
    theirs = {k: v for k, v in to_huggingface(params).items() if k.startswith("text_")}
    flags = ("--family=clip", HEADS[1], "--config.model.text.pool=highest")
    out, _ = converted(tmp_path, theirs, *flags)
    loaded, (_, texts) = bivl.load(out), batches()
    assert_layers(loaded.encode(texts, layers=True), "text")
    close(loaded.embed(texts), g["text/embeddings"])


def test_and_on_to_huggingface(tmp_path):
    """OpenAI's become the other names, layouts and a config.json, which convert reads."""
    params, g = golden()
    out, _ = converted(tmp_path, params, *HEADS)
    convert.main([f"--source={out}", f"--out={tmp_path}/there", "--to=huggingface"])
    wanted, there = to_huggingface(params), open_weights(tmp_path / "there").tensors
    assert set(there) == set(wanted)
    for name, value in wanted.items():
        assert tuple(there[name].shape) == value.shape, name
        np.testing.assert_array_equal(there[name].read(), value, err_msg=name)
    settings = json.loads((tmp_path / "there" / "config.json").read_text())
    assert settings["text_config"]["eos_token_id"] == 2 and settings["projection_dim"] == 6
    assert settings["vision_config"]["num_attention_heads"] == 3
    convert.main([f"--source={tmp_path}/there", f"--out={tmp_path}/again"])
    images, texts = batches()
    close(bivl.load(tmp_path / "again").predict["logits"](images | texts), g["logits"])


def openai_tokenizer(folder):
    """OpenAI's file with two merges: 516 ids."""
    merges = '"bpe_simple_vocab_16e6.txt#version: 0.2\nt h\nth e</w>\n'
    (folder / f"{vocabulary.OPENAI}").write_text(merges, "utf-8")


def test_openai_s_tokenizer_beside_the_file(tmp_path):
    params, _ = golden()
    openai_tokenizer(tmp_path)
    more = np.zeros((516, 20), np.float32)
    out, _ = converted(tmp_path, params | {"token_embedding.weight": more}, *HEADS)
    loaded = bivl.load(out)
    assert loaded.config.tokenizer.path == str(out / "source" / vocabulary.OPENAI)
    batch = loaded.preprocess(text=["The the", "th"])
    # `t` and `h` are bytes 83 and 71; 512 is `th`, 513 `the</w>`.
    np.testing.assert_array_equal(batch["tokens"], [[514, 513, 513, 515], [514, 83, 327, 515]])
    assert not batch["padding"].any()
    convert.main([f"--source={out}", f"--out={tmp_path}/there", "--to=huggingface"])
    names = {file.name for file in (tmp_path / "there").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= names


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    params, _ = golden()
    openai_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has 516 ids and ends texts with 515, the model has 40"):
        converted(tmp_path, params, *HEADS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "model.num_heads is not known: the file does not say, and its width 24"),
        ({"visual.positional_embedding": (9, 24)}, "has 9 rows .* only square images"),
        ({"visual.proj": (24, 7)}, "needs"),
        ({"text_projection": None}, "of no known family"),
        ({"visual.class_embedding": None}, "CLIP's ResNets are not supported"),
        ({"transformer.resblocks.3.ln_1.weight": (20,)}, "is not used"),
        ({"ln_final.bias": None}, "ln_final.bias is missing"),
    ],
)
def test_what_is_refused(tmp_path, changes, words):
    params = dict(golden()[0])
    for name, shape in changes.items():
        if shape is None:
            del params[name]
        else:
            params[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=words) as caught:
        converted(tmp_path, params, *(HEADS if changes else ()))
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


def test_settings_are_completed_as_transformers_does():
    """Old files say again in *_config_dict what wins, with its defaults."""
    given = {"model_type": "clip", "text_config": {"eos_token_id": 2}, "vision_config": {}}
    found = clip.huggingface_settings(given)
    assert found["text"]["eos_token_id"] == 2 and found["text"]["num_attention_heads"] == 8
    assert found["image"]["num_attention_heads"] == 12
    again = clip.huggingface_settings(given | {"text_config_dict": {"hidden_act": "gelu"}})
    assert again["text"]["eos_token_id"] == 49_407 and again["text"]["hidden_act"] == "gelu"


def test_no_model_of_transformers(tmp_path):
    params, _ = golden()
    out, _ = converted(tmp_path, params, *HEADS)
    config = bivl.load(out).config
    config.model.input_norm = False
    with pytest.raises(UserError, match="CLIP has input_norm=True; the image tower here has False"):
        clip.EXPORTS["huggingface"][0](config, {}, export.Origin())
    config.contrast.width = 0
    with pytest.raises(UserError, match="has projections; this model has none"):
        clip.EXPORTS["huggingface"][0](config, {}, export.Origin())
