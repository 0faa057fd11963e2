"""VQ-KD: the visual tokenizer of BEiT v2, a codebook from which a teacher's features are rebuilt.

Encoder, 32 numbers a patch, the nearest of 8,192 unit vectors, decoder, cosine to a frozen
teacher's patch features. Paper: arXiv 2208.06366, section 2.1; authority where they differ:
microsoft/unilm `beit2/modeling_vqkd.py`. The codebook lies in `extras` and is moved by its own
rule (models/quantizer.py), not by gradients. The teacher is any pre-trained model of images here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import image
from bivl.models import quantizer
from bivl.models.layers import (
    PatchEmbed,
    Projection,
    Vector,
    constrain_tokens,
    spread,
    torch_uniform,
)
from bivl.models.positions import LearnedPositions
from bivl.models.transformer import Encoded, Encoder, EncoderConfig, Tokens
from bivl.objectives import encoding, frozen

NORMAL = nn.initializers.normal(0.02)
PROJECTED = "patch_features"


class Embed(nn.Module):
    """Maps [B, h p, w p, C] -> tokens: patches behind a CLS, and learned positions of all.

    Not the embedding of modalities/image.py, where CLS has no position: numbers and names of
    BEiT's fine-tuning model, of which VQ-KD is built; the convolution starts as PyTorch makes it.
    """

    patch_size: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, maps) -> Tokens:
        init = torch_uniform(self.patch_size**2 * maps.shape[-1])
        options = {"kernel_init": init, "bias_init": init, "dtype": self.dtype, "name": "patch"}
        x = PatchEmbed(self.patch_size, self.width, **options)(maps)
        axes, shape = (None, None, "embed"), (1, 1, self.width)
        cls_token = spread(Vector(shape, axes, NORMAL, name="cls_token")(), x[:, :1])
        x = LearnedPositions(NORMAL, name="positions")(jnp.concatenate([cls_token, x], axis=1))
        return Tokens(constrain_tokens(x), special=1)


class TaskLayers(nn.Module):
    """Linear(D, D), tanh, Linear(D, outputs)."""

    outputs: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        options = {"kernel_init": NORMAL, "dtype": self.dtype}
        x = jnp.tanh(Projection((x.shape[-1],), ("embed", None), name="hidden", **options)(x))
        return Projection((self.outputs,), ("embed", None), name="projection", **options)(x)


class VQKD(nn.Module):
    """Encoder and decoder; `embed` and `trunk` are the encoder's, as in every model of images."""

    encoder: EncoderConfig
    decoder: EncoderConfig
    patch_size: int
    grid: tuple[int, int]
    code_width: int
    teacher_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self):
        self.embed = Embed(self.patch_size, self.encoder.width, self.encoder.dtype)
        self.trunk = Encoder(self.encoder)
        self.encode_task = TaskLayers(self.code_width)  # always in float32
        self.decode_embed = Embed(1, self.decoder.width, self.decoder.dtype)
        self.decode_trunk = Encoder(self.decoder)
        self.decode_task = TaskLayers(self.teacher_width, self.decoder.dtype)

    def encode(self, batch, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded) of the patches alone: nothing trains what CLS says."""
        tokens = self.embed(image.normalized(batch["image"], self.mean, self.std))
        encoded = self.trunk(tokens, deterministic, collect)
        layers = tuple(x[:, 1:] for x in encoded.layers)
        return Tokens(tokens.x[:, 1:]), Encoded(encoded.tokens[:, 1:], layers)

    def units(self, batch, deterministic: bool = True):
        """Unit vectors [B, L, E], float32."""
        return quantizer.unit(self.encode_task(self.encode(batch, deterministic)[1].tokens))

    def decode(self, vectors, deterministic: bool = True):
        """[B, L, E] -> the teacher's features as they can be rebuilt, [B, L, D']."""
        maps = vectors.reshape(len(vectors), *self.grid, vectors.shape[-1])
        tokens = self.decode_embed(maps)
        return self.decode_task(self.decode_trunk(tokens, deterministic).tokens[:, 1:])

    def __call__(self, batch, vectors, deterministic: bool = True):
        """With codebook vectors [V, E] -> rebuilt [B, L, D'], (units, chosen, codes)."""
        units = self.units(batch, deterministic)
        codes = quantizer.nearest(jax.lax.stop_gradient(units), vectors)
        chosen = vectors[codes]
        rebuilt = self.decode(quantizer.straight_through(units, chosen), deterministic)
        return rebuilt, (units, chosen, codes)


def cosine_loss(rebuilt, target):
    """Mean over tokens of 1 - cosine of [..., D'], in float32."""
    return (1 - (quantizer.unit(rebuilt) * quantizer.unit(target)).sum(-1)).mean()


def check(config) -> None:
    """UserError for a codebook that cannot be."""
    c, (h, w) = config.codebook, image.grid(config)
    patches = config.batch_size * h * w
    if not 1 <= c.size <= patches:
        raise UserError(
            f"config.codebook.size={c.size} must lie between 1 and the {patches} patches of a "
            "batch, from which k-means draws its centres; raise batch_size or lower it"
        )
    for key in ("width", "kmeans", "window"):
        if c[key] < 1:
            raise UserError(f"config.codebook.{key}={c[key]} must be at least 1")
    if not 0 <= c.decay <= 1:
        raise UserError(f"config.codebook.decay={c.decay} must lie in [0, 1]")
    if config.decoder.depth < 1:
        raise UserError(f"config.decoder.depth={config.decoder.depth} must be at least 1")


def make(config) -> Objective:
    """Reads `modality model decoder codebook teacher dtype teacher_dtype`, and what images need
    but masks."""
    check(config)
    teacher = frozen.open(config, "a model of images, such as data2vec_image", "encode")
    frozen.check_grid(teacher, config)
    spec, c = image.inputs(config), config.codebook
    encoder = EncoderConfig.of(config.model, config.dtype)
    model = VQKD(
        encoder,
        dataclasses.replace(encoder, depth=config.decoder.depth),
        config.model.patch_size,
        image.grid(config),
        c.width,
        teacher.outputs or features(teacher, spec["image"]),
        tuple(config.image_mean),
        tuple(config.image_std),
    )

    def init(key):
        batch = {"image": jnp.zeros((1, *spec["image"].shape[1:]), jnp.uint8)}
        book = quantizer.create(jax.random.fold_in(key, 1), c.size, c.width)
        params = model.init({"params": key}, batch, book["vectors"])["params"]
        return params, teacher.state(jax.random.fold_in(key, 2)), {"codebook": book}

    def targets(params, held, extras, batch, key):
        images = frozen.view(teacher, batch["image"])
        tokens, (h, w) = tell(teacher, held, images), image.grid(config)
        return tokens[:, -h * w :]  # special tokens stand in front

    def loss(params, extras, batch, target, key):
        rngs, vectors = {"dropout": key}, extras["codebook"]["vectors"]
        rebuilt, (units, chosen, codes) = model.apply(
            {"params": params}, batch, vectors, deterministic=False, rngs=rngs
        )
        cosine, quantization = cosine_loss(rebuilt, target), quantizer.commitment(units, chosen)
        metrics = {"cosine_loss": cosine, "quantization_loss": quantization}
        units = jax.lax.stop_gradient(units)
        aux = {"weight": jnp.float32(codes.size), "metrics": metrics, "rows": {"units": units}}
        aux["sums"] = quantizer.totals(units, codes, c.size)
        return cosine + c.beta * quantization, aux

    def encode(params, batch, collect):
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def codes(params, extras, batch):
        units = model.apply({"params": params}, batch, method="units")
        return quantizer.nearest(units, extras["codebook"]["vectors"])

    predict = encoding.predictions(encode, image, config) | {"codes": codes}
    del predict["attention"]  # CLS, whose it would be, is no output here
    ops = train_ops(config), image.eval_ops(config), image.preprocess(config)
    options = {"frozen": teacher.checkpoints}
    return Objective(spec, init, targets, loss, updater(config), predict, *ops, **options)


def features(teacher, spec) -> int:
    """How wide the teacher's tokens of a batch of images are."""
    size = teacher.config.image_size
    seen = jax.ShapeDtypeStruct((spec.shape[0], size, size, 3), spec.dtype)
    if PROJECTED in teacher.predict:
        return teacher.shape(PROJECTED, {"image": seen}).shape[-1]
    return teacher.shape("encode", {"image": seen})["tokens"].shape[-1]


def tell(teacher, held, images):
    """The teacher's features [B, L, D'], patches last: projected, as CLIP's are, or its tokens."""
    if PROJECTED in teacher.predict:
        return teacher.tell(PROJECTED, held, {"image": images})
    return teacher.tell("encode", held, {"image": images})["tokens"]


def train_ops(config):
    """record, rng -> {image}."""
    seen = image.train_image(config)
    return lambda record, rng: {"image": seen(record, rng)}


def updater(config):
    """-> an objective's `update`: moves the codebook.

    The first update has a random codebook: all it is good for is the k-means of its vectors, those
    of the global batch. (The code does it before it computes the loss, on every GPU for itself.)
    """
    c = config.codebook

    def first(book, aux):
        units = aux["rows"]["units"].reshape(-1, c.width)
        vectors = quantizer.fit(jax.random.key(config.seed), units, c.size, c.kmeans)
        return vectors, quantizer.totals(units, quantizer.nearest(units, vectors), c.size)

    def later(book, aux):
        return book["vectors"], aux["sums"]

    def update(teacher, extras, params, aux, step):
        book = extras["codebook"]
        vectors, found = jax.lax.cond(book["fitted"], later, first, book, aux)
        idle = jnp.where(found["counts"] > 0, 0, jnp.minimum(book["idle"] + 1, quantizer.NEVER))
        metrics = {
            "codebook_usage": (idle < c.window).mean(),
            "codebook_perplexity": quantizer.perplexity(found["counts"]),
        }
        vectors = quantizer.moved(vectors, found, c.decay)
        book = {"vectors": vectors, "idle": idle, "fitted": jnp.ones((), bool)}
        return teacher, {"codebook": book}, metrics

    return update
