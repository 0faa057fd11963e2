"""Masked image modeling: BEiT's and BEiT v2's, naming the codes of masked patches.

The codes are those of a frozen tokenizer on the whole crop. BEiT v2 (arXiv 2208.06366, section
2.2) adds patch aggregation: CLS of the last layer and the patches of an earlier one go through a
few more blocks and name the same codes, so that CLS must carry what the early patches lack.
Authority: microsoft/unilm `beit2/modeling_pretrain.py`. aggregation.depth=0 is BEiT (2106.08254).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.data import masking
from bivl.modalities import image
from bivl.models.layers import LayerNorm, Projection, torch_uniform
from bivl.models.transformer import Block, Encoder, EncoderConfig, init_blocks
from bivl.objectives import encoding, frozen
from bivl.objectives.classify import no_update


class Aggregator(nn.Module):
    """`depth` more blocks behind layer `layer`, [B, L, D] -> [B, L, D].

    Their drop path goes on where the schedule of the encoder is after `layer` layers. Their maps
    start as PyTorch makes them, for BEiT builds them after its own initialisation, and only the
    last ones of both branches are divided by sqrt(2 l), l = layer + 1, layer + 2, ...
    """

    config: EncoderConfig
    layer: int
    depth: int

    def _init(self, key):
        c = dataclasses.replace(self.config, depth=self.depth)
        scale = jax.lax.rsqrt(2.0 * (self.layer + 1 + jnp.arange(self.depth)))

        def leaf(path, box, key):
            *_, module, name = (part.key for part in path)
            if module not in ("qkv", "out", "fc1", "fc2"):
                return box
            inputs = c.mlp_dim if module == "fc2" else c.width
            value = torch_uniform(inputs)(key, box.value.shape)
            if name == "kernel" and module in ("out", "fc2"):
                value = value * scale.reshape(-1, *[1] * (value.ndim - 1))
            return box.replace(value=value)

        is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
        blocks = init_blocks(c, key)
        flat, structure = jax.tree_util.tree_flatten_with_path(blocks, is_leaf=is_box)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(flat))
        leaves = [leaf(*entry, key) for entry, key in zip(flat, keys, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    @nn.compact
    def __call__(self, x, bias, deterministic: bool):
        c = self.config
        blocks = nn.unbox(self.param("blocks", self._init))
        rates = jnp.linspace(0.0, c.drop_path, max(c.depth, self.layer + self.depth))
        for i in range(self.depth):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
            random = not deterministic and c.is_random
            rngs = {"dropout": self.make_rng("dropout")} if random else None
            arguments = x, bias, rates[self.layer + i], deterministic
            x, *_ = Block(c).apply({"params": params}, *arguments, rngs=rngs)
        return x


class MaskedImageModel(nn.Module):
    """Embed, encoder, aggregation, and one norm and one head for both."""

    embed: nn.Module
    encoder: EncoderConfig
    classes: int
    layer: int
    depth: int

    def setup(self):
        c = dataclasses.replace(self.encoder, final_norm=False)
        self.trunk = Encoder(c)
        self.norm = LayerNorm(c.eps, c.dtype)
        if self.depth:
            self.aggregator = Aggregator(c, self.layer, self.depth)
        self.lm_head = Projection((self.classes,), ("embed", None), dtype=c.dtype)

    def encode(self, batch, masked=False, deterministic=True, collect=()):
        """-> (Tokens, Encoded)."""
        tokens = self.embed(batch, masked, deterministic)
        encoded = self.trunk(tokens, deterministic, collect)
        return tokens, encoded._replace(tokens=self.norm(encoded.tokens))

    def __call__(self, batch, places, deterministic: bool = True) -> list:
        """Logits [B, K, V] in float32 at `places` int [B, K] of the masked input's patches: the
        encoder's and, where there is aggregation, those of CLS with the early patches."""
        tokens = self.embed(batch, True, deterministic)
        encoded = self.trunk(tokens, deterministic, ("layers",) if self.depth else ())
        outputs = [encoded.tokens]
        if self.depth:
            early = encoded.layers[self.layer][:, tokens.special :]
            x = jnp.concatenate([encoded.tokens[:, : tokens.special], early], axis=1)
            outputs.append(self.aggregator(x, tokens.bias, deterministic))
        chosen = places[..., None] + tokens.special
        kept = [self.norm(jnp.take_along_axis(x, chosen, axis=1)) for x in outputs]
        return [self.lm_head(x).astype(jnp.float32) for x in kept]


