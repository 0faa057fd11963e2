"""Parts shared by the PyTorch data2vec references for text and audio.

Post-norm blocks of both versions, the speech front-end, the decoder on a line, targets, the moving
teacher and the optimizer, written from the papers (arXiv 2202.03555, 2212.07525) and the behaviour
of fairseq's `examples/data2vec`; parameter names are its own. Shape letters: N rows of a batch,
L tokens of a row, T all tokens or frames, K kept ones, D width, H heads. LayerNorm eps is 1e-5
everywhere, GELU the exact one; there is no dropout.
"""

import dataclasses

import torch
import torch.nn.functional as F
import torch_data2vec_vision as vision
from torch import nn

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
regression_loss = vision.regression_loss


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder on a line; defaults are the audio base model's."""

    width: int = 384
    kernel: int = 7
    groups: int = 16
    depth: int = 4
    residual: bool = True
    projections: int = 1  # linear maps after the convolutions


def attend(q, k, v, heads, bias):
    """Softmax attention of [N, L, D] queries, keys and values; bias broadcasts to [N, H, L, L]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def hide(padding, like):
    """Attention bias [N, 1, 1, L] that hides padded keys, for padding bool [N, L] or None."""
    if padding is None:
        return 0.0
    bias = torch.zeros(padding.shape, dtype=like.dtype)
    return bias.masked_fill(padding, -torch.inf)[:, None, None]


class Layer(nn.Module):
    """Post-norm block of 1.0; returns its output and the output of its second FFN matrix."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x, bias):
        q, k, v = (self.self_attn[name](x) for name in ("q_proj", "k_proj", "v_proj"))
        attended = self.self_attn["out_proj"](attend(q, k, v, self.heads, bias))
        x = self.self_attn_layer_norm(x + attended)
        ffn = self.fc2(F.gelu(self.fc1(x)))
        return self.final_layer_norm(x + ffn), ffn


class Block(nn.Module):
    """Post-norm block of 2.0: one qkv matrix (rows q, k, v) with biases; returns as `Layer`."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        parts = {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        self.attn = nn.ModuleDict(parts)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        parts = {"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.ModuleDict(parts)

    def forward(self, x, bias):
        q, k, v = self.attn["qkv"](x).chunk(3, dim=-1)
        x = self.norm1(x + self.attn["proj"](attend(q, k, v, self.heads, bias)))
        ffn = self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))
        return self.norm2(x + ffn), ffn


def run(blocks, x, bias=0.0):
    """`layers` (input, then each block's output) and `ffn` (one a block), all [N, L, D]."""
    layers, ffn = [x], []
    for block in blocks:
        x, branch = block(x, bias)
        layers.append(x)
        ffn.append(branch)
    return layers, ffn


class Extractor(nn.Module):
    """Seven convolutions, each with LayerNorm over channels and GELU: [N, samples] -> [N, T, C]."""

    def __init__(self, channels):
        super().__init__()
        inputs = [1] + [channels] * (len(KERNELS) - 1)
        self.conv_layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "0": nn.Conv1d(n, channels, kernel, stride, bias=False),
                    "2": nn.ModuleDict({"1": nn.LayerNorm(channels)}),
                }
            )
            for n, kernel, stride in zip(inputs, KERNELS, STRIDES, strict=True)
        )

    def forward(self, waveforms):
        x = waveforms[:, None]
        for layer in self.conv_layers:
            x = F.gelu(layer["2"]["1"](layer["0"](x).mT)).mT
        return x.mT


def normalize(waveform):
    """Zero mean and unit variance over all samples of [..., samples]; eps 1e-5."""
    return F.layer_norm(waveform, waveform.shape[-1:])


def frames(samples):
    """Frames that the extractor makes of so many samples."""
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def position_layers(width, depth, kernel, groups):
    """The convolutions that stand for positions, each in a list of its own (for the names)."""
    options = {"padding": kernel // 2, "groups": groups}
    return [nn.ModuleList([nn.Conv1d(width, width, kernel, **options)]) for _ in range(depth)]


def convolved(layers, x):
    """What the convolutions add to features [N, T, D]: each with LayerNorm (no affine), GELU."""
    for (convolution,) in layers:
        y = convolution(x.mT).mT
        x = F.gelu(F.layer_norm(y, y.shape[-1:]))
    return x


class Decoder(nn.Module):
    """Convolutions on a line, then linear maps back to D: [N, T, D] -> [N, T, D]."""

    def __init__(self, config, width):
        super().__init__()
        self.residual = config.residual
        inputs = [width] + [config.width] * (config.depth - 1)
        options = {"padding": config.kernel // 2, "groups": config.groups}
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Conv1d(n, config.width, config.kernel, **options)]) for n in inputs
        )
        self.proj = nn.Linear(config.width, width)
        if config.projections == 2:
            first, last = nn.Linear(config.width, 2 * config.width), 2 * config.width
            self.proj = nn.Sequential(first, nn.GELU(), nn.Linear(last, width))

    def forward(self, x):
        for layer in self.blocks:
            y = convolved([layer], x)
            x = x + y if self.residual and x.shape == y.shape else y
        return self.proj(x)


def gather(x, keep):
    """Kept rows of [N, T, D] at keep int [N, K], in that order: [N, K, D]."""
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def scatter(kept, keep, noise):
    """[N, T, D]: outputs [N, K, D] at their places, `noise` [N, T, D] at the others."""
    return noise.scatter(1, keep[..., None].expand(-1, -1, kept.shape[-1]), kept)


def layer_norm(x):
    """Over D, eps 1e-5, no affine."""
    return F.layer_norm(x, x.shape[-1:])


def instance_norm(x):
    """Per row and channel over all T, padding included: biased variance, eps 1e-5."""
    return F.instance_norm(x.mT).mT


@torch.no_grad()
def targets(ffn, top_k, layer=None, final=None):
    """Of the last `top_k` [N, T, D]: each normalised by `layer`, their mean, the mean by `final`.

    Returns ([top_k, N, T, D], [N, T, D], [N, T, D]).
    """
    normalized = torch.stack([x if layer is None else layer(x) for x in ffn[-top_k:]])
    mean = normalized.mean(0)
    return normalized, mean, mean if final is None else final(mean)


@torch.no_grad()
def move_teacher(teacher, student, decay, kind):
    """teacher <- decay * teacher + (1 - decay) * student, by parameter.

    `kind(name)` is "averaged", "copied" (verbatim) or None (the teacher lacks it). A decay of 1
    freezes all, copies included.
    """
    if decay == 1:
        return
    old = dict(teacher.named_parameters())
    for name, new in student.named_parameters():
        if kind(name) == "averaged":
            old[name].mul_(decay).add_(new, alpha=1 - decay)
        elif kind(name) == "copied":
            old[name].copy_(new)


def train(student, teacher, loss_of, kind, rates, decays, clip=None, weight_decay=0.01):
    """len(rates) full steps in place; update u (from 0) has rates[u].

    `loss_of(student, teacher)` gives a scalar. Before every forward but the first the teacher moves
    by decays[u]; after the last update it moves once more, by decays[len(rates)], so that it has
    seen every update (decays[0] is never used). Returns losses and norms before clipping.
    """
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay
    )
    losses, norms = [], []
    for update, rate in enumerate(rates):
        if update:
            move_teacher(teacher, student, decays[update], kind)
        loss = loss_of(student, teacher)
        optimizer.zero_grad()
        loss.backward()
        limit = torch.inf if clip is None else clip
        norms.append(nn.utils.clip_grad_norm_(student.parameters(), limit).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    move_teacher(teacher, student, decays[len(rates)], kind)
    return losses, norms
