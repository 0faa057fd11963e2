"""data2vec 2.0 text in PyTorch: the independent model and loss bivl is checked against.

Written from the paper (arXiv 2212.07525) and the behaviour of fairseq's `examples/data2vec`
(`models/data2vec2.py`, `models/modalities/text.py`); parameter names are its own. Shape letters:
B batch, M masks an example, L tokens, K kept ones, D width. Needs only torch; runs in whatever
float type the parameters have.
"""

import dataclasses

import torch
import torch_postnorm as parts
from torch import nn
from torch_data2vec_text import PAD, positions

DECODER = parts.DecoderConfig(768, 9, 1, 5, residual=False, projections=2)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; defaults are the base model's. No dropout."""

    vocabulary: int = 50265
    positions: int = 514
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    decoder: parts.DecoderConfig = DECODER


class LocalEncoder(nn.Module):
    """Token and position embeddings and their norm. Padding is left as it comes out."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width, PAD)
        self.embed_positions = nn.Embedding(config.positions, config.width, PAD)
        self.layernorm_embedding = nn.LayerNorm(config.width)

    def forward(self, tokens):
        """Tokens int [B, L] -> [B, L, D]."""
        embedded = self.embed_tokens(tokens) + self.embed_positions(positions(tokens))
        return self.layernorm_embedding(embedded)


class Data2Vec2Text(nn.Module):
    """Embeddings, blocks, decoder. A teacher uses its `blocks` only."""

    def __init__(self, config):
        super().__init__()
        front = {
            "local_encoder": LocalEncoder(config),
            "decoder": parts.Decoder(config.decoder, config.width),
        }
        self.modality_encoders = nn.ModuleDict({"TEXT": nn.ModuleDict(front)})
        self.blocks = nn.ModuleList(
            parts.Block(config.width, config.num_heads, config.mlp_dim) for _ in range(config.depth)
        )

    def features(self, tokens):
        """Tokens int [B, L] -> [B, L, D]."""
        return self.modality_encoders["TEXT"]["local_encoder"](tokens)

    def encode(self, features, padding=None):
        """`layers` and `ffn` of all of [B, L, D]; padded keys, bool [B, L], are hidden."""
        return parts.run(self.blocks, features, parts.hide(padding, features))

    def encode_kept(self, features, keep):
        """`layers` and `ffn`, each [B M, K, D], of keep int [B, M, K]; all in full blocks."""
        rows = features.repeat_interleave(keep.shape[1], 0)
        return self.encode(parts.gather(rows, keep.flatten(0, 1)))

    def predict(self, features, keep, noise):
        """Predictions [B M, L, D]; `noise` of that shape stands in the hidden places."""
        kept = self.encode_kept(features, keep)[0][-1]
        decoder = self.modality_encoders["TEXT"]["decoder"]
        return decoder(parts.scatter(kept, keep.flatten(0, 1), noise))


def kind(name):
    """How the teacher follows a parameter: it has the blocks, and averages them."""
    return "averaged" if name.startswith("blocks.") else None


@torch.no_grad()
def teacher_targets(teacher, features, top_k, layer=parts.instance_norm, final=None):
    """Three stages (`torch_postnorm.targets`); base: instance norm of each layer, mean."""
    return parts.targets(teacher.encode(features.detach())[1], top_k, layer, final)


def loss(student, teacher, tokens, mask, keep, noise, top_k):
    """Squared error, summed over D, mean over masked places of all clones; mask [B, M, L]."""
    features = student.features(tokens)
    target = teacher_targets(teacher, features, top_k)[2].repeat_interleave(mask.shape[1], 0)
    hidden = mask.flatten(0, 1)
    prediction = student.predict(features, keep, noise)[hidden]
    return parts.regression_loss(prediction, target[hidden], 0.0, 1.0)
