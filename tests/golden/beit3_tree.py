"""BEiT-3's parameters, by the names of its checkpoints, as this project's tree; and its calls."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bivl.modalities import image_text
from bivl.models.image_text import HeadsConfig
from bivl.models.multiway import MultiwayConfig
from bivl.objectives.streams import ImageText
from golden.data2vec_vision import stack
from golden.sequence_trees import attention, linear, norm

FILE = Path(__file__).with_name("beit3.npz")
SIDES = {"image": "A", "text": "B"}
PAD = 1
CLOSE = 2e-5  # of float32 to the recorded float64


def load() -> dict[str, np.ndarray]:
    """Every recorded array by its key, as `record_beit3.py` lists them."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return dict(arrays)


def block(get, name: str, side: str, heads: int) -> dict:
    """Parameters of one layer for the tokens of one side, A or B."""
    maps = stack([linear(get, f"{name}.self_attn.{part}_proj.{side}") for part in "qkv"])
    width = maps["kernel"].shape[1]
    qkv = {"kernel": maps["kernel"].swapaxes(0, 1).reshape(width, -1)}
    qkv["bias"] = maps["bias"].reshape(-1)
    ours = attention(qkv, linear(get, f"{name}.self_attn.out_proj.{side}"), heads)
    ours["norm"] = norm(get, f"{name}.self_attn.inner_attn_ln.{side}")
    mlp = {part: linear(get, f"{name}.ffn.{side}.{part}") for part in ("fc1", "fc2")}
    mlp["norm"] = norm(get, f"{name}.ffn.{side}.ffn_layernorm")
    return {
        "norm1": norm(get, f"{name}.self_attn_layer_norm.{side}"),
        "attention": ours,
        "norm2": norm(get, f"{name}.final_layer_norm.{side}"),
        "mlp": mlp,
    }


def tree(get, depth: int, heads: int) -> dict:
    """`get(name)` gives an array by its name behind `beit3.`; the result is ImageText's params."""
    kernel = get("vision_embed.proj.weight").transpose(2, 3, 1, 0)
    embed = {
        "patch": {"projection": {"kernel": kernel, "bias": get("vision_embed.proj.bias")}},
        "words": {"table": get("text_embed.weight")},
    }
    for name in ("cls_token", "mask_token"):
        embed[name] = {"value": get(f"vision_embed.{name}")}
    trunk = {}
    for name, side in SIDES.items():
        embed[f"{name}_positions"] = {"value": get(f"encoder.embed_positions.{side}.weight")}
        layers = [block(get, f"encoder.layers.{i}", side, heads) for i in range(depth)]
        trunk |= {f"{name}_blocks": stack(layers)}
        trunk |= {f"{name}_norm": norm(get, f"encoder.layer_norm.{side}")}
    return {"embed": embed, "trunk": trunk}


def model(width, depth, num_heads, mlp_dim, image_size, patch_size, vocabulary) -> ImageText:
    """Ours of these sizes, without heads, as the released models are."""
    grid = (image_size // patch_size,) * 2
    sizes = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}
    encoder = MultiwayConfig(**sizes, norm="sub", eps=1e-5, qkv_bias="qkv", init="scratch")
    half = (0.5, 0.5, 0.5)
    options = (width, vocabulary, 1024, PAD, True, "scratch", half, half, "float32")
    embed = image_text.Embed(grid, patch_size, *options)
    return ImageText(embed, encoder, HeadsConfig(), grid)


def call(model, params, image=None, tokens=None, masked=None, blocked=None):
    """-> ([depth + 1, B, L, D], tokens [B, L, D], valid bool [B, L]) of a call by the names of the
    recording: `masked` bool [B, N], `blocked` bool [L, L]."""
    batch = {"image": image, "tokens": tokens, "inputs": tokens, "mask": masked}
    if blocked is not None:
        batch["attention_bias"] = -1e8 * jnp.asarray(blocked, jnp.float32)
    batch = {name: jnp.asarray(x) for name, x in batch.items() if x is not None}
    options = {"collect": ("layers",), "method": "encode"}
    layout, out = model.apply({"params": params}, batch, masked is not None, **options)
    valid = jnp.ones(out.tokens.shape[:2], bool)
    if layout.padding is not None:
        valid &= ~layout.padding
    return jnp.stack(out.layers), out.tokens, valid
