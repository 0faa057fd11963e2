"""The multiway encoder of BEiT-3: one attention over all tokens, experts of their own for images
and texts.

`decoupled` is the architecture of the released checkpoints: nothing but the softmax is shared
(torchscale `architecture/encoder.py`, `component/multiway_network.py`). `shared` is the paper's
(arXiv 2208.10442, section 2.1): one attention for all, an FFN for images and one for texts in every
layer, and in the top layers one for pairs.

Tokens of an image come first, those of a text after them; where a batch has but one of the two, the
parameters of the other are neither read nor moved by its gradient. The parts are static slices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.models import attention_kernels
from bivl.models.attention import attend, hidden
from bivl.models.layers import LayerNorm, constrain_tokens
from bivl.models.transformer import (
    REMAT,
    Block,
    Encoded,
    EncoderConfig,
    Tokens,
    init_blocks,
    run_layers,
)

MODALITIES = ("image", "text")
SHARED = ("norm1", "attention")  # what all tokens share in the paper's layout


@dataclasses.dataclass(frozen=True)
class MultiwayConfig(EncoderConfig):
    """experts: `decoupled` or `shared`; pair_layers: how many top layers of `shared` have an FFN
    for pairs (3 in the paper's giant)."""

    experts: str = "decoupled"
    pair_layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        choice("model.experts", self.experts, ("decoupled", "shared"))
        if not 0 <= self.pair_layers <= self.depth * (self.experts == "shared"):
            raise UserError(
                f"config.model.pair_layers={self.pair_layers} must lie between 0 and model.depth="
                f"{self.depth}, and be 0 where model.experts is decoupled"
            )
        if self.input_norm or self.layer_drop:
            raise UserError("config.model.input_norm and layer_drop are not for multiway encoders")


def split_modalities(x, images: int):
    """Tokens [B, L, ...], the first `images` of them an image's -> {modality: its part}; a part
    without tokens is left out."""
    parts = {"image": x[:, :images], "text": x[:, images:]}
    return {name: part for name, part in parts.items() if part.shape[1]}


class Multiway(nn.Module):
    """Tokens -> Encoded, as `models/transformer.py`'s Encoder, `Tokens.images` telling the parts.

    Parameters of layers are stacked, [N, ...], as there: `image_blocks` and `text_blocks`, whole
    blocks (`decoupled`) or norm2 and FFN beside the `shared_blocks`; `pair_experts` are the top
    layers' [pair_layers, ...].
    """

    config: MultiwayConfig

    @nn.compact
    def __call__(self, tokens: Tokens, deterministic: bool = True, collect=()) -> Encoded:
        c = self.config
        x = split_modalities(constrain_tokens(tokens.x.astype(c.dtype)), tokens.images)
        seen = hidden(c.attention, tokens.bias, tokens.padding)
        first = _joined(x)
        random = not deterministic and c.is_random
        keys = jax.random.split(self.make_rng("dropout"), c.depth) if random else None
        collected: dict[str, tuple] = {}
        for blocks, layers in self._stacks(tuple(x)):
            inputs = blocks, jnp.linspace(0.0, c.drop_path, c.depth)[layers]
            inputs += (keys[layers] if random else inputs[1],)
            body = self._body(seen, random, deterministic, collect)
            x, outs = run_layers(body, x, inputs, c.scan)
            collected = {name: (*collected.get(name, ()), *out) for name, out in outs.items()}
        if "layers" in collected:
            collected["layers"] = (first, *collected["layers"])
        if c.final_norm:
            x = {
                name: LayerNorm(c.eps, c.dtype, name=f"{name}_norm")(part)
                for name, part in x.items()
            }
        return Encoded(_joined(x), **collected)

    def _stacks(self, present):
        """-> [(blocks by modality, their layers)]: with pairs' experts the top layers apart."""
        c = self.config

        def own(name):
            return nn.unbox(self.param(f"{name}_blocks", lambda key: self._init(key, name)))

        if c.experts == "decoupled":
            return [({name: own(name) for name in present}, slice(0, c.depth))]
        shared = own("shared")
        experts = {name: shared | own(name) for name in present}
        if not c.pair_layers or len(present) == 1:
            return [(experts, slice(0, c.depth))]
        top = c.depth - c.pair_layers
        pair = nn.unbox(self.param("pair_experts", lambda key: self._init(key, "pair")))
        both = jax.tree.map(lambda x: x[top:], shared) | pair
        below = jax.tree.map(lambda x: x[:top], experts)
        stacks = [(below, slice(0, top))] if top else []
        return [*stacks, (dict.fromkeys(present, both), slice(top, c.depth))]

    def _init(self, key, name):
        c = self.config
        blocks = init_blocks(c, key)
        if c.experts == "decoupled":
            return blocks
        kept = {k: v for k, v in blocks.items() if (k in SHARED) == (name == "shared")}
        if name != "pair":
            return kept
        return jax.tree.map(lambda x: x[-c.pair_layers :], kept)

    def _body(self, seen, random, deterministic, collect):
        """-> function (parts, one layer) -> (parts, what `collect` names). seen: bias, padding."""
        c = self.config
        (bias, padding), weighed = seen, "weights" in collect
        kernel = attention_kernels.chosen(c.attention, c.dtype, deterministic, weighed)
        block = Block(c)

        def body(x, layer):
            params, rate, key = layer
            rngs = {"dropout": key} if random else None

            def call(name, method, *inputs):
                return block.apply({"params": params[name]}, *inputs, rngs=rngs, method=method)

            heads = [call(name, "heads", part) for name, part in x.items()]
            q, k, v = (jnp.concatenate(each, axis=2) for each in zip(*heads, strict=True))
            dropout = c.attention_dropout if random else 0.0
            drop_key = jax.random.fold_in(key, 1) if dropout else None
            attended, weights = attend(q, k, v, bias, padding, dropout, drop_key, kernel)
            done, start = {}, 0
            for name, part in x.items():
                stop = start + part.shape[1]
                inputs = part, attended[:, :, start:stop], rate, not random
                done[name], start = call(name, "finish", *inputs), stop
            x = {name: out[0] for name, out in done.items()}
            named = {"layers": x, "ffn": {name: out[1] for name, out in done.items()}}
            found = {name: _joined(parts) for name, parts in named.items() if name in collect}
            return x, found | ({"weights": weights} if weighed else {})

        if REMAT[c.remat]:
            return jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=not c.scan)
        return body


def _joined(parts):
    first, *others = parts.values()
    return jnp.concatenate([first, *others], axis=1) if others else first
