"""Two encoders, one of images and one of texts, that meet in one space of vectors (CLIP, ALIGN).

No token of one ever sees the other's. Of a tower that is not there, nothing is made.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.models.efficientnet import EfficientNet, EfficientNetConfig
from bivl.models.image_text import INITIAL_TEMPERATURE
from bivl.models.layers import Projection, Vector, xavier_uniform
from bivl.models.transformer import Encoder, EncoderConfig

MODALITIES = ("image", "text")
FIELDS = {"image": ("image",), "text": ("tokens", "padding")}  # what a batch has of each
HEADS = {"image": "vision_head", "text": "language_head"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def capped(x, top: float):
    """min(x, top) whose gradient, where x is above, only leads back."""
    return jnp.minimum(x, top)


def _capped_fwd(x, top):
    return capped(x, top), x


def _capped_bwd(top, x, dy):
    return (jnp.where((x < top) | (dy > 0), dy, 0),)


capped.defvjp(_capped_fwd, _capped_bwd)


class Projections(nn.Module):
    """Linear maps without bias into the common space, N(0, 1 / D) at first, and the logarithm of
    the scale of similarities where there are both."""

    width: int
    present: tuple[str, ...]
    dtype: str = "float32"

    def setup(self):
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        options = {"use_bias": False, "kernel_init": init, "dtype": self.dtype}
        for name in self.present:
            setattr(self, HEADS[name], Projection((self.width,), ("embed", None), **options))
        if len(self.present) == 2:
            init = nn.initializers.constant(math.log(1 / INITIAL_TEMPERATURE))
            self.logit_scale = Vector((), (), init)

    def project(self, x, modality: str):
        """[..., D] -> [..., E], float32."""
        return getattr(self, HEADS[modality])(x).astype(jnp.float32)

    def log_scale(self, top: float = 0.0):
        """Logarithm of what similarities are multiplied by; held to `top`, 0: to nothing."""
        scale = self.logit_scale()
        return capped(scale, math.log(top)) if top else scale


class TextProjection(nn.Module):
    """ALIGN's: a map with bias of texts alone onto the width of the images' vectors, and, where
    there are both, the learned temperature that similarities are divided by."""

    width: int
    present: tuple[str, ...]
    start: float
    dtype: str = "float32"

    def setup(self):
        if "text" in self.present:
            options = {"kernel_init": xavier_uniform, "dtype": self.dtype}
            self.language_head = Projection((self.width,), ("embed", None), **options)
        if len(self.present) == 2:
            self.temperature = Vector((), (), nn.initializers.constant(self.start))

    def project(self, x, modality: str):
        """[..., D] -> [..., E], float32."""
        return (self.language_head(x) if modality == "text" else x).astype(jnp.float32)

    def log_scale(self, top: float = 0.0):
        """As in Projections."""
        value = self.temperature()
        return -jnp.log(jnp.negative(capped(-value, -1 / top)) if top else value)


class Towers(nn.Module):
    """Embeddings, encoders and projections, each None where there is no such tower.

    `text_embed` has besides `last(ids)`, the token that stands for its text, int [B]; an image's
    is its first, or the mean of all where that is not special. `width` of the common space, 0 for
    none; `temperature`: where to start, for heads as ALIGN has them, 0 for CLIP's.
    """

    image_embed: nn.Module | None
    text_embed: nn.Module | None
    image: EncoderConfig | EfficientNetConfig | None
    text: EncoderConfig | None
    width: int
    temperature: float = 0.0
    dtype: str = "float32"

    @property
    def present(self) -> tuple[str, ...]:
        """The towers there are."""
        return tuple(name for name in MODALITIES if getattr(self, name))

    def setup(self):
        for name in self.present:
            config = getattr(self, name)
            trunk = EfficientNet if isinstance(config, EfficientNetConfig) else Encoder
            setattr(self, f"{name}_trunk", trunk(config))
        if self.width and self.temperature:
            self.heads = TextProjection(self.width, self.present, self.temperature, self.dtype)
        elif self.width:
            self.heads = Projections(self.width, self.present, self.dtype)

    def encode(self, batch, modality: str, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded, pooled [B, D]) of the images or the texts of a batch."""
        tokens = getattr(self, f"{modality}_embed")(batch)
        encoded = getattr(self, f"{modality}_trunk")(tokens, deterministic, collect)
        if modality == "image":
            x = encoded.tokens
            pooled = x[:, 0] if tokens.special else x.mean(1, dtype=jnp.float32).astype(x.dtype)
            return tokens, encoded, pooled
        last = self.text_embed.last(batch["tokens"])[:, None, None]
        return tokens, encoded, jnp.take_along_axis(encoded.tokens, last, axis=1)[:, 0]

    def embeddings(self, batch, modality: str, deterministic: bool = True):
        """Unit vectors [B, E], float32; without projections those of `pooled`."""
        x = self.encode(batch, modality, deterministic)[2]
        x = self.heads.project(x, modality) if self.width else x.astype(jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def patch_features(self, batch, modality: str = "image"):
        """The projection of every patch, [B, h w, E]: what BEiT v2's tokenizer takes from CLIP
        (microsoft/unilm `beit2/modeling_vqkd.py`)."""
        x = self.encode(batch, modality)[1].tokens[:, 1:]
        return self.heads.project(x, modality) if self.width else x

    def log_scale(self, top: float = 0.0):
        """Logarithm of the scale of similarities."""
        return self.heads.log_scale(top)

    def __call__(self, batch):
        """Reads every parameter, for initialisation alone."""
        vectors = [self.embeddings(batch, name) for name in self.present]
        return (*vectors, self.log_scale()) if len(vectors) == 2 and self.width else vectors
