"""data2vec 2.0 vision in PyTorch: the independent model and losses bivl is checked against.

Written from the paper (arXiv 2212.07525) and the behaviour of fairseq's `examples/data2vec`
(`models/data2vec2.py`, `models/modalities/`); parameter names are its own. Shape letters: B batch,
M masks an example, T patches, K kept patches, L tokens (CLS first), D width, H heads. Needs only
torch; runs in whatever float type the parameters have.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder; defaults are ViT-B's."""

    width: int = 768
    kernel: int = 3
    groups: int = 16
    depth: int = 6


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; defaults are ViT-B/16 at 224 pixels. All its dropouts are 0."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder: DecoderConfig = DecoderConfig()

    @property
    def grid(self):
        """Patches per side."""
        return self.image_size // self.patch_size


def sincos(grid, width):
    """Fixed table [1, T, D]: column in the first half of D, row in the second, sin before cos."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)  # one coordinate, [grid, D / 2]
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    return torch.cat([column, row], dim=-1)[None]


class Attention(nn.Module):
    """Self-attention; queries, keys and values all have biases."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in parts)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Post-norm block; returns its output and the output of its second FFN matrix."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        ffn = self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))
        return self.norm2(x + ffn), ffn


class Decoder(nn.Module):
    """Convolutions on the grid, then a linear map back to D: [N, T, D] -> [N, T, D]."""

    def __init__(self, config, width, grid):
        super().__init__()
        self.grid = grid
        inputs = [width] + [config.width] * (config.depth - 1)
        options = {"padding": config.kernel // 2, "groups": config.groups}
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(n, config.width, config.kernel, **options)]) for n in inputs
        )
        self.proj = nn.Linear(config.width, width)

    def forward(self, x):
        x = x.mT.unflatten(-1, (self.grid, self.grid))
        for (convolution,) in self.blocks:
            y = convolution(x).movedim(1, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).movedim(-1, 1)  # eps 1e-5
            x = x + y if x.shape == y.shape else y
        return self.proj(x.flatten(2).mT)


class ImageEncoder(nn.Module):
    """What fairseq keeps under `modality_encoders.IMAGE`: front-end, context norm, decoder."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.width, config.patch_size
        self.extra_tokens = nn.Parameter(torch.randn(1, 1, width))
        self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        table = nn.Parameter(sincos(config.grid, width), requires_grad=False)
        self.fixed_positional_encoder = nn.ParameterDict({"positions": table})
        self.context_encoder = nn.ModuleDict({"norm": nn.LayerNorm(width, eps=1e-6)})
        self.decoder = Decoder(config.decoder, width, config.grid)

    def forward(self, images, mask=None):
        """Images [B, h, w, 3] -> [B, 1 + T, D], or of masks [B, M, T] -> [B M, 1 + K, D]."""
        x = self.local_encoder["proj"](images.movedim(-1, 1)).flatten(2).mT
        x = x + self.fixed_positional_encoder["positions"]
        if mask is not None:
            x = torch.stack([row[~m] for row, masks in zip(x, mask, strict=True) for m in masks])
        x = torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], dim=1)
        return self.context_encoder["norm"](x)


class Data2Vec2Vision(nn.Module):
    """Encoder and decoder; a teacher is the same without using its decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.modality_encoders = nn.ModuleDict({"IMAGE": ImageEncoder(config)})
        blocks = (Block(config.width, config.num_heads) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)

    def encode(self, images, mask=None):
        """`layers` (block 0's input, then each block's output) and `ffn` (one a block)."""
        layers, ffn = [self.modality_encoders["IMAGE"](images, mask)], []
        for block in self.blocks:
            x, t = block(layers[-1])
            layers.append(x)
            ffn.append(t)
        return layers, ffn

    def predict(self, images, mask, noise):
        """Predictions [B M, T, D] and CLS outputs [B M, D]; mask bool [B, M, T], True = hidden.

        `noise` [B M, T, D] stands in the hidden places of the decoder's input.
        """
        x = self.encode(images, mask)[0][-1]
        full = noise.masked_scatter(~mask.flatten(0, 1)[..., None], x[:, 1:])
        return self.modality_encoders["IMAGE"].decoder(full), x[:, 0]


@torch.no_grad()
def teacher_targets(teacher, images, top_k):
    """Targets [B, T, D]: FFN outputs of the last blocks, each with unit variance over T, averaged,
    then layer-normalised."""
    ffn = [x[:, 1:] for x in teacher.encode(images)[1][-top_k:]]
    mean = torch.stack([F.instance_norm(x.mT).mT for x in ffn]).mean(0)
    return F.layer_norm(mean, mean.shape[-1:])


def losses(prediction, cls, targets, mask):
    """Regression: mean over hidden places of all clones of sum over D of squares / sqrt(D).
    CLS: the same between CLS and the mean target of the example, mean over clones."""
    clones, scale = mask.shape[1], prediction.shape[-1] ** -0.5
    repeated = targets.repeat_interleave(clones, 0)
    hidden = mask.flatten(0, 1)
    regression = scale * (prediction - repeated)[hidden].square().sum(-1).mean()
    return regression, scale * (cls - repeated.mean(1)).square().sum(-1).mean()
