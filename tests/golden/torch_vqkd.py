"""VQ-KD and BEiT v2 in PyTorch: the independent computation that bivl's are checked against.

Written from the paper (arXiv 2208.06366) and the behaviour of `beit2/` in microsoft/unilm, whose
parameter names these are. Shape letters: B batch, T patches, L tokens (CLS first), D width, V codes
of width E. Needs only torch; runs in whatever float type the parameters have.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch_data2vec_vision import Attention, Block, RelativePositionBias


class PlainBlock(nn.Module):
    """Pre-norm block without layer scale."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.width, config.mlp_dim
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(config)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x), 0.0)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PatchModel(nn.Module):
    """Maps [B, C, h, w] -> patches [B, T, D]: convolution, CLS, positions, blocks, norm, no CLS."""

    def __init__(self, config, channels, patch, depth, patches):
        super().__init__()
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        conv = nn.Conv2d(channels, width, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])


def task_layer(width, outputs):
    """Two linear maps around a tanh."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))


class VQKD(nn.Module):
    """Encoder, decoder and the maps behind them; the codebook is given to `forward`."""

    def __init__(self, config, decoder_depth, code_width, teacher_width):
        super().__init__()
        grid, width = config.grid, config.width
        self.grid = grid
        self.encoder = PatchModel(config, 3, config.patch_size, config.depth, grid**2)
        self.decoder = PatchModel(config, code_width, 1, decoder_depth, grid**2)
        self.encode_task_layer = task_layer(width, code_width)
        self.decode_task_layer = task_layer(width, teacher_width)

    def forward(self, images, codebook):
        """uint8 images [B, h, w, 3], codebook [V, E] -> dict of tensors."""
        dtype = codebook.dtype
        x = images.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
        z = self.encode_task_layer(self.encoder(x))
        u = F.normalize(z, dim=-1)
        distances = ((u[:, :, None] - codebook) ** 2).sum(-1)
        codes = distances.argmin(-1)
        e = codebook[codes]
        q = u + (e - u).detach()
        out = self.decode_task_layer(self.decoder(q.mT.unflatten(2, (self.grid, self.grid))))
        two = distances.topk(2, largest=False).values
        return {"units": u, "codes": codes, "chosen": e, "output": out, "margin": two.diff().min()}


def losses(found, target):
    """1 - cosine averaged over tokens; squared distance to the codes averaged over tokens and E."""
    cosine = 1 - F.cosine_similarity(found["output"], target, dim=-1, eps=1e-12)
    return cosine.mean(), F.mse_loss(found["units"], found["chosen"].detach())


@torch.no_grad()
def move_codebook(codebook, units, codes, decay=0.99):
    """One update, code by code."""
    new = codebook.clone()
    for j in range(len(codebook)):
        members = units[codes == j]
        if len(members):
            mean = F.normalize(members.mean(0), dim=0)
            new[j] = F.normalize(decay * codebook[j] + (1 - decay) * mean, dim=0)
    return new


@torch.no_grad()
def kmeans(samples, centres, iterations):
    """Cosine k-means, cluster by cluster; gives the centres after every iteration."""
    history = []
    for _ in range(iterations):
        nearest = (samples @ centres.T).argmax(-1)
        clusters = [samples[nearest == j] for j in range(len(centres))]
        pairs = zip(clusters, centres, strict=True)
        centres = torch.stack([F.normalize(c.mean(0), dim=0) if len(c) else e for c, e in pairs])
        history.append(centres)
    return torch.stack(history)


class Beit2(nn.Module):
    """Masked image modeling; `early` and `extra` are the layer and the number of added blocks."""

    def __init__(self, config, codes, early, extra):
        super().__init__()
        width, self.early = config.width, early
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2))
        conv = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.rel_pos_bias = RelativePositionBias(config.grid, config.num_heads)
        self.blocks = nn.ModuleList(Block(config, 0.0) for _ in range(config.depth))
        self.cls_pt_layers = nn.ModuleList(Block(config, 0.0) for _ in range(extra))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.lm_head = nn.Linear(width, codes)

    def forward(self, images, mask):
        """Normalised images [B, h, w, 3], mask bool [B, T] -> two logits [N, V] at masked patches,
        in row order: of the encoder and of CLS with the early patches."""
        x = self.patch_embed["proj"](images.permute(0, 3, 1, 2)).flatten(2).mT
        x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        bias, early = self.rel_pos_bias(), None
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, bias)[0]
            early = x[:, 1:] if number == self.early else early
        y = torch.cat([x[:, :1], early], 1)
        for block in self.cls_pt_layers:
            y = block(y, bias)[0]
        return [self.lm_head(self.norm(part)[:, 1:][mask]) for part in (x, y)]
