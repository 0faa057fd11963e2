"""The Transformer encoder: pre-, post- and sub-LN blocks, looped or scanned over stacked layers."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.models import attention_kernels
from bivl.models.attention import BIASES, Attention, attend, hidden
from bivl.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Mlp,
    Vector,
    constrain_tokens,
    drop_path,
    spread,
    torch_kernel,
    truncated_normal,
    xavier_uniform,
)

NORMS = ("pre", "post", "sub")
RATES = ("drop_path", "dropout", "attention_dropout", "activation_dropout", "layer_drop")
INITS = {  # the kernels' initialiser, and what rescales those of a layer afterwards
    "truncated": (truncated_normal(0.02), ""),  # N(0, 0.02^2) cut at one std, as BEiT does
    "normal": (nn.initializers.normal(0.02), ""),  # not cut: BERT, fairseq
    "beit": (truncated_normal(0.02), "depth"),
    "normal_beit": (nn.initializers.normal(0.02), "depth"),
    "magneto": (xavier_uniform, "gain"),
    "scratch": (truncated_normal(0.02, 2.0), "gain"),
    "torch": (torch_kernel, ""),  # but biases are zero
    "clip": (nn.initializers.normal(1.0), "clip"),
}
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is. `norm` is the place of LayerNorm: `pre`, `post` or `sub` (Magneto);
    `attention` how it is computed, see models/attention_kernels.py."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm: str = "pre"
    eps: float = 1e-6
    qkv_bias: str = "qkv"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layer_drop: float = 0.0
    activation: str = "gelu"
    input_norm: bool = False
    final_norm: bool = True
    init: str = "truncated"
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False
    attention: str = "xla"

    def __post_init__(self):
        """UserError, in the words of config.model, for what no encoder can be."""
        for name in ("width", "depth", "num_heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"config.model.{name}={getattr(self, name)} must be at least 1")
        if self.width % self.num_heads:
            raise UserError(
                f"config.model.width={self.width} is not a multiple of "
                f"model.num_heads={self.num_heads}"
            )
        choice("model.norm", self.norm, NORMS)
        choice("model.qkv_bias", self.qkv_bias, BIASES)
        choice("model.remat", self.remat, REMAT)
        choice("model.init", self.init, INITS)
        choice("model.activation", self.activation, ACTIVATIONS)
        for name in RATES:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.model.{name}={getattr(self, name)} must lie in [0, 1)")
        attention_kernels.check(dataclasses.asdict(self))

    @classmethod
    def of(cls, model, dtype: str) -> "EncoderConfig":
        """The fields that a mapping `config.model` holds; the others keep their defaults."""
        names = {field.name for field in dataclasses.fields(cls)} & set(model)
        config = cls(**{name: model[name] for name in names}, dtype=dtype)
        attention_kernels.check(model)  # also the bias that the embedding would learn
        return config

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers."""
        return any(getattr(self, name) for name in RATES)


