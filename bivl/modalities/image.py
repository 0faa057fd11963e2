"""Images: host operations from records to arrays, and the embedding from arrays to tokens.

Config keys read here: batch_size, image_size, mask_ratio, masking, model.{patch_size, width,
num_heads, depth, positions, embed_init}, augment, image_mean, image_std.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import augment, images, masking, randaugment
from bivl.modalities import given, labels
from bivl.models.layers import (
    PatchEmbed,
    Vector,
    constrain_tokens,
    gather_kept,
    spread,
    torch_uniform,
    truncated_normal,
    zeros,
)
from bivl.models.positions import LearnedPositions, RelativePositionBias, sincos_2d
from bivl.models.transformer import Tokens

RELATIVE = ("relative", "relative_layers")  # one table for all layers, or one each
POSITIONS = (*RELATIVE, "learned", "sincos", "none")


def grid(config) -> tuple[int, int]:
    """Patches down and across."""
    side, rest = divmod(config.image_size, max(config.model.patch_size, 1))
    if rest or side < 1 or config.model.patch_size < 1:
        raise UserError(
            f"config.image_size={config.image_size} is not a multiple of "
            f"model.patch_size={config.model.patch_size}"
        )
    return side, side


def keeps_all(config) -> bool:
    """Whether masked patches get a mask token (BEiT) and are not left out (data2vec 2.0)."""
    return config.masking.kind == "block"


def mask_sampler(config):
    """The sampler that `config.masking` describes, over the patches."""
    return masking.sampler(config, grid(config))


def inputs(config) -> dict[str, jax.ShapeDtypeStruct]:
    """image uint8 [B, S, S, 3]."""
    B, S = config.batch_size, config.image_size
    return {"image": jax.ShapeDtypeStruct((B, S, S, 3), jnp.uint8)}


def spec(config) -> dict[str, jax.ShapeDtypeStruct]:
    """`inputs` and what the mask sampler gives: mask bool [B, L], or for M clones mask bool
    [B, M, L] and keep int32 [B, M, K]."""
    B = config.batch_size
    masks = mask_sampler(config)(np.random.default_rng(0))
    shapes = {name: jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for name, x in masks.items()}
    return inputs(config) | shapes


def _check(config):
    """UserError for augmentation that no image could survive."""
    a = config.augment
    for key, value, count in (
        ("augment.color_jitter", a.color_jitter, 3),
        ("augment.scale", a.scale, 2),
        ("augment.ratio", a.ratio, 2),
        ("image_mean", config.image_mean, 3),
        ("image_std", config.image_std, 3),
    ):
        if len(value) != count:
            raise UserError(f"config.{key}={value} must have {count} numbers")
    for key in ("scale", "ratio"):
        if not 0 < a[key][0] <= a[key][1]:
            raise UserError(f"config.augment.{key}={a[key]} must be positive, the lower one first")
    if not 0 < a.crop_ratio <= 1:
        raise UserError(f"config.augment.crop_ratio={a.crop_ratio} must lie in (0, 1]")
    if not all(config.image_std):
        raise UserError(f"config.image_std={config.image_std} must be positive")


def _opened(record):
    if "image" not in record:
        raise UserError(
            "the data has no image; set config.data.fields.image to the feature that holds it "
            f"(a record has {sorted(record)})"
        )
    return images.open_image(record["image"])


def train_ops(config):
    """record, rng -> {image, mask, ...}: jitter, flip, random resized crop (as BEiT), masks."""
    image, sample = train_image(config), mask_sampler(config)
    if sum(bool(sample(np.random.default_rng(i))["mask"].any()) for i in range(16)) < 8:
        raise UserError(
            f"config.masking={dict(config.masking)} hides nothing of most images, {grid(config)} "
            f"patches at mask_ratio={config.mask_ratio}; choose smaller blocks or a larger ratio"
        )
    return lambda record, rng: {"image": image(record, rng)} | sample(rng)


def _train_picture(config):
    """record, rng -> Pillow image of S x S pixels, after jitter, flip and random crop."""
    _check(config)
    a, size = config.augment, (config.image_size,) * 2
    kind, scaled = a.get("interpolation", "bicubic"), a.get("scaled_decoding", False)
    draws = {key: tuple(a[key]) for key in ("color_jitter", "scale", "ratio")} | {"flip": a.flip}

    def picture(record, rng):
        opened = _opened(record)
        view = augment.draw_view(rng, opened.size, **draws)
        if scaled:
            view = view.shrunk(opened.shrink(view.shrinkage(size)))
        return augment.show(opened.rgb(), view, size, kind)

    return picture


def train_image(config):
    """record, rng -> uint8 [S, S, 3] as training sees it: jitter, flip, random resized crop, and
    where augment.rand_level is above 0 BEiT-3's RandAugment."""
    picture, a = _train_picture(config), config.augment
    if not (level := a.get("rand_level", 0)):
        return lambda record, rng: np.asarray(picture(record, rng))
    if not 0 < level <= 10:
        raise UserError(f"config.augment.rand_level={level} must lie between 0 and 10")

    def changed(record, rng):
        shown = picture(record, rng)
        return np.asarray(randaugment.rand_augment_pairs(shown, rng, level, a.rand_layers))

    return changed


def labelled_ops(config):
    """record, rng -> {image, label, erase int32 [4]} for fine-tuning: crop, flip, RandAugment, and
    the box that `objectives/mixing.py` erases on the device."""
    picture, a, size = _train_picture(config), config.augment, (config.image_size,) * 2
    count, layers, erase = config.num_classes, a.rand_layers, a.erase
    options = {"magnitude": a.rand_magnitude, "std": a.rand_std, "layers": layers}
    options["fill"] = tuple(round(255 * mean) for mean in config.image_mean)

    def ops(record, rng):
        label = labels.target(record, count)
        image = picture(record, rng)
        if layers:
            image = randaugment.rand_augment(image, rng, **options)
        box = randaugment.erasing_box(rng, size, erase)
        return {"image": np.asarray(image), "label": label, "erase": box}

    return ops


