"""data2vec 2.0 on images: ViT-B/16, L/16, H/14 as shipped, small and tiny for one chip or CPU.

    python -m bivl.train --config=configs/pretrain/data2vec2_image.py --workdir=DIR \
        --config.data.dir=PREPARED_IMAGENET

size=base    ImageNet-1k, 375,300 updates at batch 512 (150 epochs, as the paper says; the shipped
             file's GPUs process half of that). No published score that we have read.
size=large   the same; 86.8 % top-1 after fine-tuning (paper abstract, 150 epochs).
size=huge    patch 14, 500,000 updates; the teacher stands still after 300,000.
size=small   384 x 12 x 6, one GPU or TPU chip; no published score.
size=tiny    128 x 4 x 4 on 64 px, two CPU cores; no published score.
smoke        20 updates of `tiny` on synthetic images, under a minute on two CPU cores.

Official files, for bivl.convert: `base_imagenet.pt`, `large_imagenet.pt`, `huge_imagenet.pt`
(fairseq `examples/data2vec/README.md`); with --teacher their averaged model comes along.

Follows fairseq's `config/v2/base_images_only_task.yaml` and siblings. What is ours: ViT-B has 12
equal blocks of which the last 10 give targets (its file calls the first two a prenet); the CLS loss
has an explicit weight, that of its sum over one GPU's rows (2.56 for 16 images x 16 masks, 1.28
for 8 x 16); the teacher computes in float32; the collapse guards, off there, are on.

TPU slices (launch/README.md has what they give):
    size=base    v5e:8x8
    size=large   v5e:8x8  --config.optimizer.accumulate=2
    size=huge    v5p:4x4x4
"""

from configs import common
from configs.pretrain import data2vec_image

SIZES = {
    # size: width, depth, heads, patch, batch, updates, lr, K, ratio, adjust, tau_0, tau_e, N, CLS
    "tiny": (128, 4, 4, 8, 16, 2000, 1e-3, 4, 0.75, 0.1, 0.99, 0.999, 1000, 1.0),
    "small": (384, 12, 6, 16, 256, 375_300, 1e-3, 10, 0.8, 0.07, 0.9998, 0.99999, 100_000, 2.56),
    "base": (768, 12, 12, 16, 512, 375_300, 1e-3, 10, 0.8, 0.07, 0.9998, 0.99999, 100_000, 2.56),
    "large": (1024, 24, 16, 16, 512, 375_300, 4e-4, 18, 0.75, 0.1, 0.9998, 0.99999, 150_000, 1.28),
    "huge": (1280, 32, 16, 14, 512, 500_000, 4e-4, 24, 0.75, 0.1, 0.9998, 1.0, 300_000, 1.28),
}
DECODERS = {  # width, kernel, groups, depth
    "tiny": (128, 3, 16, 3),
    "small": (384, 3, 16, 6),
    "base": (768, 3, 16, 6),
    "large": (1024, 5, 16, 3),
    "huge": (1024, 5, 16, 3),
}


def get_config(text=None):
    """Options: size=tiny|small|base|large|huge, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, patch, batch, steps, rate, k, ratio, adjust, *teacher, cls = SIZES[size]

    c = data2vec_image.get_config("size=base")
    c.unlock()
    c.objective = "data2vec2"
    del c.head
    c.batch_size, c.steps = batch, steps
    c.augment.update({"color_jitter": (0.0, 0.0, 0.0), "scale": (0.2, 1.0)})
    c.mask_ratio = ratio
    c.masking = {"kind": "inverse_block", "num_masks": 16, "block": 3, "adjust": adjust}
    c.model.update(
        {
            "width": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_dim": 4 * width,
            "patch_size": patch,
            "positions": "sincos",
            "embed_init": "data2vec2",
            "norm": "post",
            "qkv_bias": "qkv",
            "layer_scale": 0.0,
            "drop_path": 0.0,
            "attention_dropout": 0.0,
            "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
            "init": "normal",
            "input_norm": True,
            "final_norm": False,
            "scan": size in ("base", "large", "huge"),
        }
    )
    names = ("width", "kernel", "groups", "depth")
    c.decoder = dict(zip(names, DECODERS[size], strict=True)) | {
        "residual": True,
        "projection_layers": 1,
        "dropout": 0.0,
        "noise": 0.01,
    }
    c.top_k_layers = k
    c.target.update({"layer": "ffn", "layer_norms": ("instance",), "norms": ("layer",)})
    c.loss.update({"beta": 0.0, "reduction": "sum"})
    c.loss.cls_weight = cls
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = teacher
    c.optimizer.update(
        {
            "learning_rate": rate,
            "end_learning_rate": 0.0,
            "warmup_steps": 50_040,
            "beta2": 0.95,
            "clip_norm": 4.0,
            "no_decay": "^$",  # the reference's exclusions never take effect: all is decayed
        }
    )
    if size in ("tiny", "small"):
        c.dtype, c.checkpoint.every = "float32", 1000
    if size == "tiny":
        _tiny(c)
    if chosen["smoke"]:
        data2vec_image.smoke(c)
    return c


def _tiny(c):
    masking, top = c.masking.to_dict() | {"num_masks": 8}, c.top_k_layers
    data2vec_image.tiny(c)
    c.masking, c.mask_ratio, c.top_k_layers = masking, 0.75, top
