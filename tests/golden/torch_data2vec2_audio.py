"""data2vec 2.0 audio in PyTorch: the independent model and loss bivl is checked against.

Written from the paper (arXiv 2212.07525) and the behaviour of fairseq's `examples/data2vec`
(`models/data2vec2.py`, `models/modalities/{base,audio}.py`); parameter names are its own. Shape
letters: B batch, M masks an example, S samples, T frames, K kept ones, C channels of the extractor,
D width, H heads. Needs only torch; runs in whatever float type the parameters have.
"""

import dataclasses

import torch
import torch_postnorm as parts
from torch import nn

PREFIX = "modality_encoders.AUDIO."


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; defaults are the base model's. No dropout."""

    channels: int = 512
    width: int = 768
    depth: int = 12  # main blocks
    prenet_depth: int = 0
    num_heads: int = 12
    mlp_dim: int = 3072
    position_depth: int = 5
    position_kernel: int = 19
    position_groups: int = 16
    decoder: parts.DecoderConfig = parts.DecoderConfig()


def slopes(heads):
    """ALiBi slopes [H]; other counts than powers of two borrow every other slope of twice as many
    heads as the largest power below has."""
    power = 1 << (heads.bit_length() - 1)
    values = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    values += [2 ** (-4 * k / power) for k in range(1, 2 * power + 1, 2)]
    return torch.tensor(values[:heads], dtype=torch.float64)


def alibi(heads, length):
    """Bias before its scale, [H, T, T]: minus slope times distance."""
    place = torch.arange(length)
    return -slopes(heads)[:, None, None] * (place[:, None] - place).abs()


class AudioEncoder(nn.Module):
    """What fairseq keeps under `modality_encoders.AUDIO`."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.alibi_scale = nn.Parameter(torch.ones(1, 1, config.num_heads, 1, 1))
        self.local_encoder = parts.Extractor(config.channels)
        self.project_features = nn.ModuleDict(
            {"1": nn.LayerNorm(config.channels), "2": nn.Linear(config.channels, width)}
        )
        shape = (config.position_depth, config.position_kernel, config.position_groups)
        layers = enumerate(parts.position_layers(width, *shape), start=1)
        self.relative_positional_encoder = nn.ModuleDict({str(c): layer for c, layer in layers})
        blocks = (
            parts.Block(width, config.num_heads, config.mlp_dim) for _ in range(config.prenet_depth)
        )
        self.context_encoder = nn.ModuleDict(
            {"norm": nn.LayerNorm(width), "blocks": nn.ModuleList(blocks)}
        )
        self.decoder = parts.Decoder(config.decoder, width)

    def positions(self, features):
        """What the convolutions add to features [N, T, D]."""
        return parts.convolved(self.relative_positional_encoder.values(), features)

    def bias(self, length, keep=None):
        """Attention bias [1, H, T, T], or [N, H, K, K] between the frames at keep int [N, K]."""
        bias = self.alibi_scale[0].clamp_min(0) * alibi(self.alibi_scale.shape[2], length)
        if keep is None:
            return bias
        return torch.stack([bias[0][:, row][:, :, row] for row in keep])


class Data2Vec2Audio(nn.Module):
    """Front-end, blocks, decoder. A teacher is the same without extractor and decoder."""

    def __init__(self, config):
        super().__init__()
        self.modality_encoders = nn.ModuleDict({"AUDIO": AudioEncoder(config)})
        self.blocks = nn.ModuleList(
            parts.Block(config.width, config.num_heads, config.mlp_dim) for _ in range(config.depth)
        )

    @property
    def front(self):
        """The modality encoder."""
        return self.modality_encoders["AUDIO"]

    def features(self, waveforms):
        """Normalised waveforms [B, S] -> outputs of the extractor [B, T, C], features [B, T, D]."""
        extracted = self.front.local_encoder(waveforms)
        project = self.front.project_features
        return extracted, project["2"](project["1"](extracted))

    def encode(self, features, mask=None, keep=None):
        """Positions [N, T, D] at every frame, `layers` and `ffn` of the main blocks.

        Without mask and keep: N = B, all frames. With mask bool [B, M, T] and keep int [B, M, K]:
        N = B M, the kept frames; the convolutions see zeros at the hidden ones.
        """
        x, length = features, features.shape[1]
        if keep is None:
            added = self.front.positions(x)
            x, bias = x + added, self.front.bias(length)
        else:
            x, keep = x.repeat_interleave(keep.shape[1], 0), keep.flatten(0, 1)
            added = self.front.positions(x.masked_fill(mask.flatten(0, 1)[..., None], 0.0))
            x = parts.gather(x, keep) + parts.gather(added, keep)
            bias = self.front.bias(length, keep)
        context = self.front.context_encoder
        x = parts.run(context["blocks"], context["norm"](x), bias)[0][-1]
        return added, *parts.run(self.blocks, x, bias)

    def predict(self, features, mask, keep, noise):
        """Predictions [B M, T, D]; `noise` of that shape stands in the hidden places."""
        kept = self.encode(features, mask, keep)[1][-1]
        return self.front.decoder(parts.scatter(kept, keep.flatten(0, 1), noise))


def kind(name):
    """How the teacher follows a parameter: everything averaged but extractor and decoder."""
    absent = ("local_encoder.", "project_features.", "decoder.")
    return None if name.startswith(tuple(PREFIX + part for part in absent)) else "averaged"


@torch.no_grad()
def teacher_targets(teacher, features, top_k):
    """The three stages of `torch_postnorm.targets`: instance norm of each layer, mean, nothing."""
    return parts.targets(teacher.encode(features.detach())[2], top_k, parts.instance_norm)


def loss(student, teacher, waveforms, mask, keep, noise, top_k):
    """Squared error, sum over D by sqrt(D), mean over masked frames of all clones."""
    features = student.features(waveforms)[1]
    target = teacher_targets(teacher, features, top_k)[2].repeat_interleave(mask.shape[1], 0)
    hidden = mask.flatten(0, 1)
    prediction = student.predict(features, mask, keep, noise)[hidden]
    return parts.regression_loss(prediction, target[hidden], 0.0, prediction.shape[-1] ** -0.5)
