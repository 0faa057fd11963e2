"""ALIGN: a convolutional tower of images and a BERT of texts, from many noisy pairs.

    python -m bivl.train --config=configs/pretrain/align.py --workdir=DIR \
        --config.data.name=PAIRS --config.tokenizer.path=vocab.txt

size=base    EfficientNet-B7 at 289 px and BERT-base, from scratch: 1.2 M updates of 16,384 pairs
             of 1.8 B (arXiv 2102.05918, section 5; there 1,024 TPUv3 cores). Published, 1 M
             updates: COCO zero-shot retrieval image to text / text to image R@1 55.4 / 41.7
             (table 7); with EfficientNet-L2 and BERT-large 58.6 / 45.6, ImageNet zero-shot 76.4.
size=small   EfficientNet-B3 and BERT-mini: 37.4 / 24.5 on the same data.
size=tiny    five small stages at 64 px and 128 x 4, on emoji and their keywords: minutes on two
             CPU cores.
smoke        20 updates of `tiny` on synthetic images with captions.

Official weights: `python -m bivl.convert --source=FOLDER --out=DIR` for a folder of Hugging Face's
AlignModel (kakaobrain/align-base: COYO-700M; Flickr30k zero-shot 88.1 / 73.2, COCO 61.2 / 43.1).

The mean of the last map is an image's vector, and the first token's, projected, a text's. The
temperature divides similarities and is learned as it is; it is held above 1 / contrast.max_scale,
where the paper has no limit, and ends near 1 / 64. The optimizer is AdamW, the paper's is LAMB; the
sum of both directions is their mean here. Batch norms see the whole batch, over all devices.
Images are cut out of larger ones by area, where the paper squashes them to 346 px first.

TPU slices (launch/README.md has what they give):
    size=small   v5e:8x16
    size=base    v5p:4x8x8
"""

from configs import common
from configs.pretrain import clip

# size: scales of width and depth, the text's width, depth, heads, common space, batch, rate
SIZES = {
    "tiny": (1.0, 1.0, 128, 4, 4, 96, 64, 5e-4),
    "small": (1.2, 1.4, 256, 4, 4, 384, 16_384, 1e-3),
    "base": (2.0, 3.1, 768, 12, 12, 640, 16_384, 1e-3),
}
STAGES = {  # of EfficientNet-B0, before they are scaled
    "widths": (16, 24, 40, 80, 112, 192, 320),
    "repeats": (1, 2, 2, 3, 3, 4, 1),
    "kernels": (3, 3, 5, 3, 5, 5, 3),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "expansions": (1, 6, 6, 6, 6, 6, 6),
}
TINY = {
    "widths": (16, 24, 40, 64, 96),
    "repeats": (1, 1, 2, 2, 1),
    "kernels": (3, 3, 5, 3, 3),
    "strides": (1, 2, 2, 2, 1),
    "expansions": (1, 4, 4, 4, 4),
}


def get_config(text=None):
    """Options: size=tiny|small|base, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    wide, deep, width, depth, heads, space, batch, rate = SIZES[size]

    c = common.base()
    c.objective, c.modality = "contrastive", "towers"
    c.batch_size, c.steps, c.log_every = batch, 1_200_000, 50
    c.dtype = "float32" if size == "tiny" else "bfloat16"
    c.image_size, c.image_mean, c.image_std = 289, (0.5,) * 3, (0.5,) * 3
    c.data = common.data(kind="tfds", name="pairs")
    c.eval_data.test.split = "validation"
    c.evaluators = ("retrieval",)
    c.augment = common.augment() | {
        "scale": (0.65, 0.75),  # 289 of 346 pixels both ways is 0.7
        "interpolation": "bilinear",
        # Evaluation: all of an image is squashed to so many pixels, then the centre cut out.
        "squash": True,
        "squash_to": 346,
        "crop_ratio": 289 / 346,  # without squash: central crop over short side
    }
    c.tokenizer = {"kind": "wordpiece", "path": ""}
    c.pair = {"length": 64}  # at most model.text.rows
    c.contrast = {
        "width": space,  # of the image tower's last map
        "temperature": 1.0,  # at the start
        "max_scale": 100.0,
        "smoothing": 0.1,
    }
    c.model = {
        "towers": ("image", "text"),
        "trunk": "efficientnet",
        "stem": 32,
        **(TINY if size == "tiny" else STAGES),
        "width_scale": wide,
        "depth_scale": deep,
        "multiple": 8,  # of which all widths are multiples
        "squeeze": 0.25,
        "centred": (),  # blocks that are padded alike on both sides although they halve the map
        "eps": 1e-3,
        "decay": 0.99,  # of the running statistics, a step
        "drop_path": 0.2,
    }
    # Post-norm blocks behind a normalised embedding, whose first token stands for the text.
    bert = common.transformer(width, depth, heads, eps=1e-12, input_norm=True)
    c.model.text = bert | {
        "rows": 512,  # of the table of positions
        "vocabulary": 0,  # rows of the table of words, 0: as many as the tokenizer has
        "pool": "first",
        "end": None,
        "pad": None,  # the id that nothing reads, None: the tokenizer's
    }
    c.optimizer.update(
        {
            "schedule": "polynomial",  # of power 1
            "learning_rate": rate,
            "warmup_steps": 10_000,
            "weight_decay": 1e-5,
            "no_decay": "bias|scale|temperature|norm",
        }
    )
    if size == "tiny":
        tiny(c)
    else:
        c.checkpoint.every = 5000
    if chosen["smoke"]:
        clip.smoke(c)
    return c


def tiny(c):
    """64 px emoji with their keywords."""
    clip.tiny(c)
    c.augment.update({"squash_to": 0, "crop_ratio": 1.0})
    # A divisor moves by no more than a rate a step: from 1 it would not get there.
    c.contrast.temperature = 0.07
