"""Records what the PyTorch computation of CLIP gives: clip.npz.

    python tests/golden/record_clip.py

needs torch and numpy. Everything runs in float64 and is stored in float32. A <name> is a
parameter's name in openai/CLIP, shapes are PyTorch's. Images are 12 x 12 with patches of 4, so ten
tokens of width 24, two blocks of 3 heads; texts have up to 9 tokens of width 20, three blocks of 2
heads, 40 words; the common space has 6 dimensions. B = 3.

  params/<name>           multiples of 1/64
  images [B,12,12,3] (normalised), ids [B,9]: the second text ends early, zeros behind it
  image/layers [3,B,10,24], image/tokens [B,10,24], image/embeddings [B,6] of unit length
  text/layers [4,B,9,20], text/tokens [B,9,20], text/pooled [B,20], text/embeddings [B,6]
  logits [B,B]            images down, texts across
  image/patches [B,9,6]   the projections of the patches
"""

import pathlib

import numpy as np
import torch
import torch_clip as reference
from record_data2vec_vision import on_grid, save
from torch.nn import functional as F

FILE = pathlib.Path(__file__).with_name("clip.npz")


def drawn(model, rng):
    """Random parameters of visible effect, multiples of 1/64."""
    found = {}
    for name, value in model.named_parameters():
        noise = rng.standard_normal(value.shape)
        if name == "logit_scale":
            noise = 1.5
        elif "ln_" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif value.ndim < 2 or "embedding" in name:
            noise = 0.3 * noise
        else:
            noise = noise / np.sqrt(value[0].numel() if "proj" not in name else len(value))
        found[name] = on_grid(noise)
    return found


@torch.no_grad()
def main():
    """Writes the file beside this script."""
    rng = np.random.default_rng(0)
    model = reference.CLIP((12, 4, 24, 3, 40, 2), 40, 9, 20, 2, 30, 3, 6).double().eval()
    params = drawn(model, rng)
    for name, value in model.named_parameters():
        value.copy_(torch.as_tensor(params[name]))
    images = torch.as_tensor(on_grid(rng.standard_normal((3, 12, 12, 3))))
    ids = rng.integers(0, 38, (3, 9))
    ids[:, 0], ids[:, 8] = 38, 39
    ids[1, 4:] = 39, 0, 0, 0, 0
    found = {"images": images, "ids": ids}
    vectors = []
    read = model.visual(images.permute(0, 3, 1, 2)), model.texts(torch.as_tensor(ids))
    for name, (layers, tokens, vector) in zip(("image", "text"), read, strict=True):
        vectors.append(F.normalize(vector, dim=-1))
        found[f"{name}/layers"], found[f"{name}/tokens"] = torch.stack(layers), tokens
        found[f"{name}/embeddings"] = vectors[-1]
    found["text/pooled"] = found["text/tokens"][torch.arange(3), torch.as_tensor(ids).argmax(1)]
    found["image/patches"] = found["image/tokens"][:, 1:] @ model.visual.proj
    found["logits"] = model.logit_scale.exp() * vectors[0] @ vectors[1].T
    arrays = {f"params/{name}": value for name, value in params.items()} | found
    save(FILE, {name: np.asarray(value, np.float32) for name, value in arrays.items()})


if __name__ == "__main__":
    main()
