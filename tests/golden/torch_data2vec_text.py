"""data2vec 1.0 text in PyTorch: the independent model and loss bivl is checked against.

Written from the paper (arXiv 2202.03555) and the behaviour of fairseq's
`examples/data2vec/models/data2vec_text.py`; parameter names are its own. Shape letters: B batch,
L tokens, D width. Needs only torch; runs in whatever float type the parameters have.
"""

import dataclasses

import torch
import torch_postnorm as parts
from torch import nn

BOS, PAD, EOS, UNK = range(4)
PREFIX = "encoder.sentence_encoder."


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; defaults are the base model's. No dropout."""

    vocabulary: int = 50265
    positions: int = 514  # rows of the table, two more than tokens
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072


def positions(tokens):
    """Rows of the position table: 2, 3, .. over tokens that are no padding, 1 at padding."""
    filled = tokens != PAD
    return filled.cumsum(1) * filled + 1


class SentenceEncoder(nn.Module):
    """Embeddings and post-norm layers."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.embed_tokens = nn.Embedding(config.vocabulary, width, PAD)
        self.embed_positions = nn.Embedding(config.positions, width, PAD)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            parts.Layer(width, config.num_heads, config.mlp_dim) for _ in range(config.depth)
        )

    def forward(self, tokens):
        """Tokens int [B, L] -> sum of embeddings [B, L, D], `layers`, `ffn`."""
        embedded = self.embed_tokens(tokens) + self.embed_positions(positions(tokens))
        padding = tokens == PAD
        x = self.layernorm_embedding(embedded).masked_fill(padding[..., None], 0.0)
        return embedded, *parts.run(self.layers, x, parts.hide(padding, x))


class Data2VecText(nn.Module):
    """Encoder and regression head; a teacher is the same without using its head."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.encoder = nn.ModuleDict(
            {"sentence_encoder": SentenceEncoder(config), "regression_head": head}
        )

    def encode(self, tokens):
        """As `SentenceEncoder`."""
        return self.encoder["sentence_encoder"](tokens)

    def predict(self, tokens, mask):
        """Predictions [n, D] of the tokens at mask bool [B, L], row by row; they must be hidden."""
        return self.encoder["regression_head"](self.encode(tokens)[1][-1][mask])


def kind(name):
    """How the teacher follows a parameter: layers averaged, embeddings and their norm copied."""
    if not name.startswith(PREFIX):
        return None
    return "averaged" if name.startswith(PREFIX + "layers.") else "copied"


def teacher_tokens(tokens, mask, full):
    """The teacher's input: all tokens (paper), or only those at `mask`, else padding (shipped)."""
    return tokens if full else tokens.masked_fill(~mask, PAD)


@torch.no_grad()
def teacher_targets(teacher, tokens, mask, top_k, full):
    """The three stages of `torch_postnorm.targets`: LayerNorm of each layer, mean, nothing."""
    ffn = teacher.encode(teacher_tokens(tokens, mask, full))[2]
    return parts.targets(ffn, top_k, layer=parts.layer_norm)


def loss(student, teacher, tokens, source, mask, top_k, full, beta=4.0):
    """Smooth L1, summed over D, mean over masked positions. `source` is what the student sees."""
    target = teacher_targets(teacher, tokens, mask, top_k, full)[2][mask]
    return parts.regression_loss(student.predict(source, mask), target, beta, 1.0)
