"""The first run: data2vec on the packaged emoji, about five minutes on two CPU cores.

    bash launch/quickstart.sh            or
    python -m bivl.train --config=configs/quickstart.py --workdir=DIR

Differs from configs/pretrain/data2vec_image.py, of the same sizes, in what a short run on 1,507
small drawings needs: patches of 16, positions that need no learning, no layer scale, no colour
jitter (colour is half of what an emoji is), all layers as targets, instance-normalised, and a
teacher that follows within hundreds of updates, not tens of thousands.
"""

from configs.pretrain import data2vec_image


def get_config(text=None):
    """Options: size=tiny|small|base|large, smoke."""
    c = data2vec_image.get_config(text or "size=tiny")
    c.unlock()
    c.model.update({"patch_size": 16, "positions": "sincos", "layer_scale": 0.0})
    c.masking.min_block = 1
    c.augment.update({"color_jitter": (0.0, 0.0, 0.0), "scale": (0.4, 1.0)})
    c.top_k_layers = c.model.depth
    c.target.layer_norms = ("instance",)
    if c.steps > 20:  # not smoke
        c.steps = 3000
        c.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})
        c.evaluators = ("knn", "linear", "fewshot", "pictures")
    return c
