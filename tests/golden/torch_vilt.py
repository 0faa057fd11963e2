"""ViLT in PyTorch: the independent computation that bivl's is checked against.

Written from the paper (arXiv 2102.03334, section 3.1) and the behaviour of transformers'
`models/vilt/modeling_vilt.py`, whose parameter names these are, for square images of one size.
Shape letters: B batch, L tokens of the text, N patches, D width, V words. Needs only torch; runs in
whatever float type the parameters have.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Embeddings(nn.Module):
    """Ids [B, L] and images [B, 3, S, S] -> [B, L + 1 + N, D]."""

    def __init__(self, words, rows, side, patch, width, eps):
        super().__init__()
        self.text_embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(rows, width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, eps=eps),
            }
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, patch)})
        self.token_type_embeddings = nn.Embedding(2, width)

    def forward(self, ids, images):
        t, kinds = self.text_embeddings, self.token_type_embeddings.weight
        texts = t["word_embeddings"](ids) + t["position_embeddings"].weight[: ids.shape[1]]
        texts = t["LayerNorm"](texts + t["token_type_embeddings"].weight[0])
        patches = self.patch_embeddings["projection"](images).flatten(2).transpose(1, 2)
        first = self.cls_token.expand(len(patches), 1, -1)
        patches = torch.cat([first, patches], 1) + self.position_embeddings
        return torch.cat([texts + kinds[0], patches + kinds[1]], 1)


class Layer(nn.Module):
    """Pre-norm block; hidden: bool [B, L + 1 + N], True = not to be seen."""

    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        names = ("query", "key", "value")
        own = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        out = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.attention = nn.ModuleDict({"attention": own, "output": out})
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps) for _ in range(2))
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})
        self.heads = heads

    def forward(self, x, hidden):
        own, y = self.attention["attention"], self.layernorm_before(x)
        q, k, v = (
            own[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        read = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](read)
        y = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](y)


class ViLT(nn.Module):
    """ViltForMaskedLM with a decoder of its own."""

    def __init__(self, words, rows, side, patch, width, heads, hidden, depth, eps=1e-5):
        super().__init__()
        self.vilt = nn.Module()
        self.vilt.embeddings = Embeddings(words, rows, side, patch, width, eps)
        layers = (Layer(width, heads, hidden, eps) for _ in range(depth))
        self.vilt.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.vilt.layernorm = nn.LayerNorm(width, eps=eps)
        self.vilt.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})
        norm = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=eps)}
        parts = {"transform": nn.ModuleDict(norm), "decoder": nn.Linear(width, words)}
        self.mlm_score = nn.ModuleDict(parts)

    def forward(self, ids, padding, images):
        """-> layers, tokens, pooled, logits of words [B, L, V]; padding bool [B, L]."""
        layers = [self.vilt.embeddings(ids, images)]
        hidden = F.pad(padding, (0, layers[0].shape[1] - ids.shape[1]))
        for layer in self.vilt.encoder["layer"]:
            layers.append(layer(layers[-1], hidden))
        tokens = self.vilt.layernorm(layers[-1])
        pooled = torch.tanh(self.vilt.pooler["dense"](tokens[:, 0]))
        head = self.mlm_score["transform"]
        named = head["LayerNorm"](F.gelu(head["dense"](tokens[:, : ids.shape[1]])))
        return layers, tokens, pooled, self.mlm_score["decoder"](named)


def transport(cost, steps=50, beta=0.5):
    """The plan [n, m] of IPOT (arXiv 1802.04307, algorithm 1) for one cost [m, n]."""
    m, n = cost.shape
    kernel, plan, across = torch.exp(-cost.T / beta), torch.ones(n, m).to(cost), 1 / m
    across = torch.full((m,), across).to(cost)
    for _ in range(steps):
        weighted = kernel * plan
        down = 1 / (n * (weighted @ across))
        across = 1 / (m * (weighted.T @ down))
        plan = torch.diag(down) @ weighted @ torch.diag(across)
    return plan
