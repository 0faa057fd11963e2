"""data2vec 2.0 on images, fine-tuned: ViT-B/16, L/16, H/14 on ImageNet-1k as shipped, tiny.

    python -m bivl.train --config=configs/finetune/data2vec2_image.py --workdir=DIR \
        --config.init=PRETRAINED --config.data.dir=PREPARED_IMAGENET

size=base    250,200 updates at batch 512 (100 epochs). No published score that we have read.
size=large   125,200 updates (50 epochs); 86.8 % top-1 (data2vec 2.0 paper, abstract).
size=huge    the same, patch 14; 87.4 % is the best that is listed, presumably this one.
size=tiny    128 x 4 x 4 on 64 px, scikit-learn's digits; two CPU cores; no published score.
             PRETRAINED is one of configs/pretrain/data2vec2_image.py:size=tiny, or none.
smoke        20 updates of `tiny` on synthetic images, under a minute on two CPU cores.

Official files (fairseq `examples/data2vec/README.md`): PRETRAINED is what bivl.convert makes of
`base_imagenet.pt`, `large_imagenet.pt` or `huge_imagenet.pt`; fine-tuned are `base_imagenet_ft.pt`,
`large_imagenet_ft.pt` (86.8) and `huge_imagenet_ft.pt`:

    python -m bivl.convert --source=large_imagenet_ft.pt --out=DIR
    python -m bivl.evaluate --checkpoint=DIR --config.data.dir=PREPARED_IMAGENET

Follows fairseq's `config/vision/finetuning/mae_imagenet_clean.yaml`, `_large_clean`, `_huge_clean`
and `models/mae_image_classification.py`: the embedding, the norm before the blocks and the head
keep the full rate, and everything is decayed, as their exclusions never take effect.
"""

from configs import common
from configs.finetune import data2vec_image as first
from configs.pretrain import data2vec2_image

SIZES = {  # updates, peak lr, last lr, layer decay, drop path, clip norm
    "tiny": (0, 1e-3, 1e-6, 0.75, 0.0, 4.0),
    "base": (250_200, 1e-3, 1e-6, 0.65, 0.1, 0.0),
    "large": (125_200, 5e-4, 1e-7, 0.75, 0.2, 4.0),
    "huge": (125_200, 5e-4, 1e-20, 0.75, 0.2, 4.0),
}


def get_config(text=None):
    """Options: size=tiny|base|large|huge, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    steps, rate, last, layer_decay, drop_path, clip = SIZES[size]

    c = data2vec2_image.get_config("smoke" if chosen["smoke"] else f"size={size}")
    c.unlock()
    first.imagenet(c, scale=1.0)
    c.masking = {"kind": "none"}
    c.augment.update({"mixup": 0.7, "mix_probability": 0.9})
    c.batch_size, c.steps, c.model.drop_path = 512, steps, drop_path
    c.optimizer.update(
        {
            "learning_rate": rate,
            "end_learning_rate": last,
            "warmup_steps": 16_000,
            "beta2": 0.95,
            "weight_decay": 0.05,
            "no_decay": "^$",  # everything is decayed
            "clip_norm": clip,
            "layer_decay": layer_decay,
            "layer_decay_embed": False,
        }
    )
    if size == "tiny":
        first.tiny(c)
    if chosen["smoke"]:
        first.smoke(c)
    return c
