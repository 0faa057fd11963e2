"""EfficientNet (arXiv 1905.11946): inverted bottlenecks with squeeze and excitation, channels last.

Padding and residual branches are those of transformers' `models/align/modeling_align.py`, which
published ALIGN weights were made with. Nothing is sharded but the batch: the largest published
tower has 64 M parameters.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from bivl.core.errors import UserError
from bivl.models.layers import Projection, constrain_tokens, drop_path
from bivl.models.spatial import BatchNorm, SpatialConvolution, fan_out
from bivl.models.transformer import Encoded, Tokens

STAGES = ("widths", "repeats", "kernels", "strides", "expansions")
MOST_BLOCKS = 1000


class Bottleneck(NamedTuple):
    """One block. `first` of its stage: it has no residual. `squeezed`: channels between the maps
    of squeeze and excitation. `shift`: a stride of 2 is padded by one less before than behind."""

    inputs: int
    hidden: int
    squeezed: int
    outputs: int
    kernel: int
    stride: int
    first: bool
    shift: bool


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """What a convolutional tower is: stages as of B0, and how they are scaled (here to B7).

    widths, repeats, kernels, strides, expansions: one for each stage. `centred`: numbers of blocks
    whose padding is alike on both sides although they halve the map. decay: of batch norms'
    running statistics, a step. drop_path: stochastic depth of the last block, growing from 0.
    """

    stem: int = 32
    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    width_scale: float = 2.0
    depth_scale: float = 3.1
    multiple: int = 8
    squeeze: float = 0.25
    centred: tuple[int, ...] = ()
    eps: float = 1e-3
    decay: float = 0.99
    drop_path: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        """UserError, in the words of config.model, for what no tower can be."""
        lengths = {len(getattr(self, name)) for name in STAGES}
        if len(lengths) != 1 or 0 in lengths:
            raise UserError(
                f"config.model.{{{', '.join(STAGES)}}} have {sorted(lengths)} numbers; give one "
                "for each stage"
            )
        allowed = {
            "strides": lambda x: x in (1, 2),
            "kernels": lambda x: 0 < x < 100 and x % 2 == 1,
            "centred": lambda x: x >= 0,
        }
        for name in (*STAGES, "centred"):
            right = allowed.get(name, lambda x: 0 < x < 2**20)
            if not all(type(x) is int and right(x) for x in getattr(self, name)):
                raise UserError(
                    f"config.model.{name}={getattr(self, name)} must be whole numbers: kernels odd,"
                    " strides 1 or 2, others positive"
                )
        for name in ("stem", "multiple", "width_scale", "depth_scale", "squeeze", "eps"):
            if not 0 < getattr(self, name) < 2**20:
                raise UserError(f"config.model.{name}={getattr(self, name)} must be positive")
        for name in ("decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.model.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.depth > MOST_BLOCKS:
            raise UserError(
                f"config.model.depth_scale={self.depth_scale} makes {self.depth} blocks, more than "
                f"{MOST_BLOCKS}; lower it"
            )

    @classmethod
    def of(cls, model, dtype: str) -> "EfficientNetConfig":
        """The fields that a mapping `config.model` holds; the others keep their defaults."""
        names = {field.name for field in dataclasses.fields(cls)} & set(model)
        given = {name: model[name] for name in names}
        lists = {k: tuple(v) for k, v in given.items() if k in (*STAGES, "centred")}
        return cls(**(given | lists), dtype=dtype)

    def scaled(self, width: int) -> int:
        """Channels for a width of B0: the nearest multiple, at least nine tenths of what is meant
        (tensorflow/tpu `efficientnet_model.py`, round_filters)."""
        meant = width * self.width_scale
        near = max(self.multiple, int(meant + self.multiple / 2) // self.multiple * self.multiple)
        return near + self.multiple if near < 0.9 * meant else near

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return sum(math.ceil(self.depth_scale * n) for n in self.repeats)

    @property
    def width(self) -> int:
        """Channels of the last block's map."""
        return self.scaled(self.widths[-1])

    def side(self, image_size: int) -> int:
        """Rows and columns of the last map."""
        return image_size // 2 ** (1 + self.strides.count(2))

    def blocks(self) -> tuple[Bottleneck, ...]:
        """All blocks in their order."""
        found, inputs = [], self.scaled(self.stem)
        stages = zip(*(getattr(self, name) for name in STAGES), strict=True)
        for width, repeats, kernel, stride, expansion in stages:
            outputs = self.scaled(width)
            for i in range(math.ceil(self.depth_scale * repeats)):
                squeezed = max(1, int(inputs * self.squeeze))
                channels = (inputs, inputs * expansion, squeezed, outputs)
                shift = len(found) not in self.centred
                found.append(Bottleneck(*channels, kernel, 1 if i else stride, i == 0, shift))
                inputs = outputs
        return tuple(found)


class Block(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection; [B, H, W, C] -> the
    same, or of half the height and width. drop_rate: of the residual branch, examples dropped."""

    block: Bottleneck
    config: EfficientNetConfig
    drop_rate: float

    @nn.compact
    def __call__(self, x, deterministic: bool):
        b, c = self.block, self.config

        def linear(width, name, use_bias):
            options = {"use_bias": use_bias, "kernel_init": fan_out(width), "dtype": c.dtype}
            return Projection((width,), (None, None), name=name, **options)

        def norm(y, name):
            return BatchNorm(c.eps, c.decay, name=name)(y, deterministic)

        y = x
        if b.hidden != b.inputs:
            y = nn.silu(norm(linear(b.hidden, "expand", False)(y), "expand_norm"))
        options = {"shift": b.shift, "dtype": c.dtype, "name": "depthwise"}
        y = SpatialConvolution(b.kernel, b.stride, **options)(y)
        y = nn.silu(norm(y, "depthwise_norm"))
        gate = y.mean((1, 2), keepdims=True, dtype=jnp.float32)
        gate = nn.silu(linear(b.squeezed, "reduce", True)(gate))
        y = y * nn.sigmoid(linear(b.hidden, "excite", True)(gate))
        y = norm(linear(b.outputs, "project", False)(y), "project_norm")
        if b.first or b.stride > 1:
            return y
        if self.drop_rate and not deterministic:
            y = drop_path(y, jnp.float32(self.drop_rate), self.make_rng("dropout"))
        return x + y


class EfficientNet(nn.Module):
    """Tokens of which x is images [B, S, S, 3] -> Encoded: the places of the last map [B, h w, D],
    row by row; with `layers` in `collect` the stem's map and every block's, in their own sizes."""

    config: EfficientNetConfig

    @nn.compact
    def __call__(self, tokens: Tokens, deterministic: bool = True, collect=()) -> Encoded:
        c = self.config
        x = tokens.x.astype(c.dtype)
        x = SpatialConvolution(3, 2, c.scaled(c.stem), dtype=c.dtype, name="stem")(x)
        x = nn.silu(BatchNorm(c.eps, c.decay, name="stem_norm")(x, deterministic))
        maps = [x]
        for i, block in enumerate(c.blocks()):
            x = Block(block, c, c.drop_path * i / c.depth, name=f"block{i}")(x, deterministic)
            maps.append(x)
        maps = [constrain_tokens(x.reshape(len(x), -1, x.shape[-1])) for x in maps]
        return Encoded(maps[-1], tuple(maps) if "layers" in collect else ())
