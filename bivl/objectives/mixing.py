"""What fine-tuning does to a batch of images on the device: erasing, Mixup, CutMix, soft labels.

After timm (huggingface/pytorch-image-models: timm/data/mixup.py in mode `batch`, random_erasing.py
in mode `pixel`). Papers: Mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899.
"""

import jax
import jax.numpy as jnp


def mix(
    images,
    labels,
    num_classes: int,
    key,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    smoothing: float = 0.1,
):
    """Normalised images float [B, H, W, 3], labels int32 [B] -> (images, targets float32 [B, C]).

    One choice and one lambda ~ Beta(alpha, alpha) for the whole batch; the partner of example i is
    example B - 1 - i. With both alphas positive, CutMix is taken with `switch_probability`; an
    alpha of 0 switches its method off, and both leave the images alone. Of accumulated gradients
    each part is a batch of its own. A target is lambda and 1 - lambda of the two smoothed labels:
    smoothing / C everywhere and 1 - smoothing more for the class.

    CutMix's box has its centre anywhere and is cut at the border; lambda is then what is left of
    the area. Odd sides are kept, as in timm 1.0.31; CutMix's own code loses a pixel of them.
    """
    whether, which, draw, place = jax.random.split(key, 4)
    cut = jnp.array(cutmix_alpha > 0)
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cut = jax.random.uniform(which) < switch_probability
    alpha = jnp.where(cut, cutmix_alpha or 1.0, mixup_alpha or 1.0)
    mixed = jax.random.uniform(whether) < (probability if mixup_alpha or cutmix_alpha else 0.0)
    amount = jnp.where(mixed, jax.random.beta(draw, alpha, alpha), 1.0)
    inside, area = cutmix_box(place, amount, images.shape[1:3])
    amount = jnp.where(cut, 1.0 - area, amount)

    # How much of each pixel is the example's own. The partner lies on another device where the
    # batch is sharded: one permutation between devices.
    own = jnp.where(cut, 1.0 - inside, amount)[..., None].astype(images.dtype)
    images = images * own + images[::-1] * (1 - own)
    targets = smooth_labels(labels, num_classes, smoothing)
    return images, targets * amount + targets[::-1] * (1 - amount)


def smooth_labels(labels, num_classes: int, smoothing: float):
    """labels int [B] -> float32 [B, C]: 1 - smoothing for the class, and smoothing / C for all."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


def cutmix_box(key, amount, size: tuple[int, int]):
    """CutMix's rectangle on images of `size` (H, W): (float32 [H, W], 1 inside; its part of 1).

    Sides are floor(side * sqrt(1 - amount)), the centre is uniform over the pixels, and what
    passes the border is cut off.
    """
    inside = []
    for one, side in zip(jax.random.split(key), size, strict=True):
        length = jnp.floor(side * jnp.sqrt(1.0 - amount)).astype(jnp.int32)
        centre = jax.random.randint(one, (), 0, side)
        at = jnp.arange(side)
        inside.append((at >= centre - length // 2) & (at < centre + (length + 1) // 2))
    box = (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)
    return box, box.mean()


def erase(images, boxes, key):
    """Normalised images float [B, H, W, 3] with standard normal noise in their boxes.

    boxes int32 [B, 4] = top, left, height, width from `data.randaugment.erasing_box`; height and
    width 0 erase nothing. Comes before `mix`, as in timm, where the loader erases.
    """
    top, left, height, width = (boxes[:, i, None, None] for i in range(4))  # each [B, 1, 1]
    y, x = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])[None, :]
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    noise = jax.random.normal(key, images.shape, images.dtype)
    return jnp.where(inside[..., None], noise, images)