def masked_places(mask, count: int):
    """bool [B, L] -> (places int [B, K], valid bool [B, K]): the masked places in order, filled up
    with others that are not valid where a row has fewer than K."""
    places = jnp.argsort(~mask, axis=1, stable=True)[:, :count]
    return places, jnp.take_along_axis(mask, places, axis=1)


def named(logits, codes, weight):
    """Logits [B, K, V], codes and weight [B, K] -> mean cross-entropy in nats, accuracy."""
    total = jnp.maximum(weight.sum(), 1)
    picked = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    each = jax.nn.logsumexp(logits, axis=-1) - picked
    right = logits.argmax(-1) == codes
    return (each * weight).sum() / total, (right * weight).sum() / total


def check(config) -> None:
    """UserError for settings that cannot be."""
    choice("modality", config.modality, ("image",))
    choice("masking.kind", config.masking.kind, ("block",))
    a, depth = config.aggregation, config.model.depth
    if a.depth and not 1 <= a.layer < depth:
        raise UserError(
            f"config.aggregation.layer={a.layer} must lie between 1 and model.depth={depth} less "
            "one; aggregation.depth=0 goes without"
        )
    if a.depth and config.model.positions == "relative_layers":
        raise UserError(
            "config.model.positions='relative_layers' has no table for the aggregation; use "
            "'relative'"
        )


def make(config) -> Objective:
    """Reads `modality model aggregation masking mask_ratio teacher dtype teacher_dtype`."""
    check(config)
    teacher = frozen.open(config, "a tokenizer, such as vqkd", "codes")
    frozen.check_grid(teacher, config)
    spec, a = image.spec(config), config.aggregation
    classes = teacher.outputs or teacher.config.codebook.size
    hidden = masking.block_count(config.mask_ratio, image.grid(config))
    encoder = EncoderConfig.of(config.model, config.dtype)
    embed = image.make_embed(config, config.dtype)
    model = MaskedImageModel(embed, encoder, classes, a.layer, a.depth)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        places = jnp.zeros((1, hidden), jnp.int32)
        params = model.init({"params": key}, batch, places)["params"]
        return params, teacher.state(jax.random.fold_in(key, 1)), {}

    def targets(params, held, extras, batch, key):
        return teacher.tell("codes", held, {"image": frozen.view(teacher, batch["image"])})

    def loss(params, extras, batch, codes, key):
        places, valid = masked_places(batch["mask"], hidden)
        weight, rngs = valid.astype(jnp.float32), {"dropout": key}
        logits = model.apply({"params": params}, batch, places, deterministic=False, rngs=rngs)
        codes = jnp.take_along_axis(codes, places, axis=1)
        losses, accuracies = zip(*(named(x, codes, weight) for x in logits), strict=True)
        counts = jax.ops.segment_sum(weight.reshape(-1), codes.reshape(-1), classes)
        metrics = {
            "mim_loss": losses[0],
            "mim_accuracy": accuracies[0],
            "most_frequent": counts.max() / jnp.maximum(weight.sum(), 1),
        }
        value = losses[0]
        if a.depth:
            metrics |= {"aggregation_loss": losses[1], "aggregation_accuracy": accuracies[1]}
            value = value + a.weight * losses[1]
        return value, {"weight": weight.sum(), "metrics": metrics}

    def encode(params, batch, collect):
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def masked(params, extras, batch):
        tokens, encoded = model.apply({"params": params}, batch, True, method="encode")
        return encoded.tokens[:, tokens.special :]

    predict = encoding.predictions(encode, image, config) | {"masked": masked}
    ops = image.train_ops(config), image.eval_ops(config), image.preprocess(config)
    options = {"frozen": teacher.checkpoints}
    return Objective(spec, init, targets, loss, no_update, predict, *ops, **options)
