"""transformers' Beit with random weights, written, converted and loaded; and back again."""

import json

import jax
import numpy as np
import pytest

import bivl
from bivl import convert
from bivl.core.errors import UserError
from conversions import close, give_back, reloaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.live

ODD = {"image_size": 35, "patch_size": 7, "hidden_size": 45, "num_hidden_layers": 2}
ODD |= {"num_attention_heads": 3, "intermediate_size": 70, "attn_implementation": "eager"}
SMALL = ODD | {"image_size": 12, "patch_size": 6, "hidden_size": 16, "num_attention_heads": 1}
SHARED = {"use_shared_relative_position_bias": True, "layer_norm_eps": 1e-6}
OWN = {"use_relative_position_bias": True, "use_mask_token": True}
CASES = {  # class, what differs from the defaults
    "pretrained": (
        "ForMaskedImageModeling",
        ODD | SHARED | {"use_mask_token": True, "vocab_size": 40},
    ),
    "own_tables": ("ForMaskedImageModeling", SMALL | OWN | {"vocab_size": 23}),
    "bare": ("Model", ODD | SHARED | {"use_mean_pooling": False, "use_mask_token": True}),
    "default": ("Model", SMALL | {"num_hidden_layers": 5}),
    "classes": ("ForImageClassification", ODD | OWN | {"num_labels": 5}),
    "first": ("ForImageClassification", SMALL | SHARED | {"use_mean_pooling": False}),
    "segments": (
        "ForSemanticSegmentation",
        ODD | OWN | {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "num_labels": 6},
    ),
}


def written(name, folder):
    """Every parameter is drawn, those that begin as zeros or ones too."""
    ending, settings = CASES[name]
    config = transformers.BeitConfig(**settings)
    model = getattr(transformers, f"Beit{ending}")(config).eval()
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            if "norm" in key and key.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.ndim < 2 or "table" in key or "token" in key:
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    model.save_pretrained(folder)
    return model


def run(model, images):
    """(hidden states, last hidden state, pooled or None, output of the head or None)."""
    pixels = torch.as_tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        body = model.base_model(pixels, output_hidden_states=True)
        head = None if model is model.base_model else model(pixels).logits
    return body.hidden_states, body.last_hidden_state, body.pooler_output, head


def images(model):
    side = model.config.image_size
    return np.random.default_rng(5).standard_normal((2, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_converted_equals_transformers(name, tmp_path):
    model = written(name, tmp_path / "theirs")
    convert.main([f"--source={tmp_path}/theirs", f"--out={tmp_path}/ours"])
    loaded, batch = bivl.load(tmp_path / "ours"), {"image": images(model)}
    layers, last, _, head = run(model, batch["image"])
    got = loaded.encode(batch, layers=True)
    for ours, theirs in zip(got["layers"], layers, strict=True):
        close(ours, theirs)
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert report["family"] == "beit" and not report["missing"] and not report["unused"]
    if CASES[name][0] == "ForMaskedImageModeling":
        with torch.no_grad():
            last = model.layernorm(last)
        params = loaded.params["lm_head"]
        tokens = np.asarray(got["tokens"])[:, 1:]
        close(tokens @ np.asarray(params["kernel"]) + np.asarray(params["bias"]), head)
    close(got["tokens"], last)
    if name in ("classes", "first"):
        close(loaded.predict["logits"](batch), head)
    assert jax.tree.leaves(loaded.params)


@pytest.mark.parametrize("name", CASES)
def test_and_back_equals_what_there_was(name, tmp_path):
    """Tensor by tensor, heads of no use here included; and the same outputs."""
    model = written(name, tmp_path / "theirs")
    convert.main([f"--source={tmp_path}/theirs", f"--out={tmp_path}/ours"])
    give_back(tmp_path)
    again = reloaded(model, tmp_path / "back", attn_implementation="eager")
    given = images(model)
    for ours, theirs in zip(run(again, given)[1:], run(model, given)[1:], strict=True):
        if theirs is not None:
            close(ours, theirs)


def test_the_preprocessor_comes_along(tmp_path):
    written("classes", tmp_path / "theirs")
    views = {"do_center_crop": False, "size": {"height": 35, "width": 35}}
    processor = transformers.BeitImageProcessor(**views, image_mean=[0.4, 0.5, 0.6])
    processor.save_pretrained(tmp_path / "theirs")
    convert.main([f"--source={tmp_path}/theirs", f"--out={tmp_path}/ours"])
    loaded = bivl.load(tmp_path / "ours")
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3)).astype(np.uint8)
    wanted = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    got = loaded.preprocess(image=[image])["image"]
    assert np.abs(got - wanted).max() < 2.5 / 127.5  # whole steps of eight bits, after resizing


def test_two_norms_are_refused(tmp_path):
    _, settings = CASES["pretrained"]
    config = transformers.BeitConfig(**settings | {"use_mean_pooling": False})
    transformers.BeitForMaskedImageModeling(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="both beit.layernorm.weight and layernorm.weight"):
        convert.main([f"--source={tmp_path}/theirs", f"--out={tmp_path}/ours"])
