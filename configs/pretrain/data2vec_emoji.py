"""data2vec 1.0 on the packaged emoji or other small images, about five minutes on two CPU cores.

    python -m bivl.train --config=configs/pretrain/data2vec_emoji.py --workdir=DIR

Differs from configs/pretrain/data2vec_image.py, of the same sizes, in what a short run on 1,507
small drawings needs: positions that need no learning, no layer scale, no colour jitter (colour is
half of what an emoji is), all layers as targets, instance-normalised, and a teacher that follows
within hundreds of updates, not tens of thousands.
"""

from configs import common
from configs.pretrain import data2vec_image


def get_config(text=None):
    """Options: size=tiny|small|base|large (all on 64 px emoji), smoke."""
    chosen = common.options(text, {"size": "tiny", "smoke": False})
    width, depth, heads = data2vec_image.dimensions(chosen["size"])
    c = data2vec_image.get_config("smoke" if chosen["smoke"] else "size=tiny")
    c.unlock()
    if not chosen["smoke"]:
        c.model.update({"width": width, "depth": depth, "num_heads": heads, "mlp_dim": 4 * width})
        c.steps, c.batch_size, c.optimizer.warmup_steps = 2400, 32, 100
        c.evaluators = ("knn", "linear", "fewshot", "pictures")
    c.model.update({"positions": "sincos", "layer_scale": 0.0})
    c.augment.update({"color_jitter": (0.0, 0.0, 0.0), "scale": (0.4, 1.0)})
    c.top_k_layers = c.model.depth
    c.target.layer_norms = ("instance",)
    return c
