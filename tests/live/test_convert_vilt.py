"""transformers' ViLT with random weights, written, converted and loaded; and back again. BERT's
tokenizer."""

import json

import numpy as np
import pytest

from bivl import convert
from bivl.data import tokenizers
from bivl.data.vocabulary import wordpiece
from conversions import close, converted, give_back, reloaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.live

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(c) for c in [*range(33, 127), 0xE9, 0xDF, 0x3B1, 0x65E5, 0x672C, 0x1F98A]]
WORDS = ["the", "cat", "ca", "photo", "un", "##aff", "##able", "naive", "naïve", "É"]
PIECES = [
    *SPECIAL,
    *LETTERS,
    *(f"##{c}" for c in LETTERS if c.isalnum()),
    *WORDS,
    "##ing",
    "\u0130",
]
SIZES = {"vocab_size": len(PIECES), "hidden_size": 45, "intermediate_size": 70}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 35, "patch_size": 7}
SIZES |= {"max_position_embeddings": 13}
SMALL = {"hidden_size": 16, "num_attention_heads": 1, "image_size": 20, "patch_size": 6}
SMALL |= {
    "qkv_bias": False,
    "layer_norm_eps": 1e-3,
    "type_vocab_size": 1,
    "hidden_act": "quick_gelu",
}
CASES = {  # class, changes
    "model": ("Model", {}),
    "words": ("ForMaskedLM", {"hidden_dropout_prob": 0.1, "pad_token_id": 0}),
    "untied": ("ForMaskedLM", SMALL),
    "deep": ("Model", SMALL | {"num_hidden_layers": 6}),
    "question": ("ForQuestionAnswering", {"num_labels": 5}),
    "retrieval": ("ForImageAndTextRetrieval", {"max_image_length": 25}),
    "two": ("ForImagesAndTextClassification", {"num_images": 2, "modality_type_vocab_size": 3}),
    "tokens": ("ForTokenClassification", {}),
}
STRINGS = [
    "a photo of the cats",
    "",
    "  Two   SPACES\tand\nlines\u2028 \r\n ",
    "It's unaffable, they'll've 'S 123 x_y!?...[MASK][CLS] ##s [unused0]",
    "ÅNGSTRÖM é é ǅ İ ß ½ ٣ ﬁ naïve 日本語 🦊👩‍🚀 \u200b\xa0\x00\ufffd",
    "the " * 40,
    "c" * 100 + " " + "c" * 101,
]


def random_model(name):
    ending, changes = CASES[name]
    config = transformers.ViltConfig(**SIZES | changes)
    model = getattr(transformers, f"Vilt{ending}")(config).eval()
    if name == "untied":
        model.mlm_score.decoder.weight = torch.nn.Parameter(torch.zeros(len(PIECES), 16))
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            if "norm" in key.lower() and key.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.ndim < 2 or "embeddings" in key or "token" in key:
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    return model


def their_tokenizer(folder, **rules):
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    found = transformers.BertTokenizer(vocab=vocabulary, model_max_length=13, **rules)
    found.save_pretrained(folder)
    return found


def given(model, tokenizer, loaded):
    """The same padded pairs for both."""
    side, patch = model.config.image_size, model.config.patch_size
    images = np.random.default_rng(5).standard_normal((len(STRINGS), side, side, 3))
    images = images.astype(np.float32)
    options = {"padding": True, "truncation": True, "max_length": 13, "return_tensors": "pt"}
    theirs = dict(tokenizer(STRINGS, split_special_tokens=True, **options))
    theirs["pixel_values"] = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    picture = np.zeros((9, 8, 3), np.uint8)
    batch = loaded.preprocess(image=[picture] * len(STRINGS), text=STRINGS)
    np.testing.assert_array_equal(batch["tokens"], theirs["input_ids"].numpy())
    np.testing.assert_array_equal(batch["padding"], theirs["attention_mask"].numpy() == 0)
    side = side // patch * patch  # of the rest neither reads a pixel
    assert batch["image"].shape == (len(STRINGS), side, side, 3)
    return batch | {"image": images[:, :side, :side]}, theirs


