"""Records data2vec_huggingface.npz: transformers' data2vec with random weights, and what it gives.

    python tests/golden/record_data2vec_huggingface.py

Needs torch and transformers. Three models, `image` (fine-tuned: a bias table for each layer),
`text` (two types of tokens) and `audio` (with letters), computed in float64. Arrays by
`<model>/<name>`:

config           config.json
params/<key>     the parameters, multiples of 1/64 in float16
input            pixel_values [B, 3, S, S]; input_ids [B, L], padded with 1; input_values [B, T]
lengths          [B], of texts and sounds
layers           hidden_states, [depth + 1, B, L, D]
last             last_hidden_state
logits           of the head
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from record_data2vec_vision import on_grid, save

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH |= {"intermediate_size": 24, "attn_implementation": "eager"}
MODELS = {
    "image": (
        "VisionForImageClassification",
        {"image_size": 18, "patch_size": 6, "use_relative_position_bias": True}
        | {"num_labels": 3, "layer_norm_eps": 1e-6, "layer_scale_init_value": 0.1},
    ),
    "text": (
        "TextForSequenceClassification",
        {"vocab_size": 30, "max_position_embeddings": 14, "type_vocab_size": 2}
        | {"num_labels": 3, "layer_norm_eps": 1e-5},
    ),
    "audio": (
        "AudioForCTC",
        {"conv_dim": (8, 8, 8), "conv_kernel": (10, 4, 2), "conv_stride": (5, 3, 2)}
        | {"num_conv_pos_embedding_groups": 4, "conv_pos_kernel_size": 5, "vocab_size": 9},
    ),
}


@torch.no_grad()
def drawn(model, rng):
    """The model with every parameter drawn at a size that shows."""
    for name, value in model.named_parameters():
        noise = rng.standard_normal(value.shape)
        if "norm" in name.lower() and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif value.ndim < 2 or "embed" in name or "table" in name:
            noise = 0.3 * noise
        else:
            noise = noise / np.sqrt(value[0].numel())
        value.copy_(torch.as_tensor(on_grid(noise)))
    return model.double().eval()


def inputs(name, rng):
    """(the model's arguments, lengths or None)."""
    if name == "image":
        return {"pixel_values": on_grid(rng.standard_normal((2, 3, 18, 18)))}, None
    if name == "text":
        lengths = np.array([12, 7])
        tokens = np.where(np.arange(12) < lengths[:, None], rng.integers(4, 30, (2, 12)), 1)
        return {"input_ids": tokens, "attention_mask": (tokens != 1).astype(np.int64)}, lengths
    lengths = np.array([400, 310])
    real = np.arange(400) < lengths[:, None]
    sound = np.where(real, on_grid(rng.standard_normal((2, 400))), 0)
    return {"input_values": sound, "attention_mask": real.astype(np.int64)}, lengths


@torch.no_grad()
def recorded(name, ending, settings):
    """The arrays of one model."""
    rng = np.random.default_rng(len(name))
    kind = next(kind for kind in ("Vision", "Text", "Audio") if ending.startswith(kind))
    config = getattr(transformers, f"Data2Vec{kind}Config")(**WIDTH, **settings)
    model = drawn(getattr(transformers, f"Data2Vec{ending}")(config), rng)
    given, lengths = inputs(name, rng)
    tensors = {key: torch.as_tensor(value) for key, value in given.items()}
    out = model(**tensors, output_hidden_states=True)
    last = model.base_model(**tensors).last_hidden_state
    text = json.dumps(config.to_diff_dict() | {"architectures": [f"Data2Vec{ending}"]})
    arrays = {"config": np.array(text), "input": next(iter(given.values()))}
    arrays |= {} if lengths is None else {"lengths": lengths.astype(np.int32)}
    arrays |= {"layers": torch.stack(out.hidden_states), "last": last, "logits": out.logits}
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    arrays = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    params = {
        f"params/{key}": value.detach().numpy().astype(np.float16)
        for key, value in model.named_parameters()
    }
    return {f"{name}/{key}": value for key, value in (arrays | params).items()}


if __name__ == "__main__":
    found = {}
    for each, (chosen, differs) in MODELS.items():
        found |= recorded(each, chosen, differs)
    file = Path(__file__).with_name("data2vec_huggingface.npz")
    save(file, found)
    print(f"{file.name}: {len(found)} arrays, {file.stat().st_size} bytes")
