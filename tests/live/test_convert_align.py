"""transformers' ALIGN with random weights, written, converted and loaded; and back again."""

import numpy as np
import pytest

from bivl import convert
from conversions import close, converted, give_back, reloaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.live

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "photo", "of", "cat", "##s"]
WORDS += [",", "e", "##e", "!"]
IMAGE = {
    "image_size": 67,
    "width_coefficient": 0.7,
    "depth_coefficient": 1.3,
    "depth_divisor": 4,
    "kernel_sizes": [3, 5, 3, 5],
    "in_channels": [32, 16, 22, 40],
    "out_channels": [16, 22, 40, 64],
    "depthwise_padding": [2],
    "strides": [1, 2, 2, 1],
    "num_block_repeats": [1, 2, 1, 1],
    "expand_ratios": [1, 6, 3, 2],
    "squeeze_expansion_ratio": 0.3,
    "hidden_dim": 44,
}
ODD = IMAGE | {"image_size": 50, "depthwise_padding": [], "strides": [2, 1, 2, 2]}
ODD |= {"batch_norm_eps": 0.02, "hidden_act": "silu"}
SPACE = 44  # 0.7 * 64 in multiples of 4
TEXT = {"vocab_size": 17, "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 3, "max_position_embeddings": 13}
DEEP = TEXT | {"num_hidden_layers": 6, "type_vocab_size": 1, "layer_norm_eps": 1e-3}
CASES = {  # class, image tower, text tower
    "whole": ("Model", IMAGE, TEXT),
    "odd": ("Model", ODD, DEEP),
    "image": ("VisionModel", ODD, None),
    "text": ("TextModel", None, TEXT),
}
STRINGS = ["A photo of the cats!", "", "the, CAFÉ é xyz", "a " * 30]


def random_model(name):
    """Statistics of batch norms are random too."""
    ending, image, text = CASES[name]
    if image and text:
        parts = {"vision_config": image, "text_config": text}
        config = transformers.AlignConfig(**parts, projection_dim=SPACE)
    else:
        kind = transformers.AlignVisionConfig if image else transformers.AlignTextConfig
        config = kind(**(image or text))
    model = getattr(transformers, f"Align{ending}")(config).eval()
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            if "num_batches" in key:
                value.fill_(int(rng.integers(1, 2**40)))
            elif key == "temperature":
                value.fill_(0.3)
            elif "running_var" in key:
                value.copy_(noise.exp())
            elif value.ndim == 1 and key.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.ndim < 2 or "embed" in key and "conv" not in key:
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    return model


def their_files(folder, kind=None):
    """The tokenizer, as it is saved now or was before, and the published preprocessor's rules."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join((*WORDS, "")), "utf-8")
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    if kind == "new":
        (folder / "vocab.txt").unlink()
        tokenizer.save_pretrained(folder)
    size = {side: 80 for side in ("height", "width")}
    options = {"do_center_crop": True, "rescale_factor": 1 / 127.5, "rescale_offset": True}
    options |= {"do_normalize": False, "include_top": False, "resample": 2}
    options |= {"size": size, "crop_size": {side: 67 for side in size}}
    transformers.EfficientNetImageProcessor(**options).save_pretrained(folder)
    return tokenizer


def flat(maps):
    """[B, D, h, w] -> [B, h w, D]."""
    return maps.flatten(2).transpose(1, 2)


def assert_image(model, loaded):
    tower = getattr(model, "vision_model", model)
    side = tower.config.image_size
    images = np.random.default_rng(5).standard_normal((2, side, side, 3)).astype(np.float32)
    pixels = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True)
    got = loaded.encode({"image": images}, layers=True)
    blocks = len(tower.encoder.blocks)
    for ours, theirs in zip(got["layers"][-blocks:], wanted.hidden_states[-blocks:], strict=True):
        close(ours, flat(theirs))
    close(got["tokens"], flat(wanted.last_hidden_state))
    close(got["pooled"], wanted.pooler_output)
    return {"image": images}, {"pixel_values": pixels}


def assert_text(model, loaded, tokenizer):
    tower = getattr(model, "text_model", model)
    options = {"padding": True, "truncation": True, "max_length": 13, "return_tensors": "pt"}
    given = tokenizer(STRINGS, **options)
    batch = loaded.preprocess(text=STRINGS)
    np.testing.assert_array_equal(batch["tokens"], given["input_ids"].numpy())
    np.testing.assert_array_equal(batch["padding"], given["attention_mask"].numpy() == 0)
    with torch.no_grad():
        wanted = tower(**given, output_hidden_states=True)
    got = loaded.encode(batch, layers=True)
    for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
        close(ours, theirs)
    close(got["tokens"], wanted.last_hidden_state)
    close(got["pooled"], wanted.last_hidden_state[:, 0])
    return batch, dict(given)


def assert_both(model, loaded, ours, theirs):
    with torch.no_grad():
        wanted = model(**theirs)
    close(loaded.predict["logits"](ours), wanted.logits_per_image)
    for name in ("image", "text"):
        close(loaded.predict[f"{name}_embeddings"](ours), wanted[f"{name}_embeds"])
    bare = {name: x for name, x in ours.items() if name != "padding"}
    close(loaded.predict["text_embeddings"](bare), wanted["text_embeds"])  # the ids tell pads


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    """The same tokens, layers, pooled, vectors and logits; then the same file, tensor by tensor."""
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    if CASES[name][2]:
        tokenizer = their_files(tmp_path / "theirs", "new" if name == "text" else None)
        if name == "odd":
            (tmp_path / "theirs" / "preprocessor_config.json").unlink()
    loaded, ours, theirs = converted("align", tmp_path), {}, {}
    towers = loaded.config.model.towers
    if "image" in towers:
        batch, given = assert_image(model, loaded)
        ours, theirs = ours | batch, theirs | given
    if "text" in towers:
        batch, given = assert_text(model, loaded, tokenizer)
        ours, theirs = ours | batch, theirs | given
    if len(towers) == 2:
        assert_both(model, loaded, ours, theirs)
    give_back(tmp_path)
    reloaded(model, tmp_path / "back")


def assert_seen_alike(loaded, folder):
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    processor = transformers.EfficientNetImageProcessor.from_pretrained(folder)
    seen = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = loaded.preprocess(image=[picture])["image"][0]
    assert seen.shape == ours.shape == (67, 67, 3)
    assert np.abs(seen - ours).max() < 0.02


def test_a_trained_model_becomes_transformers(tmp_path):
    """Not one that came from there: the tokenizer and what images become come along."""
    model = random_model("whole")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = their_files(tmp_path / "theirs")
    loaded = converted("align", tmp_path)
    assert_seen_alike(loaded, tmp_path / "theirs")
    (tmp_path / "ours" / "conversion.json").unlink()
    for file in (tmp_path / "ours" / "source").glob("*config.json"):
        file.unlink()
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=huggingface"])
    again = reloaded(model, tmp_path / "back")
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path / "back")
    assert theirs(STRINGS)["input_ids"] == tokenizer(STRINGS)["input_ids"]
    assert_seen_alike(loaded, tmp_path / "back")
    batch, given = assert_text(again, loaded, tokenizer)
    images, pixels = assert_image(again, loaded)
    assert_both(again, loaded, batch | images, given | pixels)
