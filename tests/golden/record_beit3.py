"""Records what the PyTorch reference of BEiT-3 computes: beit3.npz.

    python tests/golden/record_beit3.py

needs torch and numpy. Everything runs in float64 and is stored in float32. Sizes: D = 24, H = 3,
depth 3, F = 40, images of 12x12 in patches of 4x4, so N = 9; vocabulary 50 with `<s>` 0, `<pad>` 1,
`</s>` 2; B = 2 texts of 8 and 5 tokens, padded to T = 8. An array of all tokens has the 10 image
tokens (CLS, patches row by row) before the 8 of the text.

| array | shape | meaning |
|---|---|---|
| `params/<name>` | | parameters by the checkpoints' names; shapes are PyTorch's; multiples of 1/64; text positions that no text here reaches are 0 |
| `image` | [B,12,12,3] | normalised images, height x width x channels |
| `tokens`, `padding` | [B,8] | ids; 1 = padding |
| `masked` | [B,9] | 1 = the patch shows the mask token |
| `blocked` | [18,18] | captioning: 1 = the query (row) must not see the key (column) |
| `<call>/layers` | [4,B,L,D] | input of the first layer, then each layer's output |
| `<call>/tokens` | [B,L,D] | after the last norm |

Calls: `image` (L = 10), `image_masked` (with `masked`), `text` (L = 8, with `padding`), `pair` (L = 18,
with `padding`), `pair_masked` (with `padding` and `masked`), `caption` (with `padding` and `blocked`).
Outputs at padding are recorded too. They mean nothing.
"""  # noqa: E501

from pathlib import Path

import numpy as np
import torch
import torch_beit3 as reference
from record_data2vec_vision import on_grid, save

FOLDER = Path(__file__).parent
MODEL = reference.ModelConfig(
    width=24, depth=3, num_heads=3, mlp_dim=40, image_size=12, patch_size=4, vocabulary=50
)
LENGTHS = (8, 5)
READ = 12  # rows of the text's position table that are not 0


@torch.no_grad()
def randomize(model, rng):
    """Draws every parameter at a size that shows, as multiples of 1/64."""
    for name, value in model.named_parameters():
        noise = rng.standard_normal(value.shape)
        if "embed_positions" in name or "text_embed" in name or "_token" in name:
            drawn = 0.5 * noise
        elif name.endswith("bias"):
            drawn = 0.2 * noise
        elif value.ndim == 1:
            drawn = 1 + 0.3 * noise
        else:
            drawn = 1.5 * noise / np.sqrt(value[0].numel())
        value.copy_(torch.as_tensor(on_grid(drawn)))


def make_inputs(rng, config, lengths):
    """image [B, 3, S, S], tokens and padding [B, T], masked [B, N], blocked [L, L]."""
    count, longest = len(lengths), max(lengths)
    image = on_grid(rng.standard_normal((count, 3, config.image_size, config.image_size)))
    tokens = rng.integers(4, config.vocabulary, (count, longest))
    tokens[:, 0] = 0
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1], row[length:] = 2, 1
    masked = rng.random((count, config.patches)) < 0.4
    masked[:, 0], masked[:, -1] = True, False
    arrays = {"image": image, "tokens": tokens, "padding": tokens == 1, "masked": masked}
    inputs = {name: torch.as_tensor(value) for name, value in arrays.items()}
    return inputs | {"blocked": reference.caption_blocked(1 + config.patches, longest)}


CALLS = {  # which inputs the model gets
    "image": ("image",),
    "image_masked": ("image", "masked"),
    "text": ("tokens", "padding"),
    "pair": ("image", "tokens", "padding"),
    "pair_masked": ("image", "tokens", "padding", "masked"),
    "caption": ("image", "tokens", "padding", "blocked"),
}


@torch.no_grad()
def main():
    """Writes beit3.npz."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(11)
    model = reference.BEiT3(MODEL).double()
    randomize(model, rng)
    model.encoder.embed_positions["B"].weight[READ:] = 0.0
    inputs = make_inputs(rng, MODEL, LENGTHS)
    arrays = {f"params/beit3.{name}": value for name, value in model.named_parameters()}
    arrays |= inputs | {"image": inputs["image"].permute(0, 2, 3, 1)}
    for call, names in CALLS.items():
        layers, tokens = model(**{name: inputs[name] for name in names})
        arrays |= {f"{call}/layers": torch.stack(layers), f"{call}/tokens": tokens}
    stored = {name: value.numpy() for name, value in arrays.items()}
    kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
    stored = {name: value.astype(kinds[value.dtype.kind]) for name, value in stored.items()}
    path = FOLDER / "beit3.npz"
    save(path, stored)
    print(f"{path.name}: {len(stored)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
