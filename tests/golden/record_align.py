"""Records what the PyTorch computation of ALIGN gives: align.npz.

    python tests/golden/record_align.py

needs torch and numpy. The computation is written here, with PyTorch's functions alone, from the
papers (EfficientNet 1905.11946, BERT 1810.04805, ALIGN 2102.05918) and the behaviour of
transformers' `models/align/modeling_align.py`. Everything runs in float64 and is stored in float32.
A <name> is a tensor's name in transformers, shapes are PyTorch's (`align_tree.py`). Images are 21 x
21, maps then 10, 10, 5, 5 and 2 on a side; texts have 7 tokens of width 8, two blocks of 2 heads,
13 words of which 0 is the pad; the common space has 12 dimensions. B = 3.

  params/<name>               multiples of 1/64
  images [B,21,21,3] (normalised), ids [B,7]: the second text is short, pads behind it
  image/layers/<i> [B,h w,D]  the stem's map and every block's, row by row
  image/pooled [B,12]         the mean of the last map
  text/layers [3,B,7,8]       the normalised embedding and every block's output
  image/embeddings, text/embeddings [B,12]  of unit length
  logits [B,B]                images down, texts across
  train/<i>, train/mean, train/variance: the maps where batch norms take the batch's statistics, and
                              those of the stem's
"""

import pathlib

import align_tree as tree
import numpy as np
import torch
from record_data2vec_vision import on_grid, save
from torch.nn import functional as F

FILE = pathlib.Path(__file__).with_name("align.npz")


def drawn(rng) -> dict:
    """Random tensors of visible effect."""
    found = {}
    for name, shape in tree.shapes().items():
        noise = rng.standard_normal(shape)
        if name == "temperature":
            noise = np.array(0.25)
        elif name.endswith("running_var"):
            noise = np.exp(0.5 * noise) + 1 / 64
        elif len(shape) == 1 and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif len(shape) < 2 or "embeddings.weight" in name:
            noise = 0.3 * noise
        else:
            noise = noise / np.sqrt(np.prod(shape[1:]))
        found[name] = on_grid(noise)
    return found


def image_layers(p: dict, images, training: bool, seen: list) -> list:
    """Images [B, 3, S, S] -> maps; into `seen` go the statistics that norms took."""

    def norm(x, name):
        mean, variance = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        if training:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        seen.append((mean, variance))
        affine = p[f"{name}.weight"], p[f"{name}.bias"]
        eps = tree.VISION["batch_norm_eps"]
        return F.batch_norm(x, mean, variance, *affine, False, 0.0, eps)

    e = "vision_model.embeddings."
    x = F.conv2d(F.pad(images, (0, 1, 0, 1)), p[f"{e}convolution.weight"], stride=2)
    maps = [F.silu(norm(x, f"{e}batchnorm"))]
    for i, (inputs, hidden, _, _, kernel, stride, before) in enumerate(tree.BLOCKS):
        b, x = f"vision_model.encoder.blocks.{i}.", maps[-1]
        if hidden != inputs:
            x = F.conv2d(x, p[f"{b}expansion.expand_conv.weight"])
            x = F.silu(norm(x, f"{b}expansion.expand_bn"))
        weight = p[f"{b}depthwise_conv.depthwise_conv.weight"]
        x = F.pad(x, (before, kernel // 2, before, kernel // 2))
        x = F.conv2d(x, weight, stride=stride, groups=hidden)
        x = F.silu(norm(x, f"{b}depthwise_conv.depthwise_norm"))
        gate = x.mean((2, 3), keepdim=True)
        for name, activation in (("reduce", F.silu), ("expand", torch.sigmoid)):
            parts = (p[f"{b}squeeze_excite.{name}.{part}"] for part in ("weight", "bias"))
            gate = activation(F.conv2d(gate, *parts))
        x = F.conv2d(x * gate, p[f"{b}projection.project_conv.weight"])
        x = norm(x, f"{b}projection.project_bn")
        maps.append(x + maps[-1] if i == tree.RESIDUAL else x)
    return [x.flatten(2).transpose(1, 2) for x in maps]


def text_layers(p: dict, ids) -> list:
    """Ids [B, L] -> the normalised embedding and every block's output."""

    def norm(x, name):
        affine = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], *affine, tree.TEXT["layer_norm_eps"])

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    e = "text_model.embeddings."
    x = p[f"{e}word_embeddings.weight"][ids] + p[f"{e}position_embeddings.weight"]
    layers = [norm(x + p[f"{e}token_type_embeddings.weight"][0], f"{e}LayerNorm")]
    hidden = torch.where(ids == 0, -torch.inf, 0.0)[:, None, None]
    for i in range(tree.TEXT["num_hidden_layers"]):
        b, x = f"text_model.encoder.layer.{i}.", layers[-1]
        names = (f"{b}attention.self.{part}" for part in ("query", "key", "value"))
        q, k, v = (linear(x, name).unflatten(-1, (2, -1)).transpose(1, 2) for name in names)
        read = (q @ k.mT * q.shape[-1] ** -0.5 + hidden).softmax(-1) @ v
        read = linear(read.transpose(1, 2).flatten(2), f"{b}attention.output.dense")
        x = norm(x + read, f"{b}attention.output.LayerNorm")
        y = linear(F.gelu(linear(x, f"{b}intermediate.dense")), f"{b}output.dense")
        layers.append(norm(x + y, f"{b}output.LayerNorm"))
    return layers


@torch.no_grad()
def main():
    """Writes the file beside this script."""
    rng = np.random.default_rng(0)
    params = drawn(rng)
    p = {name: torch.as_tensor(value) for name, value in params.items()}
    images = torch.as_tensor(on_grid(rng.standard_normal((3, 21, 21, 3))))
    ids = rng.integers(3, 13, (3, 7))
    ids[:, 0], ids[:, 6] = 1, 2
    ids[1, 3:] = 2, 0, 0, 0
    found, seen = {"images": images, "ids": ids}, []
    pixels = images.permute(0, 3, 1, 2)
    maps, texts = image_layers(p, pixels, False, []), text_layers(p, torch.as_tensor(ids))
    found |= {f"image/layers/{i}": x for i, x in enumerate(maps)}
    found["image/pooled"], found["text/layers"] = maps[-1].mean(1), torch.stack(texts)
    pooled = F.linear(texts[-1][:, 0], p["text_projection.weight"], p["text_projection.bias"])
    vectors = [F.normalize(x, dim=-1) for x in (found["image/pooled"], pooled)]
    found |= dict(zip(("image/embeddings", "text/embeddings"), vectors, strict=True))
    found["logits"] = vectors[0] @ vectors[1].T / p["temperature"]
    trained = image_layers(p, pixels, True, seen)
    found |= {f"train/{i}": x for i, x in enumerate(trained)}
    found["train/mean"], found["train/variance"] = seen[0]
    arrays = {f"params/{name}": value for name, value in params.items()} | found
    save(FILE, {name: np.asarray(value, np.float32) for name, value in arrays.items()})


if __name__ == "__main__":
    main()
