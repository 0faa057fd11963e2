"""transformers' CLIP with random weights, written, converted and loaded; and back again. OpenAI's
as TorchScript archives."""

import sys
from pathlib import Path

import numpy as np
import pytest

from bivl import convert
from bivl.data import tokenizers
from bivl.data.vocabulary import clip as vocabulary
from conversions import close, converted, give_back, reloaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "golden"))
pytestmark = pytest.mark.live

MERGES = [("t", "h"), ("th", "e</w>"), ("i", "n"), ("a", "n"), ("an", "d</w>"), ("Ã", "©</w>")]
WORDS = 512 + len(MERGES) + 2
IMAGE = {"hidden_size": 45, "intermediate_size": 70, "num_hidden_layers": 2}
IMAGE |= {"num_attention_heads": 3, "image_size": 35, "patch_size": 7, "projection_dim": 11}
TEXT = {"vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 13, "projection_dim": 11}
TEXT |= {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1}
SMALL = IMAGE | {"image_size": 12, "patch_size": 6, "hidden_size": 16, "num_attention_heads": 1}
GELU = {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
CASES = {  # class, image tower, text tower
    "whole": ("Model", IMAGE, TEXT),
    "old": ("Model", SMALL, TEXT | GELU | {"eos_token_id": 2, "num_hidden_layers": 6}),
    "image": ("VisionModel", SMALL | GELU, None),
    "image_projected": ("VisionModelWithProjection", IMAGE, None),
    "text": ("TextModel", None, TEXT),
    "text_projected": ("TextModelWithProjection", None, TEXT | {"num_attention_heads": 4}),
    "classes": ("ForImageClassification", SMALL, TEXT),
}
STRINGS = [
    "a photo of the cat",
    "",
    "  Two   SPACES\tand\nlines  ",
    "It's the cat's, they'll've 'S 123 x_y!?...<|endoftext|></w>",
    "ÅNGSTRÖM é é ǅ İ ß ½ ٣ ﬁ naïve 日本語 🦊👩‍🚀 \u200b\xa0\x00",
    "the " * 40,
]


def random_model(name):
    ending, image, text = CASES[name]
    if image and text:
        parts = {"vision_config": image, "text_config": text}
        config = transformers.CLIPConfig(**parts, projection_dim=11)
    else:
        kind = transformers.CLIPVisionConfig if image else transformers.CLIPTextConfig
        config = kind(**(image or text))
    model = getattr(transformers, f"CLIP{ending}")(config).eval()
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            if "norm" in key and key.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.ndim < 2 or "embed" in key:
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    return model


def their_tokenizer(folder):
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in MERGES)])
    pieces, merges = vocabulary.parse((vocabulary.OPENAI,), (text.encode(),))
    found = transformers.CLIPTokenizer(vocab=pieces, merges=merges)
    found.save_pretrained(folder)
    return found


def assert_image(model, loaded):
    """Their last hidden state is before the last norm, which they apply to the first token."""
    tower = getattr(model, "vision_model", model)
    side = tower.config.image_size
    images = np.random.default_rng(5).standard_normal((2, side, side, 3)).astype(np.float32)
    pixels = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True)
        tokens = tower.post_layernorm(wanted.last_hidden_state)
    got = loaded.encode({"image": images}, layers=True)
    for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
        close(ours, theirs)
    close(got["layers"][-1], wanted.last_hidden_state)
    close(got["tokens"], tokens)
    close(got["pooled"], wanted.pooler_output)
    return {"image": images}, {"pixel_values": pixels}


