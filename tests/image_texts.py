"""What the tests of the image-text objectives share: tiny configs, batches, and plain losses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy import special

from bivl.core import config as configs
from bivl.core import state as states
from bivl.core import step as steps

SMALL = {
    "image_size": 16,
    "batch_size": 12,
    "tokenizer.kind": "bytes",
    "model.patch_size": 4,
    "model.width": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_dim": 24,
    "model.text_rows": 20,
    "model.scan": True,
    "pair.length": 10,
    "masking.min_block": 2,
}
STREAMS = {"text.length": 12, "text.mask_ratio": 0.4}
TOKENIZER = {
    "image_size": 16,
    "model.patch_size": 4,
    "model.width": 8,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.mlp_dim": 12,
}
MDM = SMALL | STREAMS | {f"teacher.config.{key}": value for key, value in TOKENIZER.items()}
MDM |= {f"teacher.config.teacher.config.{key}": value for key, value in TOKENIZER.items()}
MDM |= {"teacher.config.codebook.size": 12, "teacher.config.codebook.width": 4}
MDM["teacher.config.teacher.config.top_k_layers"] = 1
BIVL = SMALL | STREAMS | {"top_k_layers": 2, "contrast.width": 8}
CLONES = {"kind": "inverse_block", "num_masks": 2, "block": 2, "adjust": 0.1}
PADS = {"texts": (0, 3, 5, 8), "pairs": (4, 0, 2, 6)}  # behind each text
PARTS = {"images": "images", "texts": "texts", "pairs_image": "pairs", "pairs_text": "pairs"}


def config(spec: str, settings: dict, **changes):
    """A shipped config with dotted settings; of `changes` the names have `__` for the dots."""
    c = configs.load(spec)
    with c.unlocked():
        for name, value in (settings | changes).items():
            *groups, last = name.replace("__", ".").split(".")
            node = functools.reduce(lambda node, key: node[key], groups, c)
            with node.ignore_type():
                node[last] = value
    return c


def texts(rng, rows: int, length: int, pads=(0,)) -> dict:
    """tokens, inputs and text_mask of random texts, `pads` behind them: one to five masked."""
    tokens = rng.integers(4, 260, (rows, length)).astype(np.int32)
    mask = rng.random((rows, length)) < 0.4
    mask[:, 0], mask[:, 1] = False, True
    mask &= mask.cumsum(1) <= 5
    for row in range(rows):
        count = pads[row % len(pads)]
        tokens[row, length - count :], mask[row, length - count :] = 1, False
    tokens[:, 0] = 0
    inputs = np.where(mask & (rng.random(mask.shape) < 0.8), 260, tokens).astype(np.int32)
    return {"tokens": tokens, "inputs": inputs, "text_mask": mask}


def images(rng, rows: int, clones: int = 0) -> dict:
    """Images of 16 patches and masks: 6 masked, or 8 in each of the clones."""
    found = {"image": rng.integers(0, 256, (rows, 16, 16, 3)).astype(np.uint8)}
    order = np.argsort(rng.random((rows, max(clones, 1), 16)), -1)
    count = 8 if clones else 6
    mask = np.zeros(order.shape, bool)
    np.put_along_axis(mask, order[..., :count], True, -1)
    if not clones:
        return found | {"mask": mask[:, 0]}
    return found | {"mask": mask, "keep": np.sort(order[..., count:], -1).astype(np.int32)}


def batch(clones: int = 0) -> dict:
    """Four images, texts and pairs; texts are padded."""
    rng = np.random.default_rng(2)
    found = {"images": images(rng, 4, clones), "texts": texts(rng, 4, 12, PADS["texts"])}
    found["pairs"] = images(rng, 4, clones) | texts(rng, 4, 10, PADS["pairs"])
    # As many are masked in no two halves, so a mean of means is not the mean.
    found["texts"]["text_mask"][::2, 2:] = False
    return jax.tree.map(jnp.asarray, found)


def created(objective, seed: int = 0):
    """Random params, teacher and extras of an objective's shapes."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        name = path[-1].key
        size = 0.3 if len(x.shape) < 2 else 0.15
        return jnp.asarray(size * rng.standard_normal(x.shape) + (name == "scale"), x.dtype)

    shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def accumulated(objective, trees, given, accumulate: int):
    """(loss and metrics, gradients) of one step in micro-batches, as `core/step.py` makes it."""

    def run(trees, given):
        params, teacher, extras = trees
        state = states.State(jnp.int32(0), params, teacher, extras, ())
        aux, grads = steps._accumulated(objective, state, given, jax.random.key(0), accumulate)
        return aux["metrics"], grads

    return jax.tree.map(np.asarray, jax.jit(run)(trees, given))


def moved(grads) -> set[str]:
    """The first two names of every parameter that has a gradient; of biases of keys it is noise."""
    found = set()
    for path, x in jax.tree_util.tree_flatten_with_path(grads)[0]:
        names = [key.key for key in path]
        if "k_bias" not in names and np.any(x):
            found.add("/".join(names[:2]))
    return found


# Plain computations, in float64


def log_softmax(x):
    return x - special.logsumexp(x, -1, keepdims=True)


def linear(x, part):
    return np.asarray(x, np.float64) @ part["kernel"] + part["bias"]


def gelu(x):
    return 0.5 * x * (1 + special.erf(x / math.sqrt(2)))


def token_loss(logits, classes, mask):
    """Means over masked places of cross-entropy, of being right, and of the commonest class."""
    each = -np.take_along_axis(log_softmax(logits), classes[..., None], -1)[..., 0][mask]
    commonest = np.unique(classes[mask], return_counts=True)[1].max() / mask.sum()
    return each.mean(), (logits.argmax(-1) == classes)[mask].mean(), commonest


def info_nce(images, texts, log_scale):
    """InfoNCE by loops over pairs."""
    total, rows = 0.0, len(images)
    for a, b in ((images, texts), (texts, images)):
        for i in range(rows):
            cosines = np.array([np.dot(a[i], b[j]) for j in range(rows)], np.float64)
            total -= log_softmax(cosines * np.exp(float(log_scale)))[i]
    return total / (2 * rows)


def normalized(x, axes, eps=1e-5):
    """Less its mean, over its std: over the given axes of one example's tokens [L, D]."""
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
