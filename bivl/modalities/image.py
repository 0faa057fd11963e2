"""Images: host operations from records to arrays, and the embedding from arrays to tokens.

Config keys read here: batch_size, image_size, mask_ratio, model.{patch_size, width, num_heads,
positions}, augment.{...}, image_mean, image_std.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.core.errors import UserError
from bivl.data import augment, masking
from bivl.models.layers import PatchEmbed, Vector, constrain_tokens, truncated_normal
from bivl.models.positions import LearnedPositions, RelativePositionBias, sincos_2d
from bivl.models.transformer import Tokens

POSITIONS = ("relative", "learned", "sincos", "none")


def grid(config) -> tuple[int, int]:
    """Patches down and across."""
    side, rest = divmod(config.image_size, config.model.patch_size)
    if rest or side < 1:
        raise UserError(
            f"config.image_size={config.image_size} is not a multiple of "
            f"model.patch_size={config.model.patch_size}"
        )
    return side, side


def num_masks(config) -> int:
    """Patches to mask in each image (at most; the block sampler may fall short)."""
    if not 0 < config.mask_ratio < 1:
        raise UserError(f"config.mask_ratio={config.mask_ratio} must lie between 0 and 1")
    return max(1, round(config.mask_ratio * grid(config)[0] * grid(config)[1]))


def spec(config) -> dict[str, jax.ShapeDtypeStruct]:
    """image uint8 [B, S, S, 3] and mask bool [B, h w], True = masked."""
    B, S, (h, w) = config.batch_size, config.image_size, grid(config)
    return {
        "image": jax.ShapeDtypeStruct((B, S, S, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((B, h * w), jnp.bool_),
    }


def train_ops(config):
    """record, rng -> {image, mask}: jitter, flip, random resized crop (BEiT's order), block mask."""
    a, size = config.augment, config.image_size
    cells, count, min_block = grid(config), num_masks(config), config.mask_min_block

    def ops(record, rng):
        image = augment.decode_image(record["image"])
        if any(a.color_jitter):
            image = augment.color_jitter(image, rng, *a.color_jitter)
        if a.flip:
            image = augment.horizontal_flip(image, rng)
        image = augment.random_resized_crop(image, rng, size, tuple(a.scale), tuple(a.ratio))
        mask = masking.block_mask(rng, cells, count, min_block)
        return {"image": image, "mask": mask.reshape(-1)}

    return ops


def _eval_image(config, image):
    image = augment.decode_image(image)
    return augment.center_view(image, config.image_size, config.augment.crop_ratio)


def eval_ops(config):
    """record -> {image, label?, id?}: short side to size / crop_ratio, central crop."""

    def ops(record):
        kept = {k: np.int32(record[k]) for k in ("label", "id") if k in record}
        return {"image": _eval_image(config, record["image"])} | kept

    return ops


def preprocess(config):
    """image=[...] (uint8 HWC arrays, PIL images or paths) -> {image: float32 [B, S, S, 3]}."""
    mean, std = np.float32(config.image_mean), np.float32(config.image_std)

    def ops(image):
        images = [_eval_image(config, x) for x in image]
        if not images:
            raise UserError("preprocess got no image; pass image=[...]")
        return {"image": (np.stack(images) / np.float32(255) - mean) / std}

    return ops


def pool(tokens, layout: Tokens):
    """CLS, [B, L, D] -> [B, D], as BEiT's pre-training model is read by its reference."""
    return tokens[:, 0] if layout.special else tokens.mean(1)


class Embed(nn.Module):
    """Images to tokens: normalise, embed patches, replace masked ones, prepend CLS, add positions.

    A uint8 image is normalised here, on the device; a float image is taken as normalised already.
    """

    grid: tuple[int, int]
    patch_size: int
    width: int
    num_heads: int
    positions: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str

    @nn.compact
    def __call__(self, batch, masked: bool = False) -> Tokens:
        image = batch["image"]
        if image.dtype == jnp.uint8:
            image = (image.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)
        axes, init = (None, None, "embed"), truncated_normal(0.02)
        x = PatchEmbed(self.patch_size, self.width, dtype=self.dtype, name="patch")(image)
        mask_token = Vector((1, 1, self.width), axes, init, name="mask_token")()
        cls_token = Vector((1, 1, self.width), axes, init, name="cls_token")()
        if masked:
            x = jnp.where(batch["mask"][..., None], mask_token.astype(x.dtype), x)
        if self.positions == "sincos":
            x = x + sincos_2d(self.grid, self.width).astype(x.dtype)
        elif self.positions == "learned":
            x = LearnedPositions(init, name="positions")(x)
        cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, self.width)).astype(x.dtype)
        x = constrain_tokens(jnp.concatenate([cls_token, x], axis=1))
        bias = None
        if self.positions == "relative":
            bias = RelativePositionBias(self.grid, self.num_heads, name="relative_position")()
        return Tokens(x, special=1, bias=bias)


def make_embed(config, dtype: str) -> Embed:
    """The embedding that `config` describes."""
    m = config.model
    if m.positions not in POSITIONS:
        raise UserError(f"config.model.positions={m.positions!r}; use one of {POSITIONS}")
    return Embed(
        grid(config),
        m.patch_size,
        m.width,
        m.num_heads,
        m.positions,
        tuple(config.image_mean),
        tuple(config.image_std),
        dtype,
    )
