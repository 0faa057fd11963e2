"""VQ-KD and BEiT v2 as small as their numbers in golden/vqkd.npz were recorded."""

import jax
from flax import linen as nn

from bivl.core import config as configs

VQKD = {
    "image_size": "16",
    "batch_size": "8",
    "model.patch_size": "4",
    "model.width": "16",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.mlp_dim": "32",
    "codebook.size": "12",
    "codebook.width": "4",
    "data.image_size": "16",
    "evaluators": "",
    "steps": "4",
}
TEACHER = {
    "image_size": "16",
    "model.patch_size": "4",
    "model.width": "6",
    "model.depth": "1",
    "model.num_heads": "2",
    "model.mlp_dim": "8",
    "top_k_layers": "1",
}


def small_vqkd(changes=()):
    """The smoke config of VQ-KD, smaller still, with dotted `changes`."""
    settings = VQKD | {f"teacher.config.{key}": value for key, value in TEACHER.items()}
    config = configs.load("configs/pretrain/vqkd.py:smoke")
    configs.override(config, list((settings | dict(changes)).items()))
    return config


MIM = {
    "image_size": "16",
    "batch_size": "8",
    "mask_ratio": "0.375",  # 6 of 16
    "masking.min_block": "2",
    "model.patch_size": "4",
    "model.width": "16",
    "model.depth": "3",
    "model.num_heads": "2",
    "model.mlp_dim": "32",
    "aggregation.layer": "2",
    "data.image_size": "16",
    "evaluators": "",
    "steps": "4",
}


def small_mim(changes=()):
    """The smoke config of BEiT v2, smaller still, with the tokenizer of `small_vqkd`."""
    config = configs.load("configs/pretrain/beit2.py:smoke")
    with config.unlocked():
        config.teacher.config = small_vqkd({"codebook.size": "10"}).to_dict()
    config.teacher.config.mesh.data = 1
    configs.override(config, list((MIM | dict(changes)).items()))
    return config


def unboxed(objective):
    """Fresh (params, teacher, extras)."""
    return jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0))))()
