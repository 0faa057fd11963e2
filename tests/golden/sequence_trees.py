"""The recorded parameters of data2vec on text and audio, renamed to this project's trees.

`TREES[name](get)`: `get(parameter)` gives an array by its fairseq name; the result is shaped like
the params of `Data2Vec` or `Data2Vec2`. PyTorch's Linear is [out, in], a convolution [out, in, k].
"""

from golden.data2vec_vision import stack

DEPTH, HEADS, EXTRACTOR, POSITIONS, DECODER = 3, 4, 7, 5, 3  # as recorded
TEXT, AUDIO = "modality_encoders.TEXT", "modality_encoders.AUDIO"


def linear(get, name):
    return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}


def norm(get, name):
    return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}


def convolution(get, name):
    return {"kernel": get(f"{name}.weight").transpose(2, 1, 0), "bias": get(f"{name}.bias")}


def attention(qkv: dict, out: dict, heads: int):
    """From linear maps: `qkv` [D, 3 D] with the columns of q, k, v one after another; `out`."""
    width = len(qkv["kernel"])
    biases = qkv["bias"].reshape(3, heads, -1)
    return {
        "qkv": {"kernel": qkv["kernel"].reshape(width, 3, heads, -1)},
        "out": out | {"kernel": out["kernel"].reshape(heads, -1, width)},
    } | {f"{part}_bias": {"value": bias} for part, bias in zip("qkv", biases, strict=True)}


def layer(get, name: str, heads: int):
    """A layer of 1.0: q, k and v apart."""
    maps = [linear(get, f"{name}.self_attn.{part}_proj") for part in "qkv"]
    qkv = stack(maps)
    qkv = {"kernel": qkv["kernel"].swapaxes(0, 1).reshape(len(qkv["kernel"][0]), -1)} | {
        "bias": qkv["bias"].reshape(-1)
    }
    return {
        "attention": attention(qkv, linear(get, f"{name}.self_attn.out_proj"), heads),
        "norm1": norm(get, f"{name}.self_attn_layer_norm"),
        "mlp": {part: linear(get, f"{name}.{part}") for part in ("fc1", "fc2")},
        "norm2": norm(get, f"{name}.final_layer_norm"),
    }


def block(get, name: str, heads: int):
    """A block of 2.0: one qkv matrix."""
    out = linear(get, f"{name}.attn.proj")
    return {
        "attention": attention(linear(get, f"{name}.attn.qkv"), out, heads),
        "norm1": norm(get, f"{name}.norm1"),
        "mlp": {part: linear(get, f"{name}.mlp.{part}") for part in ("fc1", "fc2")},
        "norm2": norm(get, f"{name}.norm2"),
    }


def words(get, name: str):
    return {
        "tokens": {"table": get(f"{name}.embed_tokens.weight")},
        "positions": {"value": get(f"{name}.embed_positions.weight")},
        "norm": norm(get, f"{name}.layernorm_embedding"),
    }


def extractor(get, name: str, number: int = EXTRACTOR):
    kernels = [get(f"{name}.{i}.0.weight").transpose(2, 1, 0) for i in range(number)]
    tree = {f"conv{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    return tree | {f"norm{i}": norm(get, f"{name}.{i}.2.1") for i in range(number)}


def convolutions(get, names):
    return {f"conv{i}": convolution(get, name) for i, name in enumerate(names)}


def decoder(get, name: str):
    return convolutions(get, [f"{name}.blocks.{i}.0" for i in range(DECODER)])


def text(get, depth: int = DEPTH, heads: int = HEADS):
    """data2vec 1.0."""
    sentences, head = "encoder.sentence_encoder", "encoder.regression_head"
    layers = [layer(get, f"{sentences}.layers.{i}", heads) for i in range(depth)]
    return {
        "embed": words(get, sentences),
        "trunk": {"blocks": stack(layers)},
        "head": {"fc": linear(get, f"{head}.0"), "projection": linear(get, f"{head}.2")},
    }


def audio(get, depth: int = DEPTH, heads: int = HEADS, read: int = EXTRACTOR, at: int = POSITIONS):
    """data2vec 1.0; `read` and `at` convolutions of the extractor and of the positions."""
    layers = [layer(get, f"encoder.layers.{i}", heads) for i in range(depth)]
    return {
        "embed": {
            "extractor": extractor(get, "feature_extractor.conv_layers", read),
            "norm": norm(get, "layer_norm"),
            "projection": linear(get, "post_extract_proj"),
            "fill": {"value": get("mask_emb")},
            "positions": convolutions(get, [f"encoder.pos_conv.{i}.0" for i in range(at)]),
        },
        "trunk": {"input_norm": norm(get, "encoder.layer_norm"), "blocks": stack(layers)},
        "head": {"projection": linear(get, "final_proj")},
    }


def text2(get):
    """data2vec 2.0."""
    ends = {"fc": f"{TEXT}.decoder.proj.0", "projection": f"{TEXT}.decoder.proj.2"}
    return {
        "embed": words(get, f"{TEXT}.local_encoder"),
        "trunk": {"blocks": stack([block(get, f"blocks.{i}", HEADS) for i in range(DEPTH)])},
        "decoder": decoder(get, f"{TEXT}.decoder")
        | {name: linear(get, end) for name, end in ends.items()},
    }


def audio2(get):
    """data2vec 2.0; fairseq counts position convolutions from 1."""
    places = [f"{AUDIO}.relative_positional_encoder.{i + 1}.0" for i in range(POSITIONS)]
    return {
        "embed": {
            "extractor": extractor(get, f"{AUDIO}.local_encoder.conv_layers"),
            "norm": norm(get, f"{AUDIO}.project_features.1"),
            "projection": linear(get, f"{AUDIO}.project_features.2"),
            "positions": convolutions(get, places),
            "bias": {"scale": {"value": get(f"{AUDIO}.alibi_scale").reshape(-1)}},
        },
        "trunk": {
            "input_norm": norm(get, f"{AUDIO}.context_encoder.norm"),
            "blocks": stack([block(get, f"blocks.{i}", HEADS) for i in range(DEPTH)]),
        },
        "decoder": decoder(get, f"{AUDIO}.decoder")
        | {"projection": linear(get, f"{AUDIO}.decoder.proj")},
    }


TREES = {
    "data2vec_text": text,
    "data2vec_audio": audio,
    "data2vec2_text": text2,
    "data2vec2_audio": audio2,
}