class Block(nn.Module):
    """One layer, [B, L, D] -> (x, ffn, weights): block output, the FFN branch after its layer scale
    and before dropout and residual (data2vec's "ffn" target), attention weights [B, H, L, L], or
    None where they are not asked for and a kernel attends."""

    config: EncoderConfig

    def setup(self):
        c = self.config
        options = {"inner_norm": c.norm == "sub", "eps": c.eps, "dtype": c.dtype}
        options["kernel_init"] = INITS[c.init][0]
        self.attention = Attention(c.width, c.num_heads, c.qkv_bias, **options)
        options |= {"dropout": c.activation_dropout, "activation": c.activation}
        self.mlp = Mlp(c.mlp_dim, **options)
        self.norm1, self.norm2 = (LayerNorm(c.eps, c.dtype) for _ in range(2))
        if c.layer_scale:
            init = nn.initializers.constant(c.layer_scale)
            self.scale1, self.scale2 = (Vector((c.width,), (None,), init) for _ in range(2))
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, x, bias, drop_rate, deterministic: bool, padding=None, weights=False):
        c = self.config
        kernel = attention_kernels.chosen(c.attention, c.dtype, deterministic, weights)
        dropout = 0.0 if deterministic else c.attention_dropout
        key = self.make_rng("dropout") if dropout else None
        q, k, v = self.heads(x)
        attended, weights = attend(q, k, v, bias, padding, dropout, key, kernel)
        return *self.finish(x, attended, drop_rate, deterministic), weights

    def heads(self, x):
        """The first half: [B, L, D] -> q, k, v, each [B, H, L, d]."""
        return self.attention.heads(x if self.config.norm == "post" else self.norm1(x))

    def finish(self, x, attended, drop_rate, deterministic: bool):
        """The second half: x and what its heads have read, [B, H, L, d] -> (x, ffn)."""
        c = self.config
        post = c.norm == "post"

        def scaled(y, name):
            return y * spread(getattr(self, name)(), y) if c.layer_scale else y

        def dropped(y):
            y = self.drop(y, deterministic)
            if c.drop_path and not deterministic:
                y = drop_path(y, drop_rate, self.make_rng("dropout"))
            return y

        x = x + dropped(scaled(self.attention.merge(attended), "scale1"))
        x = self.norm1(x) if post else x
        ffn = scaled(self.mlp(x if post else self.norm2(x), deterministic), "scale2")
        x = x + dropped(ffn)
        x = self.norm2(x) if post else x
        return constrain_tokens(x), ffn


def init_blocks(config: EncoderConfig, key):
    """The parameters of all blocks, stacked [N, ...] and boxed.

    What rescales them: `depth`, BEiT's `fix_init_weight`: in layer l (from 1) the last matrices of
    both branches by 1 / sqrt(2 l); `gain`, Magneto (arXiv 2210.06423, section 3): the values, the
    last matrix of attention and both of the FFN by sqrt(ln(2 N)); `clip`, the text tower of
    openai/CLIP (`clip/model.py`): q, k, v to std D^-1/2, the first map of the FFN to (2 D)^-1/2,
    the last matrices to (2 N D)^-1/2.
    """
    c, rule = dataclasses.replace(config, attention="xla"), INITS[config.init][1]
    gain = math.sqrt(math.log(2 * c.depth))
    last = (("attention", "out"), ("mlp", "fc2"))

    def one(key, layer):
        x = jnp.zeros((1, 1, c.width), c.dtype)
        params = Block(c).init(key, x, None, 0.0, True)["params"]
        scales = {}
        if rule == "depth":
            scales = dict.fromkeys(last, jax.lax.rsqrt(2.0 * (layer + 1)))
        if rule == "gain":
            scales = dict.fromkeys((*last, ("mlp", "fc1")), gain)
            scales["attention", "qkv"] = jnp.array([1.0, 1.0, gain])[:, None, None]
        if rule == "clip":
            scales = dict.fromkeys(last, (2 * c.depth * c.width) ** -0.5)
            scales |= {("attention", "qkv"): c.width**-0.5, ("mlp", "fc1"): (2 * c.width) ** -0.5}
        for (module, name), scale in scales.items():
            kernel = params[module][name]["kernel"]
            params[module][name]["kernel"] = jax.tree.map(lambda k, s=scale: k * s, kernel)
        return params

    return _add_layer_axis(jax.vmap(one)(jax.random.split(key, c.depth), jnp.arange(c.depth)))


def _add_layer_axis(tree):
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: box.replace(names=("layers", *box.names)), tree, is_leaf=is_box)