def _eval_image(config):
    """opened image -> uint8 [S, S, 3] as evaluation sees it."""
    a, side = config.augment, config.image_size
    kind, squash = a.get("interpolation", "bicubic"), a.get("squash", False)
    whole = max(a.get("squash_to", 0), side)  # ALIGN cuts out the centre then

    def view(opened):
        picture = opened.rgb()
        if squash:  # all of it, whatever its shape, as BEiT-3 sees pairs
            picture = augment.resize(picture, (whole, whole), kind)
            return np.asarray(augment.center_crop(picture, (side, side)))
        return np.asarray(augment.center_view(picture, side, a.crop_ratio, kind))

    return view


def eval_ops(config):
    """record -> {image, label?, id?}: short side to size / crop_ratio, central crop."""
    view = _eval_image(config)

    def ops(record):
        kept = {k: np.int32(record[k]) for k in ("label", "id") if k in record}
        return {"image": view(_opened(record))} | kept

    return ops


def preprocess(config):
    """image=[...] (uint8 HWC arrays, PIL images or paths) -> {image: float32 [B, S, S, 3]}."""
    view = _eval_image(config)
    mean, std = np.float32(config.image_mean), np.float32(config.image_std)

    def ops(image):
        seen = given.each("image", image, lambda x: view(images.open_image(x)))
        return {"image": (np.stack(seen) / np.float32(255) - mean) / std}

    return ops


def pool(tokens, layout: Tokens):
    """CLS, [B, L, D] -> [B, D], as BEiT's pre-training model is read by its reference."""
    return tokens[:, 0] if layout.special else tokens.mean(1)


def _xavier_flat(key, shape, dtype=jnp.float32):
    """Xavier uniform of a patch kernel [p, p, C, D] seen as one matrix [p p C, D] (MAE's init)."""
    return nn.initializers.xavier_uniform()(key, (math.prod(shape[:-1]), shape[-1])).reshape(shape)


def token_inits(kind: str, patch_values: int):
    """Initialisers of the patch kernel, its bias, and the CLS and mask tokens.

    `patch_values` = p p C. data2vec 2.0 leaves the convolution's bias as PyTorch makes it.
    """
    if kind == "beit":
        return truncated_normal(0.02), zeros, truncated_normal(0.02)
    return _xavier_flat, torch_uniform(patch_values), nn.initializers.normal(1.0)


def normalized(images, mean, std):
    """uint8 images less their mean over their std, in float32; floats are that already."""
    if images.dtype != jnp.uint8:
        return images
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


class Embed(nn.Module):
    """Images to tokens: normalise, embed patches, add positions, mask, prepend CLS.

    A uint8 image is normalised here, on the device; a float image is taken as normalised already.
    `mask_token`: a masked input has a learned token in the masked places (BEiT); without, masked
    tokens are left out and there are M clones of each example, [B M, 1 + K, D] (data2vec 2.0).
    """

    grid: tuple[int, int]
    patch_size: int
    width: int
    num_heads: int
    depth: int
    positions: str
    mask_token: bool
    embed_init: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str

    @nn.compact
    def __call__(self, batch, masked: bool = False, deterministic: bool = True) -> Tokens:
        del deterministic
        *inits, token_init = token_inits(self.embed_init, 3 * self.patch_size**2)
        axes, shape = (None, None, "embed"), (1, 1, self.width)
        options = dict(zip(("kernel_init", "bias_init"), inits, strict=True))
        options |= {"dtype": self.dtype, "name": "patch"}
        images = normalized(batch["image"], self.mean, self.std)
        x = PatchEmbed(self.patch_size, self.width, **options)(images)
        cls_token = Vector(shape, axes, token_init, name="cls_token")()
        if self.mask_token:
            token = Vector(shape, axes, token_init, name="mask_token")()
            x = jnp.where(batch["mask"][..., None], spread(token, x), x) if masked else x
        if self.positions == "sincos":
            x = x + sincos_2d(self.grid, self.width).astype(x.dtype)
        elif self.positions == "learned":
            x = LearnedPositions(token_init, name="positions")(x)
        if masked and not self.mask_token:
            x = gather_kept(x, batch["keep"])
        cls_token = spread(cls_token, x[:, :1])
        x = constrain_tokens(jnp.concatenate([cls_token, x], axis=1))
        bias = None
        if self.positions in RELATIVE:
            options = {"layers": self.depth if self.positions == "relative_layers" else 0}
            options |= {"num_heads": self.num_heads, "name": "relative_position"}
            bias = RelativePositionBias(self.grid, **options)()
        return Tokens(x, special=1, bias=bias)


def make_embed(config, dtype: str) -> Embed:
    """The embedding that `config` describes."""
    m = config.model
    choice("model.positions", m.positions, POSITIONS)
    choice("model.embed_init", m.embed_init, ("beit", "data2vec2"))
    if m.positions == "sincos" and m.width % 4:
        raise UserError(f"config.model.width={m.width} must be a multiple of 4 for sincos")
    if m.positions in RELATIVE and not keeps_all(config):
        raise UserError(
            f"config.model.positions={m.positions!r} needs all tokens; use sincos or learned"
        )
    return Embed(
        grid(config),
        m.patch_size,
        m.width,
        m.num_heads,
        m.depth,
        m.positions,
        keeps_all(config),
        m.embed_init,
        tuple(config.image_mean),
        tuple(config.image_std),
        dtype,
    )
