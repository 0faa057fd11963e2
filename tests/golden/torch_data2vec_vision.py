"""data2vec 1.0 vision in PyTorch: the independent model and training step bivl is checked against.

Written from the paper (arXiv 2202.03555) and the behaviour of facebookresearch/data2vec_vision
(folder `beit/`, the code of the published vision results; parameter names are its own). Shape
letters: B batch, T patches, L tokens (CLS first, then patches), D width, H heads, F hidden.
Needs only torch; runs in whatever float type the parameters have.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a BEiT encoder; defaults are ViT-B/16 at 224 pixels without stochastic parts."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    layer_scale: float = 1e-4
    drop_path: float = 0.0  # rate of the last block; rises linearly from 0
    attention_dropout: float = 0.0

    @property
    def grid(self):
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Target pipeline: per-layer norms (in this order), mean of the last K, norms of the mean."""

    top_k: int = 6
    collect: str = "end"  # "end": block outputs; "ffn": what the MLP branch adds
    batch_norm: bool = False
    instance_norm: bool = False
    group_norm: bool = False
    layer_norm: bool = True
    final_layer_norm: bool = True
    final_instance_norm: bool = False


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything of one training step besides the model; defaults are ViT-B of data2vec."""

    targets: TargetConfig = TargetConfig()
    beta: float = 2.0
    scale: float | None = None  # None: mean over D (vision); a number: sum over D times it
    learning_rate: float = 2e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 0
    total_steps: int = 100
    clip_norm: float = 3.0
    ema_decay_start: float = 0.9998
    ema_decay_end: float = 0.9998
    ema_anneal_steps: int = 0


def relative_position_index(height, width):
    """Row of the bias table for every (query, key) pair of tokens. Int [1 + h*w, 1 + h*w]."""
    position = torch.arange(height * width)
    y, x = position // width, position % width
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    rows = (2 * height - 1) * (2 * width - 1)
    index = torch.full((1 + height * width, 1 + height * width), rows + 2)  # CLS to CLS
    index[1:, 1:] = dy * (2 * width - 1) + dx
    index[0, 1:] = rows  # CLS asks
    index[1:, 0] = rows + 1  # CLS is asked
    return index


class RelativePositionBias(nn.Module):
    """One learned table for all blocks. Gives [H, L, L]."""

    def __init__(self, grid, num_heads):
        super().__init__()
        rows = (2 * grid - 1) ** 2 + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        index = relative_position_index(grid, grid)
        self.register_buffer("relative_position_index", index)

    def forward(self):
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(nn.Module):
    """Self-attention with one qkv matrix and biases for q and v only."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias):
        B, L, D = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).view(B, L, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias
        weights = F.dropout(logits.softmax(-1), self.dropout, self.training)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Pre-norm block with layer scale; returns its output and what the MLP branch added."""

    def __init__(self, config, drop_path):
        super().__init__()
        width = config.width
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.mlp_dim), "fc2": nn.Linear(config.mlp_dim, width)}
        )
        self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def drop(self, x):
        """Zeroes the branch of whole examples, and keeps its mean."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, x, bias):
        x = x + self.drop(self.gamma_1 * self.attn(self.norm1(x), bias))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        branch = self.drop(self.gamma_2 * self.mlp["fc2"](hidden))
        return x + branch, branch


class Data2VecVision(nn.Module):
    """Encoder with mask token and regression head (`lm_head`)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = (1, 1, config.width)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        conv = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.rel_pos_bias = RelativePositionBias(config.grid, config.num_heads)
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.lm_head = nn.Linear(config.width, config.width)
        self.reset()

    @torch.no_grad()
    def reset(self, std=0.02):
        """Matrices and tokens: normal cut at one deviation; block outputs shrink with depth."""
        for name, value in self.named_parameters():
            if value.ndim > 1 and "bias_table" not in name:
                nn.init.trunc_normal_(value, std=std, a=-std, b=std)
            elif name.endswith(".bias"):
                value.zero_()
        for number, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight /= math.sqrt(2 * number)
            block.mlp["fc2"].weight /= math.sqrt(2 * number)

    def encode(self, images, mask=None):
        """Images [B, h, w, 3], mask bool [B, T] (True = hidden) or None.

        Returns `layers` (depth + 1 of [B, L, D]: block 0's input, then block outputs) and `ffn`
        (depth of [B, L, D]), both before the final norm.
        """
        x = self.patch_embed["proj"](images.permute(0, 3, 1, 2)).flatten(2).mT
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias, layers, ffn = self.rel_pos_bias(), [x], []
        for block in self.blocks:
            x, branch = block(x, bias)
            layers.append(x)
            ffn.append(branch)
        return layers, ffn

    def predict(self, images, mask, masked_only=False):
        """Regression of every patch [B, T, D], or of the masked ones [N, D] in row order."""
        x = self.norm(self.encode(images, mask)[0][-1])[:, 1:]
        return self.lm_head(x[mask] if masked_only else x)


def make_targets(layers, config):
    """Target pipeline on a list of [B, T, D] without CLS; uses the last K. Returns [B, T, D]."""

    def over_time(x, norm):
        return norm(x.mT).mT

    def batch_norm(x):
        return F.batch_norm(x, None, None, training=True)

    def layer_norm(x, axes=1):
        return F.layer_norm(x, x.shape[-axes:])  # eps 1e-5, unlike the model's own norms

    layers = layers[-config.top_k :]
    if config.batch_norm:
        layers = [over_time(x, batch_norm) for x in layers]
    if config.instance_norm:
        layers = [over_time(x, F.instance_norm) for x in layers]
    if config.group_norm:
        layers = [layer_norm(x, axes=2) for x in layers]
    if config.layer_norm:
        layers = [layer_norm(x) for x in layers]
    mean = sum(layers) / len(layers)
    if config.final_layer_norm:
        mean = layer_norm(mean)
    if config.final_instance_norm:
        mean = over_time(mean, F.instance_norm)
    return mean


@torch.no_grad()
def teacher_targets(teacher, images, config):
    """Targets [B, T, D] from the unmasked images."""
    layers, ffn = teacher.encode(images)
    collected = layers[1:] if config.collect == "end" else ffn
    return make_targets([x[:, 1:] for x in collected], config)


def regression_loss(prediction, target, beta, scale=None):
    """Loss of [N, D] masked positions: mean over all, or `scale` times sum over D, mean over N."""
    distance = (prediction - target).abs()
    if beta == 0:
        loss = distance**2
    else:
        loss = torch.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta)
    return loss.mean() if scale is None else scale * loss.sum(-1).mean()


def mean_std(x):
    """Mean over channels of the deviation over the N rows of [N, D]; unbiased, 1e-6 added."""
    return (x.var(0) + 1e-6).sqrt().mean()


def ema_decay(n, start, end, anneal_steps):
    """Decay of the teacher's n-th move (n = finished updates, the first is 1)."""
    return end if start == end or n >= anneal_steps else start + (end - start) * n / anneal_steps


@torch.no_grad()
def move_teacher(teacher, student, decay):
    """teacher <- decay * teacher + (1 - decay) * student; a decay of exactly 1 freezes it."""
    if decay < 1:
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.mul_(decay).add_(new, alpha=1 - decay)


def cosine(n, peak, warmup, total, floor=0.0, early_peak=False):
    """Linear from 0 over `warmup` updates, then half a cosine from `peak` to `floor`.

    data2vec_vision's own table reaches the peak one update early (`early_peak`).
    """
    if n < warmup:
        return peak * n / (warmup - early_peak)
    angle = math.pi * min(1.0, (n - warmup) / (total - warmup))
    return floor + 0.5 * (peak - floor) * (1 + math.cos(angle))


def tri_stage(n, peak, phases, total, initial_scale=0.01, final_scale=0.01):
    """Linear rise from initial_scale * peak, hold, exponential fall to final_scale * peak."""
    rise, hold, fall = (int(total * phase) for phase in phases)
    if n < rise:
        return peak * (initial_scale + (1 - initial_scale) * n / rise)
    return peak * final_scale ** min(1.0, max(0, n - rise - hold) / fall)


def polynomial(n, peak, warmup, total):
    """Linear from 0 over `warmup` updates, then linear to 0 at `total`."""
    return peak * (n / warmup if n < warmup else max(0.0, (total - n) / (total - warmup)))


def is_decayed(name, value):
    """Weight decay spares vectors, biases and the CLS token; mask token and table are decayed."""
    return value.ndim > 1 and not name.endswith(".bias") and name != "cls_token"


def rate_factor(name, depth, decay):
    """Learning-rate factor of layer-wise decay (fine-tuning): decay^(depth + 1 - layer)."""
    layer = depth + 1  # bias table, final norm, head
    if name in ("cls_token", "mask_token") or name.startswith("patch_embed"):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    return decay ** (depth + 1 - layer)


def make_optimizer(model, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=1.0, fused=False):
    """AdamW (eps 1e-8), one group a parameter: `weight_decay` and `factor` of the rate."""
    groups = [
        {
            "params": [value],
            "weight_decay": weight_decay if is_decayed(name, value) else 0.0,
            "factor": rate_factor(name, model.config.depth, layer_decay),
        }
        for name, value in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused or None)


def step(student, teacher, optimizer, images, mask, config, updates_done):
    """One full training step, in place. Images [B, h, w, 3], mask bool [B, T].

    `updates_done` counts finished updates before this one. Returns a dict of numbers.
    """
    student.train()
    teacher.eval()
    target = teacher_targets(teacher, images, config.targets)[mask]
    prediction = student.predict(images, mask, masked_only=True)
    loss = regression_loss(prediction, target, config.beta, config.scale)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
    peak, floor = config.learning_rate, config.min_learning_rate
    rate = cosine(updates_done, peak, config.warmup_steps, config.total_steps, floor)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    optimizer.step()
    start, end, steps = config.ema_decay_start, config.ema_decay_end, config.ema_anneal_steps
    decay = ema_decay(updates_done + 1, start, end, steps)
    move_teacher(teacher, student, decay)
    return {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "learning_rate": rate,
        "ema_decay": decay,
        "target_std": mean_std(target).item(),
        "prediction_std": mean_std(prediction.detach()).item(),
    }
