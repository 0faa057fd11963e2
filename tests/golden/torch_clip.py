"""CLIP in PyTorch: the independent computation that bivl's is checked against.

Written from the paper (arXiv 2103.00020, section 2.4) and the behaviour of `clip/model.py` in
openai/CLIP, whose parameter names these are. Shape letters: B batch, L tokens (CLS first), D width,
E common space. Needs only torch; runs in whatever float type the parameters have.
"""

import torch
from torch import nn

EPS = 1e-5


class Block(nn.Module):
    """Pre-norm block, x sigmoid(1.702 x) between the maps of its MLP."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden)})
        self.mlp["c_proj"] = nn.Linear(hidden, width)

    def forward(self, x, hidden):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=hidden, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class Blocks(nn.Module):
    """Maps [B, L, D] -> its input and every block's output."""

    def __init__(self, width, heads, hidden, depth):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))

    def forward(self, x, hidden=None):
        layers = [x]
        for block in self.resblocks:
            layers.append(block(layers[-1], hidden))
        return layers


class Visual(nn.Module):
    """Images [B, 3, S, S] -> layers, tokens after the last norm, projection of CLS."""

    def __init__(self, side, patch, width, heads, hidden, depth, space):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.transformer = Blocks(width, heads, hidden, depth)
        self.proj = nn.Parameter(torch.zeros(width, space))

    def forward(self, images):
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        layers = self.transformer(self.ln_pre(x))
        tokens = self.ln_post(layers[-1])
        return layers, tokens, tokens[:, 0] @ self.proj


class CLIP(nn.Module):
    """Both towers: `visual`, and the text's at the top."""

    def __init__(self, visual, words, rows, width, heads, hidden, depth, space):
        super().__init__()
        self.visual = Visual(*visual, space)
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.zeros(rows, width))
        self.transformer = Blocks(width, heads, hidden, depth)
        self.ln_final = nn.LayerNorm(width, eps=EPS)
        self.text_projection = nn.Parameter(torch.zeros(width, space))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def texts(self, ids):
        """Ids [B, L] -> layers, tokens after the last norm, projection of the highest id's."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        layers = self.transformer(x, hidden)
        tokens = self.ln_final(layers[-1])
        last = tokens[torch.arange(len(ids)), ids.argmax(1)]
        return layers, tokens, last @ self.text_projection
