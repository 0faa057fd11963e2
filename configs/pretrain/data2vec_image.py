"""data2vec 1.0 on images: ViT-B/16 and ViT-L/16 as published, small and tiny for one chip or CPU.

    python -m bivl.train --config=configs/pretrain/data2vec_image.py --workdir=DIR \
        --config.data.dir=PREPARED_IMAGENET

size=base    ImageNet-1k, 800 epochs at batch 2,048 (500,000 updates); published: 84.2 % top-1 after
             fine-tuning (data2vec paper, table 1). Published on 16 GPUs.
size=large   stage 1 of 2: 800 epochs at batch 4,096; published after both stages: 86.6 %. Stage 2
             is the same command with --config.init=STAGE_1 --config.ema_decay_start=0.9999
             --config.ema_decay_end=0.9999 --config.optimizer.warmup_steps=12480.
size=small   384 x 12 x 6, one GPU or TPU chip; no published score.
size=tiny    128 x 4 x 4 on 64 px, two CPU cores; no published score.
smoke        20 updates of `tiny` on synthetic images, under a minute on two CPU cores.

Official files, for bivl.convert: `base_800/checkpoint-799.pth`, `large_800/checkpoint-799.pth`
(after stage 1), `large_1600/checkpoint-799.pth` of data2vec_vision's README; Hugging Face's
`data2vec-vision-base` and `data2vec-vision-large`. configs/finetune/data2vec_image.py has their
scores.

Follows the code of facebookresearch/data2vec_vision (its README's commands), not the paper, where
they differ: batch 2,048 and 10 warm-up epochs for base, batch 4,096 for large, end-of-block targets
normalised per layer and after averaging, loss averaged over masked tokens and channels, constant
tau.

TPU slices (launch/README.md has what they give):
    size=base    v5e:8x8
    size=large   v5e:8x8  --config.optimizer.accumulate=4
"""

from configs import common

EPOCH = 1_281_167  # images of ImageNet-1k

SIZES = {
    # size: width, depth, heads, batch, peak lr, warm-up epochs, drop path, attention dropout, scale
    "tiny": (128, 4, 4, 64, 1e-3, 10, 0.0, 0.0, 1e-1),
    "small": (384, 12, 6, 512, 1e-3, 10, 0.1, 0.0, 1e-4),
    "base": (768, 12, 12, 2048, 2e-3, 10, 0.25, 0.05, 1e-4),
    "large": (1024, 24, 16, 4096, 1e-3, 80, 0.2, 0.15, 1e-5),
}


def dimensions(size: str) -> tuple[int, int, int]:
    """Width, depth and heads of a size."""
    if size not in SIZES:
        raise ValueError(f"size={size} is unknown; use one of {sorted(SIZES)}")
    return SIZES[size][:3]


def get_config(text=None):
    """Options: size=tiny|small|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads = dimensions(size)
    batch, rate, warmup, drop_path, attention_dropout, scale = SIZES[size][3:]
    epoch = EPOCH // batch

    c = common.base()
    c.objective, c.modality = "data2vec", "image"
    c.batch_size, c.steps, c.log_every = batch, 800 * epoch, 50
    c.dtype = c.teacher_dtype = "float32"  # published: fp16 student, fp32 teacher
    c.image_size, c.image_mean, c.image_std = 224, common.IMAGENET_MEAN, common.IMAGENET_STD
    c.data = common.data(kind="tfds", name="imagenet2012")
    c.eval_data.test.split = "validation"
    c.evaluators = ("knn", "linear", "pictures")
    c.augment = common.augment(color_jitter=(0.4, 0.4, 0.4))
    c.mask_ratio, c.masking = 120 / 196, {"kind": "block", "min_block": 16}
    c.model = {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": 4 * width,
        "patch_size": 16,
        "positions": "relative",  # or learned, sincos, none
        "embed_init": "beit",
        "norm": "pre",  # or post, sub
        "eps": 1e-6,
        "qkv_bias": "qv",
        "layer_scale": scale,
        "drop_path": drop_path,
        "dropout": 0.0,
        "attention_dropout": attention_dropout,
        "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
        "init": "beit",
        "scan": size in ("base", "large"),  # one layer's program for all: quick to compile on TPU
        "remat": "none",  # or full, dots
    }
    c.top_k_layers = 6
    c.head = {"layers": 1, "init": "truncated"}
    c.target = {"layer": "end", "layer_norms": ("layer",), "norms": ("layer",)}
    c.target.embed_dropout = False
    c.loss = {"beta": 2.0, "reduction": "mean", "scale": None, "std_weight": 0.0, "std_margin": 0.5}
    c.ema_decay_start = c.ema_decay_end = 0.9998
    c.ema_anneal_steps = 0
    c.ema_shared = ()  # parameters (paths) that the teacher takes from the student as they are
    c.optimizer.update(
        {
            "learning_rate": rate,
            "end_learning_rate": 1e-5,
            "warmup_steps": warmup * epoch,
            "weight_decay": 0.05,
            "clip_norm": 3.0,
        }
    )
    if size in ("base", "large"):
        c.dtype, c.checkpoint.every = "bfloat16", 5000
    if size == "tiny":
        tiny(c)
    if chosen["smoke"]:
        smoke(c)
    return c


def tiny(c):
    """64 px, patches of 8, the packaged emoji: something to look at in minutes on two CPU cores."""
    c.image_size, c.model.patch_size, c.top_k_layers = 64, 8, 2
    c.masking.min_block, c.mask_ratio = 4, 0.6
    c.data = common.data(kind="emoji")
    c.eval_data.test.split = "test"
    c.augment.update({"scale": (0.2, 1.0), "crop_ratio": 1.0})
    c.steps, c.optimizer.warmup_steps, c.log_every = 2000, 200, 10
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.99, 0.999, 1000
    c.optimizer.end_learning_rate, c.checkpoint.every = 1e-5, 500


def smoke(c):
    """20 updates on synthetic images."""
    c.steps, c.batch_size, c.log_every, c.optimizer.warmup_steps = 20, 16, 1, 5
    c.data = common.data(kind="synthetic", image_size=64, num_examples=256)
    c.checkpoint.every, c.evaluators = 10, ("knn",)
    c.loader.threads = 2