def assert_same_numbers(model, loaded, tokenizer, monkeypatch):
    """Tokens, layers, pooled and what names words; pads, which see the others, too.

    Where all patches are kept transformers shuffles them, which is of no consequence to it.
    """
    in_order = lambda weights, count, **_: torch.arange(count)  # noqa: E731
    monkeypatch.setattr(torch, "multinomial", in_order)
    batch, theirs = given(model, tokenizer, loaded)
    base = getattr(model, "vilt", model)
    with torch.no_grad():
        wanted = base(**theirs, output_hidden_states=True)
        logits = model(**theirs).logits if hasattr(model, "mlm_score") else None
    got = loaded.encode(batch, layers=True)
    for ours, layer in zip(got["layers"], wanted.hidden_states, strict=True):
        close(ours, layer)
    close(got["tokens"], wanted.last_hidden_state)
    pooled = wanted.pooler_output
    close(got["pooled"], wanted.last_hidden_state[:, 0] if pooled is None else pooled)
    length = batch["tokens"].shape[1]
    np.testing.assert_array_equal(got["padding"][:, :length], batch["padding"])
    assert not got["padding"][:, length:].any()
    if logits is not None:
        close(loaded.predict["logits"](batch), logits)
    assert ("logits" in loaded.predict) == (logits is not None)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path, monkeypatch):
    """The same numbers; then the same file, tensor by tensor, heads that are not ours included."""
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = their_tokenizer(tmp_path / "theirs")
    loaded = converted("vilt", tmp_path)
    assert loaded.config.model.tied == (name == "words")
    assert_same_numbers(model, loaded, tokenizer, monkeypatch)
    give_back(tmp_path)
    again = reloaded(model, tmp_path / "back")
    assert again.config.image_size == model.config.image_size


def test_a_trained_model_becomes_transformers(tmp_path, monkeypatch):
    """Not one that came from there: the tokenizer and what images become come along."""
    model = random_model("untied")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = their_tokenizer(tmp_path / "theirs", do_lower_case=False)
    loaded = converted("vilt", tmp_path)
    (tmp_path / "ours" / "conversion.json").unlink()
    for file in (tmp_path / "ours" / "source").glob("*config.json"):
        file.unlink()
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=huggingface"])
    again = transformers.ViltForMaskedLM.from_pretrained(tmp_path / "back").eval()
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path / "back")
    assert theirs(STRINGS)["input_ids"] == tokenizer(STRINGS)["input_ids"]
    again.config.image_size = 20  # whose rest at the edge is not read, so ours has 18
    assert_same_numbers(again, loaded, tokenizer, monkeypatch)
    settings = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    processor = transformers.ViltImageProcessor(**settings)
    picture = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    seen = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = loaded.preprocess(image=[picture], text=["a"])["image"][0]
    assert seen.shape == ours.shape and np.abs(seen - ours).mean() < 0.02


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    "rules",
    [{}, {"do_lower_case": False}, {"strip_accents": False, "tokenize_chinese_chars": False}],
    ids=["uncased", "cased", "accents"],
)
def test_tokenizers_are_the_same(layout, rules, tmp_path):
    """In both layouts, on random text too."""
    theirs, path = their_tokenizer(tmp_path / "theirs", **rules), tmp_path / "theirs"
    if layout == "vocab.txt":
        path = tmp_path / "plain"
        path.mkdir()
        (path / layout).write_text("\n".join((*PIECES, "")), "utf-8")
        settings = {"do_lower_case": True, "mask_token": {"content": "[MASK]"}} | rules
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizers.load({"kind": "wordpiece", "path": str(path)})
    assert (ours.size, *ours.special) == (len(PIECES), 3, 0, 4, 2, 5)
    assert wordpiece.pieces(ours.data) == PIECES
    rng = np.random.default_rng(0)
    points = [*range(32, 127), *range(0xA0, 0x2FF), 0x300, 0x65E5, 0x672C, 0x3400, 0x1F98A, 0]
    texts = STRINGS + ["".join(map(chr, rng.choice(points, 30))) for _ in range(200)]
    wanted = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, one, two in zip(texts, ours.encode_all(texts), wanted, strict=True):
        assert one.tolist() == two, text
        assert ours.decode(one) == theirs.decode([i for i in two if i != ours.unk])