class Tokens(NamedTuple):
    """What a modality's `Embed` hands to an encoder."""

    x: jax.Array
    """[B, L, D], the special tokens first."""
    special: int = 0
    """How many special tokens (CLS, ...) stand before the content tokens."""
    bias: jax.Array | None = None
    """Added to attention logits; broadcasts to [B, H, L, L]. With five axes each layer has its own,
    which `Encoder` alone understands."""
    padding: jax.Array | None = None
    """bool [B, L], True = pad; absent where nothing can be padded. `attention="cudnn"` takes
    pads to stand last; a modality where others follow them refuses it."""
    images: int = 0
    """How many of the first tokens are an image's, where texts' tokens may follow."""


class Encoded(NamedTuple):
    """What an encoder returns; the tuples are empty unless asked for by `collect`."""

    tokens: jax.Array
    """[B, L, D] after the final norm."""
    layers: tuple = ()
    """depth + 1 arrays [B, L, D]: the input of block 0, then every block's output."""
    ffn: tuple = ()
    """depth arrays [B, L, D], see Block."""
    weights: tuple = ()
    """depth arrays [B, H, L, L]."""


class Encoder(nn.Module):
    """Tokens -> Encoded. `collect` names what to return besides: `layers`, `ffn`, `weights`.

    Parameters of all blocks are stored stacked, [N, ...] under `blocks`, so that the config choices
    `scan` and `remat` change neither a checkpoint nor a number.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Tokens, deterministic: bool = True, collect=()) -> Encoded:
        c = self.config
        x = constrain_tokens(tokens.x.astype(c.dtype))
        if c.input_norm:
            x = LayerNorm(c.eps, c.dtype, name="input_norm")(x)
        x = nn.Dropout(c.dropout if c.input_norm else 0.0)(x, deterministic)
        bias, padding = hidden(c.attention, tokens.bias, tokens.padding)
        blocks = nn.unbox(self.param("blocks", lambda key: init_blocks(c, key)))
        rates = jnp.linspace(0.0, c.drop_path, c.depth)
        random = not deterministic and c.is_random
        keys = jax.random.split(self.make_rng("dropout"), c.depth) if random else rates
        shared, own = (None, bias) if bias is not None and bias.ndim == 5 else (bias, None)

        def body(x, layer):
            params, rate, key, own = layer
            rngs = {"dropout": key} if random else None
            inputs = x, shared if own is None else own, rate, deterministic, padding
            out = Block(c).apply({"params": params}, *inputs, "weights" in collect, rngs=rngs)
            if random and c.layer_drop:  # the whole layer, for the whole batch
                keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - c.layer_drop)
                out = (jnp.where(keep, out[0], x), *out[1:])
            named = dict(zip(("layers", "ffn", "weights"), out, strict=True))
            return out[0], {name: named[name] for name in collect}

        if REMAT[c.remat]:
            body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=not c.scan)
        y, collected = run_layers(body, x, (blocks, rates, keys, own), c.scan)
        if "layers" in collected:
            collected["layers"] = (x, *collected["layers"])
        if c.final_norm:
            y = LayerNorm(c.eps, c.dtype, name="norm")(y)
        return Encoded(y, **collected)


def run_layers(body, x, stacked, scan: bool):
    """Runs `body(x, layer) -> (x, dict of outputs)` over trees stacked [N, ...], as a scan or as a
    loop; returns x and {name: its N outputs}."""
    return (_scan if scan else _loop)(body, x, stacked)


def _loop(body, x, stacked):
    """Split once, not indexed layer by layer: the gradient is then one concatenation."""
    leaves, structure = jax.tree.flatten(stacked)
    depth = leaves[0].shape[0]
    pieces = [[y.squeeze(0) for y in jax.lax.split(leaf, [1] * depth)] for leaf in leaves]
    outs = []
    for i in range(depth):
        x, out = body(x, jax.tree.unflatten(structure, [piece[i] for piece in pieces]))
        outs.append(out)
    return x, {name: tuple(out[name] for out in outs) for name in outs[0]}


def _scan(body, x, stacked):
    x, outs = jax.lax.scan(body, x, stacked)
    return x, {name: tuple(out[i] for i in range(out.shape[0])) for name, out in outs.items()}
