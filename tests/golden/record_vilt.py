"""Records what the PyTorch computation of ViLT gives: vilt.npz.

    python tests/golden/record_vilt.py

needs torch and numpy. Everything runs in float64 and is stored in float32. A <name> is a
parameter's name in transformers' ViltForMaskedLM, shapes are PyTorch's. Images are 12 x 12 with
patches of 4, so nine; texts have up to 8 of 7 tokens, 30 words; width 24, two blocks of 3 heads.
B = 3.

  params/<name>           multiples of 1/64
  images [B,12,12,3] (normalised), ids [B,7], padding [B,7]: two texts end early
  layers [3,B,17,24], tokens [B,17,24], pooled [B,24], logits [B,7,30]
  cost [2,4,6], plan [2,6,4]   of optimal transport; of the second only [:3, :5] is real
"""

import pathlib

import numpy as np
import torch
import torch_vilt as reference
from record_data2vec_vision import on_grid, save

FILE = pathlib.Path(__file__).with_name("vilt.npz")


def drawn(model, rng):
    """Random parameters of visible effect, multiples of 1/64."""
    found = {}
    for name, value in model.named_parameters():
        noise = rng.standard_normal(value.shape)
        if "norm" in name.lower() and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif (
            value.ndim < 2 or "token" in name or name.removesuffix(".weight").endswith("embeddings")
        ):
            noise = 0.3 * noise
        else:
            noise = noise / np.sqrt(value[0].numel())
        found[name] = on_grid(noise)
    return found


@torch.no_grad()
def main():
    """Writes the file beside this script."""
    rng = np.random.default_rng(0)
    model = reference.ViLT(30, 8, 12, 4, 24, 3, 40, 2).double().eval()
    params = drawn(model, rng)
    for name, value in model.named_parameters():
        value.copy_(torch.as_tensor(params[name]))
    images = torch.as_tensor(on_grid(rng.standard_normal((3, 12, 12, 3))))
    ids, padding = rng.integers(1, 30, (3, 7)), np.zeros((3, 7), bool)
    padding[0, 5:] = padding[2, 3:] = True
    ids[padding] = 0
    given = torch.as_tensor(ids), torch.as_tensor(padding), images.permute(0, 3, 1, 2)
    layers, tokens, pooled, logits = model(*given)
    cost = on_grid(rng.uniform(0, 2, (2, 4, 6)))
    plan = np.zeros((2, 6, 4))
    for row, (m, n) in enumerate(((4, 6), (3, 5))):
        plan[row, :n, :m] = reference.transport(torch.as_tensor(cost[row, :m, :n]))
    found = {"images": images, "ids": ids, "padding": padding, "layers": torch.stack(layers)}
    found |= {"tokens": tokens, "pooled": pooled, "logits": logits, "cost": cost, "plan": plan}
    arrays = {f"params/{name}": value for name, value in params.items()} | found
    save(FILE, {name: np.asarray(value, np.float32) for name, value in arrays.items()})


if __name__ == "__main__":
    main()