def assert_text(model, loaded, tokenizer):
    tower = getattr(model, "text_model", model)
    options = {"padding": True, "truncation": True, "max_length": 13, "return_tensors": "pt"}
    given = tokenizer(STRINGS, split_special_tokens=True, **options)
    batch = loaded.preprocess(text=STRINGS)
    np.testing.assert_array_equal(batch["tokens"], given["input_ids"].numpy())
    np.testing.assert_array_equal(batch["padding"], given["attention_mask"].numpy() == 0)
    with torch.no_grad():
        wanted = tower(**given, output_hidden_states=True)
    got = loaded.encode(batch, layers=True)
    for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
        close(ours, theirs)
    close(got["tokens"], wanted.last_hidden_state)
    close(got["pooled"], wanted.pooler_output)
    return batch, dict(given)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    """The same tokens, layers, pooled, vectors and logits; then the same file, tensor by tensor."""
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = their_tokenizer(tmp_path / "theirs") if CASES[name][2] else None
    loaded, ours, theirs = converted("clip", tmp_path), {}, {}
    towers = loaded.config.model.towers
    for kind, check in (("image", assert_image), ("text", assert_text)):
        if kind in towers:
            batch, given = check(model, loaded, *([tokenizer] if kind == "text" else []))
            ours, theirs = ours | batch, theirs | given
    if len(towers) == 2:
        with torch.no_grad():
            wanted = model(**theirs)
        close(loaded.predict["logits"](ours), wanted.logits_per_image)
        close(loaded.predict["image_embeddings"](ours), wanted.image_embeds)
        close(loaded.predict["text_embeddings"](ours), wanted.text_embeds)
    elif "projected" in name:
        with torch.no_grad():
            wanted = model(**theirs)[f"{towers[0]}_embeds"]
        close(loaded.embed(ours), wanted / wanted.norm(dim=-1, keepdim=True))
    give_back(tmp_path)
    reloaded(model, tmp_path / "back")


def test_a_trained_model_becomes_transformers(tmp_path):
    """Not one that came from there: the tokenizer and what images become come along."""
    model = random_model("whole")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = their_tokenizer(tmp_path / "theirs")
    loaded = converted("clip", tmp_path)
    (tmp_path / "ours" / "conversion.json").unlink()
    for file in (tmp_path / "ours" / "source").glob("*config.json"):
        file.unlink()
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=huggingface"])
    again = transformers.CLIPModel.from_pretrained(tmp_path / "back").eval()
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "back")
    assert theirs(STRINGS)["input_ids"] == tokenizer(STRINGS)["input_ids"]
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "back")
    seen = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = loaded.preprocess(image=[picture])["image"][0]
    assert seen.shape == ours.shape and np.abs(seen - ours).mean() < 0.02
    assert_text(again, loaded, tokenizer)
    assert_image(again, loaded)


@pytest.mark.parametrize("layout", ["gz", "vocab.json", "tokenizer.json"])
def test_tokenizers_are_the_same(layout, tmp_path):
    """In all three layouts, on random text too."""
    theirs = their_tokenizer(tmp_path / "theirs")
    path = tmp_path / "theirs"
    if layout == "vocab.json":
        path = tmp_path / "plain"
        path.mkdir()
        theirs.backend_tokenizer.model.save(str(path))
    if layout == "gz":
        import gzip

        path = tmp_path / f"{vocabulary.OPENAI}.gz"
        text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in MERGES)])
        path.write_bytes(gzip.compress(text.encode()))
    ours = tokenizers.load({"kind": "clip", "path": str(path)})
    assert (ours.size, ours.bos, ours.eos) == (WORDS, WORDS - 2, WORDS - 1)
    rng = np.random.default_rng(0)
    points = [rng.choice([*range(32, 127), *range(0xA0, 0x2FF), 0x1F98A], 30) for _ in range(200)]
    texts = STRINGS + ["".join(map(chr, row)) for row in points]
    wanted = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    got = ours.encode_all(texts)
    for text, one, two in zip(texts, got, wanted, strict=True):
        assert one.tolist() == two, text
        if "</w>" not in text:
            assert ours.decode(one) == theirs.decode(two)


def test_openai_s_archive(tmp_path):
    """A TorchScript archive in half precision, with the sizes that its makers left in it."""
    import torch_clip as reference

    class Archive(reference.CLIP):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for name, value in (
                ("input_resolution", 12),
                ("context_length", 9),
                ("vocab_size", 40),
            ):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, images: torch.Tensor, ids: torch.Tensor):
            return self.visual(images)[2], self.texts(ids)[2]

    torch.manual_seed(0)
    model = Archive((12, 4, 64, 1, 40, 2), 40, 9, 128, 2, 30, 3, 6).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_((value + 0.1 * torch.randn_like(value)).half().float())
    images, ids = torch.randn(2, 3, 12, 12), torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        wanted = [x / x.norm(dim=-1, keepdim=True) for x in model(images, ids)]
    traced = torch.jit.trace(model, (images, ids), check_trace=False)
    traced.half().save(str(tmp_path / "theirs"))
    loaded = converted("clip", tmp_path)
    close(loaded.embed({"image": images.permute(0, 2, 3, 1).numpy()}), wanted[0])
    close(loaded.embed({"tokens": ids.numpy().astype(np.int32)}), wanted[1])
    assert loaded.config.model.text.num_heads == 2 and loaded.config.model.num_heads == 1
