"""The recorded data2vec vision numbers, with parameters renamed to this project's tree."""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("data2vec_vision.npz")


def load() -> dict[str, np.ndarray]:
    """Every recorded array by its key (see README.md beside this file)."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return dict(arrays)


def tree(get, depth: int = 3, heads: int = 2) -> dict:
    """`get(name)` gives an array by its BEiT name; the result is a tree like Data2Vec's params.

    PyTorch's Linear is [out, in], its convolution [out, in, row, column].
    """

    def linear(name):
        return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

    def norm(name):
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    def block(i):
        name = f"blocks.{i}"
        qkv = get(f"{name}.attn.qkv.weight").T
        width = qkv.shape[0]
        head = width // heads
        out = linear(f"{name}.attn.proj")
        return {
            "attention": {
                "qkv": {"kernel": qkv.reshape(width, 3, heads, head)},
                "q_bias": {"value": get(f"{name}.attn.q_bias").reshape(heads, head)},
                "v_bias": {"value": get(f"{name}.attn.v_bias").reshape(heads, head)},
                "out": {"kernel": out["kernel"].reshape(heads, head, width), "bias": out["bias"]},
            },
            "norm1": norm(f"{name}.norm1"),
            "norm2": norm(f"{name}.norm2"),
            "scale1": {"value": get(f"{name}.gamma_1")},
            "scale2": {"value": get(f"{name}.gamma_2")},
            "mlp": {"fc1": linear(f"{name}.mlp.fc1"), "fc2": linear(f"{name}.mlp.fc2")},
        }

    blocks = [block(i) for i in range(depth)]
    patch = get("patch_embed.proj.weight").transpose(2, 3, 1, 0)
    return {
        "embed": {
            "patch": {"projection": {"kernel": patch, "bias": get("patch_embed.proj.bias")}},
            "cls_token": {"value": get("cls_token")},
            "mask_token": {"value": get("mask_token")},
            "relative_position": {
                "table": {"value": get("rel_pos_bias.relative_position_bias_table")}
            },
        },
        "trunk": {"blocks": stack(blocks), "norm": norm("norm")},
        "head": {"projection": linear("lm_head")},
    }


def stack(trees: list) -> dict:
    """A list of equal trees -> one tree of arrays stacked along a new first axis."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: stack([tree[key] for tree in trees]) for key in first}
    return np.stack(trees)
