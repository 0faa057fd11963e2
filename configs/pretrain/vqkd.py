"""VQ-KD, the visual tokenizer of BEiT v2: 8,192 codes of patches, from a frozen teacher's features.

    python -m bivl.train --config=configs/pretrain/vqkd.py --workdir=DIR \
        --config.data.dir=PREPARED_IMAGENET --config.teacher.checkpoint=TEACHER

size=base    ViT-B/16 and a decoder of 3 layers, ImageNet-1k, 100 epochs at batch 512 (250,200
             updates). Published with CLIP ViT-B/16 as teacher: 97 % of the codes in use (100 % with
             --config.decoder.depth=1; microsoft/unilm beit2/TOKENIZER.md), and 85.0 % top-1 of a
             BEiT v2 base that learned its codes for 300 epochs (beit2/README.md). 8 GPUs there.
size=large   the same with an encoder of ViT-L/16; not published.
size=small   384 x 12 x 6, one GPU or TPU chip; no published score.
size=tiny    128 x 4 x 4 and 256 codes on 64 px emoji, two CPU cores; no published score.
smoke        20 updates of `tiny` on synthetic images with a random teacher, under a minute on two
             CPU cores.

Official files, for bivl.convert, and their codes in use:
`vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth` 97 %, `..._1x768x12_clip-d93179da.pth` 100 %,
`..._1x768x12_dino-663c55d7.pth` 100 %.

TEACHER is a checkpoint of any model of images here with as many patches to an image, for `tiny`
one of configs/pretrain/data2vec_image.py:size=tiny. Its features are those of the last layer after
the final norm; its images are normalised its own way. Follows `beit2/run_vqkd_training.py`, but the
k-means that starts the codebook runs once over the global batch, at the end of the first update,
where the code runs one on every GPU before its first loss.

TPU slices (launch/README.md has what they give):
    size=base    v5e:4x4
    size=large   v5e:4x4  --config.optimizer.accumulate=2
"""

from configs import common
from configs.pretrain import data2vec_image

SIZES = {
    # size: width, depth, heads, decoder layers, batch, codes, code width
    "tiny": (128, 4, 4, 1, 64, 256, 16),
    "small": (384, 12, 6, 3, 256, 8192, 32),
    "base": (768, 12, 12, 3, 512, 8192, 32),
    "large": (1024, 24, 16, 3, 512, 8192, 32),
}


def get_config(text=None):
    """Options: size=tiny|small|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, decoder, batch, codes, code_width = SIZES[size]
    epoch = data2vec_image.EPOCH // batch

    c = common.base()
    c.objective, c.modality = "vqkd", "image"
    c.batch_size, c.steps, c.log_every = batch, 100 * epoch, 50
    c.dtype = "bfloat16" if size in ("base", "large") else "float32"  # published: fp16
    c.teacher_dtype = c.dtype
    c.image_size, c.image_mean, c.image_std = 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    c.data = common.data(kind="tfds", name="imagenet2012")
    c.eval_data.test.split = "validation"
    c.evaluators = ("knn", "linear")
    c.augment = common.augment()
    c.model = {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": 4 * width,
        "patch_size": 16,
        "norm": "pre",  # or post, sub
        "eps": 1e-6,
        "qkv_bias": "qv",
        "layer_scale": 0.0,
        "drop_path": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
        "init": "normal_beit",  # BEiT's fine-tuning model, of which VQ-KD is built, does not cut
        "scan": size in ("base", "large"),  # one layer's program for all: quick to compile on TPU
        "remat": "none",  # or full, dots
    }
    c.decoder = {"depth": decoder}  # in all else as the encoder
    c.codebook = {
        "size": codes,
        "width": code_width,
        "decay": 0.99,
        "beta": 1.0,  # weight of the vectors' distance to their codes
        "kmeans": 10,  # iterations, after the first update
        "window": epoch,  # a code counts as used that was used in so many updates
    }
    c.teacher = {"checkpoint": "", "random": False, "config": {}}  # `config` is the checkpoint's
    c.optimizer.update(
        {
            "learning_rate": 5e-5 * batch / 128,
            "end_learning_rate": 1e-5,
            "warmup_steps": 10 * epoch,
            "beta2": 0.99,
            "weight_decay": 1e-4,
            "no_decay": "bias|scale|cls_token|norm|positions",
        }
    )
    if size in ("base", "large"):
        c.checkpoint.every = 5000
    if size == "tiny":
        tiny(c)
    if chosen["smoke"]:
        smoke(c)
    return c


def tiny(c):
    """64 px, patches of 8, the packaged emoji: minutes on two CPU cores."""
    c.image_size, c.model.patch_size = 64, 8
    c.data = common.data(kind="emoji")
    c.eval_data.test.split = "test"
    c.augment.update({"scale": (0.2, 1.0), "crop_ratio": 1.0})
    c.steps, c.log_every, c.checkpoint.every, c.codebook.window = 2000, 10, 500, 30
    c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100})


def smoke(c):
    """20 updates on synthetic images, with a teacher that has learned nothing."""
    data2vec_image.smoke(c)
    c.codebook.size, c.teacher.random = 64, True
    c.teacher.config = data2vec_image.get_config("smoke").to_dict()
