"""The released BEiT-3 encoder in PyTorch, for recorded numbers and live comparison.

Written from the paper (arXiv 2208.10442), the layout of Magneto (2210.06423) and the behaviour of
`microsoft/torchscale`; parameter names are the checkpoints', without their first part `beit3.`.
Shape letters: B examples, N patches, T tokens of a text, L all tokens (1 + N + T), D width, H
heads. LayerNorm eps is 1e-5 everywhere, GELU the exact one; there is no dropout. Parameters named
A serve image tokens, those named B text tokens; only attention lets the two kinds meet.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

FIRST_POSITION = 2  # the row of the first token of each modality; the rows before are never read


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes; defaults are the base model's."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    image_size: int = 224
    patch_size: int = 16
    vocabulary: int = 64010
    positions: int = 1024  # rows of the text's table

    @property
    def patches(self):
        """N."""
        return (self.image_size // self.patch_size) ** 2


class Twin(nn.Module):
    """Two modules of one kind: A maps the first `split` tokens of [B, L, ...], B the others."""

    def __init__(self, make):
        super().__init__()
        self.A, self.B = make(), make()

    def forward(self, x, split):
        return torch.cat([self.A(x[:, :split]), self.B(x[:, split:])], dim=1)


class Attention(nn.Module):
    """Each token projects with its own side's matrices; the softmax is over all tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Twin(lambda: nn.Linear(width, width)) for _ in range(4)
        )
        self.inner_attn_ln = Twin(lambda: nn.LayerNorm(width))

    def forward(self, x, split, bias):
        q, k, v = (
            project(x, split).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(mixed, split), split)


class FeedForward(nn.Module):
    """Two matrices with GELU, and a LayerNorm of the hidden width after it."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class Layer(nn.Module):
    """Pre-norm block with inner norms; `final_layer_norm` is the norm before the FFN."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config.width, config.num_heads)
        self.self_attn_layer_norm = Twin(lambda: nn.LayerNorm(config.width))
        self.ffn = Twin(lambda: FeedForward(config.width, config.mlp_dim))
        self.final_layer_norm = Twin(lambda: nn.LayerNorm(config.width))

    def forward(self, x, split, bias):
        x = x + self.self_attn(self.self_attn_layer_norm(x, split), split, bias)
        return x + self.ffn(self.final_layer_norm(x, split), split)


class VisionEmbed(nn.Module):
    """Images [B, 3, S, S] -> [B, 1 + N, D]: CLS, then the patches row by row."""

    def __init__(self, config):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, image, masked=None):
        x = self.proj(image).flatten(2).mT
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token, x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


class Encoder(nn.Module):
    """Positions, layers and the last norm, on tokens whose first `split` are an image's."""

    def __init__(self, config):
        super().__init__()
        rows = {"A": 1 + config.patches + FIRST_POSITION, "B": config.positions}
        tables = {side: nn.Embedding(count, config.width) for side, count in rows.items()}
        self.embed_positions = nn.ModuleDict(tables)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.layer_norm = Twin(lambda: nn.LayerNorm(config.width))

    def places(self, split, length):
        """The rows of the position tables for `length` tokens: [L, D]."""
        image, text = (self.embed_positions[side].weight[FIRST_POSITION:] for side in "AB")
        return torch.cat([image[:split], text[: length - split]])

    def forward(self, x, split, padding, blocked):
        x = x + self.places(split, x.shape[1])
        x = x.masked_fill(padding[..., None], 0.0)
        bias = torch.zeros_like(x[:, None, None, :, 0])  # [B, 1, 1, L]
        bias = bias.masked_fill(padding[:, None, None], -torch.inf)
        if blocked is not None:
            bias = bias + -1e8 * blocked.to(x.dtype)
        layers = [x]
        for layer in self.layers:
            layers.append(layer(layers[-1], split, bias))
        return layers, self.layer_norm(layers[-1], split)


class BEiT3(nn.Module):
    """The encoder of an image, a text, or both."""

    def __init__(self, config):
        super().__init__()
        self.text_embed = nn.Embedding(config.vocabulary, config.width)
        self.vision_embed = VisionEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, image=None, tokens=None, padding=None, masked=None, blocked=None):
        """image [B, 3, S, S], tokens int [B, T], or both.

        padding: bool [B, T], True at pads; masked: bool [B, N], patches that show the mask token;
        blocked: bool [L, L], True where a query (row) must not see a key (column).
        Returns the depth + 1 arrays [B, L, D] of `layers` (the input of the first, then each one's
        output) and the tokens [B, L, D] after the last norm; the image comes first.
        """
        parts, unpadded = [], []
        if image is not None:
            parts.append(self.vision_embed(image, masked))
            unpadded.append(torch.ones(parts[0].shape[:2], dtype=torch.bool))
        split = parts[0].shape[1] if parts else 0
        if tokens is not None:
            parts.append(self.text_embed(tokens))
            unpadded.append(torch.ones_like(tokens).bool() if padding is None else ~padding)
        return self.encoder(torch.cat(parts, 1), split, ~torch.cat(unpadded, 1), blocked)


def caption_blocked(patches, texts):
    """`blocked` of captioning, for `patches` image tokens (CLS counted) and `texts` text tokens:
    an image sees itself, a text the image and its own tokens up to each one."""
    order = torch.arange(patches + texts).clamp(min=patches - 1)
    return order[None] > order[:, None]
