"""BEiT v2: masked image modeling of VQ-KD's codes with patch aggregation, ViT-B/16 and ViT-L/16.

    python -m bivl.train --config=configs/pretrain/beit2.py --workdir=DIR \
        --config.data.dir=PREPARED_IMAGENET --config.teacher.checkpoint=TOKENIZER

size=base    ImageNet-1k, 300 epochs at batch 2,048 (187,500 updates); published: 85.0 % top-1 after
             fine-tuning, linear probe 80.1 % (microsoft/unilm beit2/README.md). 16 GPUs there.
             1,600 epochs (85.5 %): --config.steps=1000000 --config.optimizer.beta2=0.999
             --config.model.drop_path=0.1
size=large   the same; published: 86.6 % after 300 epochs, 87.3 % after 1,600; its accuracy at
             naming masked codes is about 16 % (unilm issue 885).
size=small   384 x 12 x 6, one GPU or TPU chip; no published score.
size=tiny    128 x 4 x 4 on 64 px emoji, two CPU cores; no published score.
smoke        20 updates of `tiny` on synthetic images with a random tokenizer, under a minute on two
             CPU cores.

TOKENIZER is a checkpoint of configs/pretrain/vqkd.py with as many patches to an image. Compare
`mim_accuracy` with `most_frequent`, what naming the commonest code everywhere would reach.
Official files, for bivl.convert: `beitv2_base_patch16_224_pt1k.pth`; fine-tuned, which want
--family=beit2: `..._pt1k_300e_ft1k.pth` 85.0, `..._pt1k_ft1k.pth` 85.5,
`..._pt1k_ft21kto1k.pth` 86.5.
--config.aggregation.depth=0 is BEiT (v1) but for its tokenizer. Follows `beit2/PRETRAINING.md`.

TPU slices (launch/README.md has what they give):
    size=base    v5e:8x8
    size=large   v5e:8x8  --config.optimizer.accumulate=2
"""

from configs import common
from configs.pretrain import data2vec_image, vqkd

SIZES = {
    # size: width, depth, heads, layer of the patches that are aggregated, batch, layer scale
    "tiny": (128, 4, 4, 3, 64, 1e-1),
    "small": (384, 12, 6, 9, 512, 1e-1),
    "base": (768, 12, 12, 9, 2048, 1e-1),
    "large": (1024, 24, 16, 21, 2048, 1e-5),
}
UNUSED = ("top_k_layers", "head", "target", "loss", "ema_shared")
UNUSED += ("ema_decay_start", "ema_decay_end", "ema_anneal_steps")


def get_config(text=None):
    """Options: size=tiny|small|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, layer, batch, scale = SIZES[size]
    epoch = data2vec_image.EPOCH // batch

    c = data2vec_image.get_config("size=base")
    c.unlock()
    for key in UNUSED:
        del c[key]
    c.objective = "mim"
    c.batch_size, c.steps = batch, 300 * epoch
    c.teacher = {"checkpoint": "", "random": False, "config": {}}  # `config` is the checkpoint's
    c.mask_ratio = 75 / 196
    c.masking = {"kind": "block", "min_block": 16, "exact": True}
    c.augment.scale = (0.2, 1.0)
    c.model.update(
        {
            "width": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_dim": 4 * width,
            "layer_scale": scale,
            "drop_path": 0.0,
            "attention_dropout": 0.0,
            "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
            "scan": size in ("base", "large"),
        }
    )
    c.aggregation = {"layer": layer, "depth": 2, "weight": 1.0}
    c.optimizer.update({"learning_rate": 1.5e-3, "warmup_steps": 10 * epoch, "beta2": 0.98})
    if size in ("tiny", "small"):
        c.dtype, c.checkpoint.every = "float32", 1000
    if size == "tiny":
        tiny(c)
    if chosen["smoke"]:
        smoke(c)
    return c


def tiny(c):
    """64 px, patches of 8, the packaged emoji: minutes on two CPU cores."""
    c.image_size, c.model.patch_size, c.masking.min_block = 64, 8, 4
    c.data = common.data(kind="emoji")
    c.eval_data.test.split = "test"
    c.augment.crop_ratio = 1.0
    c.steps, c.log_every, c.checkpoint.every = 2000, 10, 500
    c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 200})


def smoke(c):
    """20 updates on synthetic images, with a tokenizer that has learned nothing."""
    data2vec_image.smoke(c)
    c.teacher.random, c.teacher.config = True, vqkd.get_config("smoke").to_dict()
