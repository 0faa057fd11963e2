"""Records what the PyTorch computation of VQ-KD and BEiT v2 gives: vqkd.npz.

    python tests/golden/record_vqkd.py

needs torch and numpy. Everything runs in float64 and is stored in float32. Images are 16 x 16 with
patches of 4, so T = 16; D = 16, H = 2, F = 32. A <name> is a parameter's name in microsoft/unilm,
shapes are PyTorch's.

vqkd/   depth 2, decoder 1, V = 12, E = 4, teacher width 6, B = 3
  images uint8 [B,16,16,3], codebook [V,E], target [B,T,6], params/<name>
  units [B,T,E], codes [B,T], output [B,T,6], loss/{cosine,quantization}
  grads/<name>     of the sum of both losses
  moved [2,V,E]    the codebook after one and two updates on the same vectors
kmeans/   samples [60,4], centres [12,4], history [10,12,4]: one centre is chosen by nothing
mim/    depth 3, patches of layer 2, 2 added blocks, V = 10, B = 3
  images [B,16,16,3] (normalised), mask [B,T], codes [B,T], params/<name>
  logits/{main,aggregation} [N,V] at masked patches in row order, loss/{...}
  grads/<name>     of the sum of both losses
"""

import dataclasses
import pathlib

import numpy as np
import torch
import torch_vqkd as reference
from record_data2vec_vision import load, on_grid, random_parameters, save, tree
from torch.nn import functional as F
from torch_data2vec_vision import ModelConfig

FILE = pathlib.Path(__file__).with_name("vqkd.npz")
MODEL = ModelConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32)
ROUND = 2.0**-26


def fill(model, rng):
    """Random parameters on a grid; gives the model in float64."""
    model = model.double()
    load(model, {name: on_grid(x) for name, x in random_parameters(model, rng).items()})
    return model


def draw_units(rng, *shape):
    """Unit vectors that are exact in float32."""
    vectors = F.normalize(torch.as_tensor(rng.standard_normal(shape)), dim=-1)
    return vectors.float().double()


def gradients(model, loss):
    """tree("grads", ...) of every parameter."""
    names, values = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, values)
    return tree("grads", zip(names, grads, strict=True), ROUND)


def record_vqkd(rng):
    """Lookup, losses, gradients and two moves of the codebook."""
    model = fill(reference.VQKD(MODEL, 1, 4, 6), rng)
    images = torch.as_tensor(rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8))
    codebook, target = draw_units(rng, 12, 4), torch.as_tensor(rng.standard_normal((3, 16, 6)))
    target = target.float().double()
    found = model(images, codebook)
    assert found["margin"] > 1e-3, "two codes are too near to one another for float32"
    cosine, quantization = reference.losses(found, target)
    units, codes = found["units"].detach().flatten(0, 1), found["codes"].flatten()
    assert len(codes.unique()) < len(codebook), "no code is unused"
    first = reference.move_codebook(codebook, units, codes)
    moved = torch.stack([first, reference.move_codebook(first, units, codes)])
    out = {"images": images, "codebook": codebook, "target": target, "moved": moved}
    out |= {name: found[name] for name in ("units", "codes", "output")}
    out |= {"loss/cosine": cosine, "loss/quantization": quantization}
    out |= tree("params", model.named_parameters())
    return out | gradients(model, cosine + quantization)


def record_kmeans(rng):
    """Ten iterations from given centres; the last centre is opposite to everything."""
    samples = draw_units(rng, 60, 4)
    samples = F.normalize(samples + torch.tensor([2.0, 0, 0, 0]), dim=-1).float().double()
    centres = samples[:12].clone()
    centres[-1] = torch.tensor([-1.0, 0, 0, 0])
    history = reference.kmeans(samples, centres, 10)
    assert torch.equal(history[-1, -1], centres[-1])
    for step in (centres, *history):
        two = (samples @ step.T).topk(2).values
        assert (two[:, 0] - two[:, 1]).min() > 1e-6, "a sample lies between two centres"
    return {"samples": samples, "centres": centres, "history": history}


def record_mim(rng):
    """Logits, cross-entropies and gradients of both branches."""
    model = fill(reference.Beit2(dataclasses.replace(MODEL, depth=3), 10, 2, 2), rng)
    images = torch.as_tensor(on_grid(rng.standard_normal((3, 16, 16, 3)), 2.0**-5))
    mask = torch.as_tensor(np.stack([rng.permutation(16) < 6 for _ in range(3)]))
    codes = torch.as_tensor(rng.integers(0, 10, (3, 16)))
    main, aggregation = model(images, mask)
    each = [F.cross_entropy(logits, codes[mask]) for logits in (main, aggregation)]
    out = {"images": images, "mask": mask, "codes": codes}
    out |= {"logits/main": main, "logits/aggregation": aggregation}
    out |= {"loss/main": each[0], "loss/aggregation": each[1]}
    out |= tree("params", model.named_parameters())
    return out | gradients(model, sum(each))


def stored(value):
    """float32 for floats, the other types as they are."""
    array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def main():
    """Writes the file."""
    torch.set_num_threads(1)
    parts = {"vqkd": record_vqkd, "kmeans": record_kmeans, "mim": record_mim}
    arrays = {
        f"{part}/{key}": stored(value)
        for part, record in parts.items()
        for key, value in record(np.random.default_rng(0)).items()
    }
    save(FILE, arrays)
    print(f"{FILE.name}: {len(arrays)} arrays, {FILE.stat().st_size} bytes")
    for key, value in arrays.items():
        if "/loss/" in key:
            print(key, value)


if __name__ == "__main__":
    main()
