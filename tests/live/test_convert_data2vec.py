"""transformers' data2vec with random weights, written, converted and loaded; and back again."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import bivl
from bivl import convert
from bivl.data import vocabulary
from conversions import close, give_back, reloaded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.live

VOCABULARY = Path(vocabulary.__file__).parent / "small"
IMAGE = {"image_size": 35, "patch_size": 7, "hidden_size": 45, "num_hidden_layers": 2}
IMAGE |= {"num_attention_heads": 3, "intermediate_size": 70, "attn_implementation": "eager"}
SHARED = {"use_shared_relative_position_bias": True, "layer_norm_eps": 1e-6}
OWN = {"use_relative_position_bias": True, "use_mask_token": True}
SMALL = IMAGE | {"image_size": 12, "patch_size": 6, "hidden_size": 16, "num_attention_heads": 1}
IMAGES = {  # class, what differs from the defaults
    "pretrained": ("Model", IMAGE | SHARED | {"use_mask_token": True, "use_mean_pooling": False}),
    "default": ("Model", IMAGE),
    "no_scale": ("Model", SMALL | SHARED | {"layer_scale_init_value": 0.0}),
    "mean": ("ForImageClassification", IMAGE | SHARED | {"num_labels": 5}),
    "first": ("ForImageClassification", SMALL | SHARED | {"use_mean_pooling": False}),
    "tables_of_layers": ("Model", IMAGE | OWN | {"use_mean_pooling": False}),
    "tuned_tables": ("ForImageClassification", SMALL | OWN | {"num_labels": 4}),
    "segments": (
        "ForSemanticSegmentation",
        IMAGE | SHARED | {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "num_labels": 6},
    ),
}
TEXT = {"vocab_size": 2048, "max_position_embeddings": 21, "hidden_size": 24}
TEXT |= {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 50}
TEXT |= {"attn_implementation": "eager", "layer_norm_eps": 1e-5, "type_vocab_size": 1}
TEXTS = {
    "pretrained": ("Model", TEXT),
    "two_types": ("Model", TEXT | {"type_vocab_size": 2, "layer_norm_eps": 1e-12}),
    "classes": ("ForSequenceClassification", TEXT | {"num_labels": 3}),
    "number": ("ForSequenceClassification", TEXT | {"num_labels": 1, "num_attention_heads": 3}),
    "words": ("ForMaskedLM", TEXT),
    "tokens": ("ForTokenClassification", TEXT),
    "answers": ("ForQuestionAnswering", TEXT),
    "choices": ("ForMultipleChoice", TEXT),
    "no_words": ("Model", TEXT | {"vocab_size": 41}),
}
AUDIO = {"conv_dim": (12,) * 7, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
AUDIO |= {"intermediate_size": 64, "num_conv_pos_embedding_groups": 4}
AUDIO |= {"attn_implementation": "eager"}
ODD = {"conv_dim": (7, 7, 7), "conv_kernel": (9, 4, 2), "conv_stride": (4, 3, 2)}
ODD |= {"hidden_size": 45, "num_hidden_layers": 2, "num_attention_heads": 3}
ODD |= {"intermediate_size": 70, "num_conv_pos_embedding_groups": 5, "conv_pos_kernel_size": 6}
SOUNDS = {
    "pretrained": ("Model", AUDIO),
    "odd": ("Model", AUDIO | ODD | {"num_conv_pos_embeddings": 2, "mask_time_prob": 0.0}),
    "letters": ("ForCTC", AUDIO | {"vocab_size": 32}),
    "few_letters": ("ForCTC", AUDIO | ODD | {"vocab_size": 9}),
    "classes": ("ForSequenceClassification", AUDIO),
    "frames": ("ForAudioFrameClassification", AUDIO),
}
KINDS = {"Vision": IMAGES, "Text": TEXTS, "Audio": SOUNDS}
CASES = [(kind, name) for kind, cases in KINDS.items() for name in cases]


def random_model(kind, name):
    """Every parameter is drawn, those that begin as zeros or ones too."""
    ending, settings = KINDS[kind][name]
    config = getattr(transformers, f"Data2Vec{kind}Config")(**settings)
    model = getattr(transformers, f"Data2Vec{kind}{ending}")(config).eval()
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            if key.endswith("norm.weight") or "LayerNorm.weight" in key:
                value.copy_(1 + 0.3 * noise)
            elif value.ndim < 2 or "embed" in key or "table" in key or "token" in key:
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    return model


def written(kind, name, folder):
    model = random_model(kind, name)
    model.save_pretrained(folder)
    if kind == "Text" and name != "no_words":
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(VOCABULARY / file, folder)
    return model


def batches(kind, model):
    """One random batch, padded, as transformers and as we take it; which tokens count."""
    rng = np.random.default_rng(5)
    if kind == "Vision":
        side = model.config.image_size
        images = rng.standard_normal((2, side, side, 3)).astype(np.float32)
        return {"pixel_values": images.transpose(0, 3, 1, 2)}, {"image": images}, np.s_[:]
    if kind == "Text":
        tokens = rng.integers(4, model.config.vocab_size, (3, 19))
        tokens[1, 11:], tokens[2, 3:] = 1, 1
        real = tokens != 1
        given = {"input_ids": tokens, "attention_mask": real.astype(np.int64)}
        return given, {"tokens": tokens.astype(np.int32), "padding": ~real}, real
    samples = 8000 if len(model.config.conv_dim) == 7 else 701
    lengths = np.array([samples, samples * 2 // 3, samples // 2])
    padding = np.arange(samples) >= lengths[:, None]
    audio = np.where(padding, 0, rng.standard_normal(padding.shape)).astype(np.float32)
    given = {"input_values": audio, "attention_mask": (~padding).astype(np.int64)}
    return given, {"audio": audio, "padding": padding}, np.s_[:]


def run(model, given):
    """transformers' hidden states, last hidden state and output of the head, where there is one."""
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    with torch.no_grad():
        body = model.base_model(**tensors, output_hidden_states=True)
        if model is model.base_model:
            return body, None
        many = {name: value[:, None] for name, value in tensors.items()}
        multiple = type(model).__name__.endswith("MultipleChoice")
        out = model(**(many if multiple else tensors))
    return body, out.get("logits")


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_converted_equals_transformers(kind, name, tmp_path):
    model = written(kind, name, tmp_path / "theirs")
    convert.main([f"--source={tmp_path}/theirs", f"--out={tmp_path}/ours"])
    loaded = bivl.load(tmp_path / "ours")
    given, batch, real = batches(kind, model)
    wanted, logits = run(model, given)
    got = loaded.encode(batch, layers=True)
    for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
        close(ours, theirs, real)
    close(got["tokens"], wanted.last_hidden_state, real)
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert report["family"] == "data2vec" and not report["missing"] and not report["unused"]
    if "logits" in loaded.predict:
        close(loaded.predict["logits"](batch), logits)
    elif "log_probs" in loaded.predict:
        found, _ = loaded.predict["log_probs"](batch)
        close(found, torch.log_softmax(logits, -1))
    else:  # what stands on the encoder is of no use here, and said to be
        heads = {key.split(".")[0] for key in model.state_dict()} - {model.base_model_prefix}
        heads -= {"embeddings", "encoder", "layernorm", "masked_spec_embed"}
        heads -= {"feature_extractor", "feature_projection"}
        assert heads <= {row["key"].split(".")[0] for row in report["dropped"]}
    assert jax.tree.leaves(loaded.params)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_and_back_equals_what_there_was(kind, name, tmp_path):
    """Tensor by tensor, heads of no use here included; and the same outputs."""
    model = written(kind, name, tmp_path / "theirs")
    convert.main([f"--source={tmp_path}/theirs", f"--out={tmp_path}/ours"])
    give_back(tmp_path)
    again = reloaded(model, tmp_path / "back", attn_implementation="eager")
    given, _, _ = batches(kind, model)
    for ours, theirs in zip(run(again, given), run(model, given), strict=True):
        if theirs is not None:
            first = ours[0] if isinstance(ours, torch.Tensor) else ours.last_hidden_state
            wanted = theirs[0] if isinstance(theirs, torch.Tensor) else theirs.last_hidden_state
            np.testing.assert_allclose(first.numpy(), wanted.numpy(), rtol=0, atol=1e-5)
