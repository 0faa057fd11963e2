"""What stands on an encoder: regression heads of pre-training, classifiers of fine-tuning, and
heads that answer questions about images."""

import jax.numpy as jnp
from flax import linen as nn

from bivl.models.layers import LayerNorm, Projection, gelu, torch_uniform, truncated_normal
from bivl.models.transformer import Tokens

HEAD_INITS = ("truncated", "normal", "torch")


class ClassificationHead(nn.Module):
    """Tokens [B, L, D] -> logits [B, C].

    pool `mean`: of the valid content tokens; `first`: the first token. `norm` puts a LayerNorm
    before the last map, `hidden` dropout, Linear(D, D) and tanh (RoBERTa's head). The last kernel
    is N(0, 0.02^2) times `scale`.
    """

    classes: int
    pool: str
    norm: bool
    hidden: bool
    dropout: float
    scale: float
    eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, layout: Tokens, deterministic: bool):
        x = mean_content(x, layout) if self.pool == "mean" else x[:, 0]
        if self.norm:
            x = LayerNorm(self.eps, self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic)
        if self.hidden:
            init, width = nn.initializers.normal(0.02), x.shape[-1]
            options = {"kernel_init": init, "dtype": self.dtype, "name": "dense"}
            x = jnp.tanh(Projection((width,), ("embed", None), **options)(x))
            x = nn.Dropout(self.dropout)(x, deterministic)
        init = nn.initializers.normal(0.02 * self.scale)
        options = {"kernel_init": init, "dtype": "float32", "name": "logits"}
        return Projection((self.classes,), ("embed", None), **options)(x)


class AnswerHead(nn.Module):
    """Tokens [B, L, D] of an image and a question -> a logit for every answer [B, C].

    BEiT-3's (`beit3/modeling_finetune.py`): the first token, CLS of the image, through LayerNorm,
    Linear(D, D) and tanh, then Linear(D, 2 D), LayerNorm, GELU and a last map.
    """

    answers: int
    eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, layout: Tokens, deterministic: bool):
        del layout, deterministic
        x, width = x[:, 0], x.shape[-1]
        x = LayerNorm(self.eps, self.dtype, name="pooler_norm")(x)
        square = Projection((width,), ("embed", None), dtype=self.dtype, name="pooler")
        x = jnp.tanh(square(x))
        x = Projection((2 * width,), ("embed", "mlp"), dtype=self.dtype, name="fc")(x)
        x = gelu(LayerNorm(self.eps, self.dtype, name="norm")(x))
        return Projection((self.answers,), ("mlp", None), name="logits")(x)


class ComparisonHead(nn.Module):
    """Tokens [2 B, L, D] of the first and the second image, in turns, each with the same text ->
    logits [B, C].

    BEiT-3's (`beit3/modeling_finetune.py`): CLS and `<s>` of both, 4 D, through LayerNorm,
    Linear(4 D, 2 D), LayerNorm, GELU and a last map. Both kernels begin `scale` times as large.
    """

    classes: int
    scale: float = 0.001
    eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, layout: Tokens, deterministic: bool):
        del deterministic
        width, init = x.shape[-1], truncated_normal(0.02 * self.scale)
        x = jnp.stack([x[:, 0], x[:, layout.images]], axis=1).reshape(-1, 4 * width)
        x = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        options = {"kernel_init": init, "dtype": self.dtype, "name": "dense"}
        x = Projection((2 * width,), ("embed", "mlp"), **options)(x)
        x = gelu(LayerNorm(self.eps, self.dtype, name="norm2")(x))
        options |= {"dtype": "float32", "name": "logits"}
        return Projection((self.classes,), ("mlp", None), **options)(x)


def mean_content(x, layout: Tokens):
    """[B, L, D] -> [B, D] float32: mean over the valid tokens behind the special ones."""
    content = x[:, layout.special :].astype(jnp.float32)
    if layout.padding is None:
        return content.mean(1)
    real = ~layout.padding[:, layout.special :, None]
    return (content * real).sum(1) / jnp.maximum(real.sum(1), 1)


class RegressionHead(nn.Module):
    """[B, L, D] -> [B, L, D]: one linear map, or Linear(D, 2 D), GELU, Linear(2 D, D).

    init: `truncated` N(0, 0.02^2) cut at one std (BEiT), `normal` not cut, `torch` the default of
    PyTorch's Linear, bias too.
    """

    layers: int = 1
    init: str = "truncated"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        if self.layers == 2:
            x = gelu(self._linear(2 * width, x.shape[-1], ("embed", "mlp"), "fc")(x))
        axes = ("embed", None) if self.layers == 1 else ("mlp", "embed")
        return self._linear(width, x.shape[-1], axes, "projection")(x)

    def _linear(self, outputs: int, inputs: int, axes, name: str) -> Projection:
        options = {"kernel_init": truncated_normal(0.02)}
        if self.init == "normal":
            options = {"kernel_init": nn.initializers.normal(0.02)}
        if self.init == "torch":
            options = dict.fromkeys(("kernel_init", "bias_init"), torch_uniform(inputs))
        return Projection((outputs,), axes, dtype=self.dtype, name=name, **options)
