"""The recorded numbers of VQ-KD and BEiT v2, with parameters renamed to this project's trees."""

from pathlib import Path

import numpy as np

from golden.data2vec_vision import stack

FILE = Path(__file__).with_name("vqkd.npz")
HEADS = 2


def load() -> dict[str, np.ndarray]:
    """Every recorded array by its key, as `record_vqkd.py` lists them."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return dict(arrays)


def linear(get, name):
    return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}


def norm(get, name):
    return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}


def patch(get, name):
    kernel = get(f"{name}.weight").transpose(2, 3, 1, 0)
    return {"projection": {"kernel": kernel, "bias": get(f"{name}.bias")}}


def block(get, name, scales: bool):
    """Parameters of one block; `scales`: with layer scale."""
    qkv, out = get(f"{name}.attn.qkv.weight").T, linear(get, f"{name}.attn.proj")
    width = qkv.shape[0]
    split = (HEADS, width // HEADS)
    attention = {
        "qkv": {"kernel": qkv.reshape(width, 3, *split)},
        "out": {"kernel": out["kernel"].reshape(*split, width), "bias": out["bias"]},
    }
    for part in ("q_bias", "v_bias"):
        attention[part] = {"value": get(f"{name}.attn.{part}").reshape(split)}
    parts = {"attention": attention}
    parts |= {key: norm(get, f"{name}.{key}") for key in ("norm1", "norm2")}
    parts["mlp"] = {key: linear(get, f"{name}.mlp.{key}") for key in ("fc1", "fc2")}
    if scales:
        parts |= {f"scale{i}": {"value": get(f"{name}.gamma_{i}")} for i in (1, 2)}
    return parts


def vqkd(get) -> dict:
    """`get(name)` -> a tree like VQKD's params."""

    def model(part, depth):
        embed = {
            "patch": patch(get, f"{part}.patch_embed.proj"),
            "cls_token": {"value": get(f"{part}.cls_token")},
            "positions": {"table": {"value": get(f"{part}.pos_embed")[0]}},
        }
        blocks = stack([block(get, f"{part}.blocks.{i}", False) for i in range(depth)])
        return embed, {"blocks": blocks, "norm": norm(get, f"{part}.fc_norm")}

    def task(name):
        return {"hidden": linear(get, f"{name}.0"), "projection": linear(get, f"{name}.2")}

    (embed, trunk), (decode_embed, decode_trunk) = model("encoder", 2), model("decoder", 1)
    tree = {"embed": embed, "trunk": trunk, "encode_task": task("encode_task_layer")}
    tree |= {"decode_embed": decode_embed, "decode_trunk": decode_trunk}
    return tree | {"decode_task": task("decode_task_layer")}


def mim(get) -> dict:
    """`get(name)` -> a tree like MaskedImageModel's params."""

    def blocks(name, count):
        return {"blocks": stack([block(get, f"{name}.{i}", True) for i in range(count)])}

    embed = {
        "patch": patch(get, "patch_embed.proj"),
        "cls_token": {"value": get("cls_token")},
        "mask_token": {"value": get("mask_token")},
        "relative_position": {"table": {"value": get("rel_pos_bias.relative_position_bias_table")}},
    }
    tree = {"embed": embed, "trunk": blocks("blocks", 3), "aggregator": blocks("cls_pt_layers", 2)}
    return tree | {"norm": norm(get, "norm"), "lm_head": linear(get, "lm_head")}
