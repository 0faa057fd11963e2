"""data2vec 1.0 audio in PyTorch: the independent model and loss bivl is checked against.

Written from the paper (arXiv 2202.03555) and the behaviour of fairseq's
`examples/data2vec/models/data2vec_audio.py` and `fairseq/models/wav2vec/wav2vec2.py`; parameter
names are its own. Shape letters: B batch, S samples, T frames, C channels of the extractor,
D width. Needs only torch; runs in whatever float type the parameters have.
"""

import dataclasses

import torch
import torch_postnorm as parts
from torch import nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; defaults are the base model's. No dropout."""

    channels: int = 512
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    position_depth: int = 5
    position_kernel: int = 19
    position_groups: int = 16


class Encoder(nn.Module):
    """Conv positions, norm, post-norm layers: all that a teacher has."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        shape = (config.position_depth, config.position_kernel, config.position_groups)
        self.pos_conv = nn.ModuleList(parts.position_layers(width, *shape))
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            parts.Layer(width, config.num_heads, config.mlp_dim) for _ in range(config.depth)
        )

    def forward(self, x, padding=None):
        """Features [B, T, D], padding bool [B, T] or None -> positions, `layers`, `ffn`."""
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        added = parts.convolved(self.pos_conv, x)
        x = self.layer_norm(x + added)
        return added, *parts.run(self.layers, x, parts.hide(padding, x))


class Data2VecAudio(nn.Module):
    """Front-end, encoder, head. A teacher uses its `encoder` only."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.mask_emb = nn.Parameter(torch.rand(width))
        self.feature_extractor = parts.Extractor(config.channels)
        self.layer_norm = nn.LayerNorm(config.channels)
        self.post_extract_proj = nn.Linear(config.channels, width)
        self.encoder = Encoder(config)
        self.final_proj = nn.Linear(width, width)

    def features(self, waveforms):
        """Normalised waveforms [B, S] -> outputs of the extractor [B, T, C], features [B, T, D]."""
        extracted = self.feature_extractor(waveforms)
        return extracted, self.post_extract_proj(self.layer_norm(extracted))

    def encode(self, features, mask=None, padding=None):
        """As `Encoder`, with the mask embedding at mask bool [B, T]."""
        if mask is not None:
            features = torch.where(mask[..., None], self.mask_emb, features)
        return self.encoder(features, padding)

    def predict(self, features, mask, padding=None):
        """Predictions [n, D] of the masked frames, row by row."""
        return self.final_proj(self.encode(features, mask, padding)[1][-1][mask])


def kind(name):
    """How the teacher follows a parameter: conv positions copied, the rest averaged."""
    if not name.startswith("encoder."):
        return None
    return "copied" if name.startswith("encoder.pos_conv.") else "averaged"


@torch.no_grad()
def teacher_targets(teacher, features, top_k, padding=None, final=None):
    """Three stages (`torch_postnorm.targets`): instance norm of each layer, mean, `final`."""
    ffn = teacher.encoder(features.detach(), padding)[2]
    return parts.targets(ffn, top_k, parts.instance_norm, final)


def loss(student, teacher, waveforms, mask, top_k, padding=None):
    """Squared error, sum over D divided by sqrt(D), mean over masked frames."""
    features = student.features(waveforms)[1]
    target = teacher_targets(teacher, features, top_k, padding)[2][mask]
    prediction = student.predict(features, mask, padding)
    return parts.regression_loss(prediction, target, 0.0, prediction.shape[-1] ** -0.5)
