"""CLIP: two towers that learn which text belongs to which image, with the paper's numbers.

    python -m bivl.train --config=configs/pretrain/clip.py --workdir=DIR \
        --config.data.name=PAIRS --config.tokenizer.path=bpe_simple_vocab_16e6.txt.gz

size=base    ViT-B/16 and a text transformer of 512 x 12: 32 epochs of 400 M pairs at batch 32,768
             (arXiv 2103.00020, section 2.5 and table 20). Published: ImageNet zero-shot 68.6, with
             --config.model.patch_size=32 63.2. ViT-L/14 took 12 days on 256 V100.
size=large   ViT-L/14 and 768 x 12: ImageNet zero-shot 75.3; after another epoch at 336 px 76.2.
size=small   384 x 12 and 384 x 6, one GPU or TPU chip, batch 4,096; no published score.
size=tiny    128 x 4 twice, on 64 px emoji and their keywords: minutes on two CPU cores.
smoke        20 updates of `tiny` on synthetic images with captions.

Official weights: `python -m bivl.convert --source=ViT-B-16.pt --out=DIR` (openai/CLIP), or a folder
of Hugging Face's CLIPModel. `python -m bivl.evaluate --checkpoint=DIR --config.evaluators=zeroshot`
with eval_data then gives the published scores, up to the 80 templates and the edited class names
that they were taken with (config.eval.zeroshot.templates; one template costs about 3.5 points).

The image tower starts as PyTorch makes it, the text tower by CLIP's own rule (`init`). The scale of
similarities is learned and held to 100 (contrast.max_scale); the learning rates' warm-up and peaks
for B/16 and L/14 are open_clip's and the paper's. Crops of 0.9 to 1 of an image are open_clip's;
CLIP cuts squares. Nothing decays that is a gain, a bias, the scale or the class token.

TPU slices (launch/README.md has what they give):
    size=small   v5e:4x4  --config.dtype=bfloat16
    size=base    v5e:8x8
    size=large   v5p:4x4x4
"""

from configs import common

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = {
    # size: width, depth, heads, patch, text's width, depth, heads, common space, batch, rate
    "tiny": (128, 4, 4, 8, 128, 4, 4, 128, 64, 5e-4),
    "small": (384, 12, 6, 16, 384, 6, 6, 384, 4096, 5e-4),
    "base": (768, 12, 12, 16, 512, 12, 8, 512, 32_768, 5e-4),
    "large": (1024, 24, 16, 14, 768, 12, 12, 768, 32_768, 4e-4),
}
PAIRS, EPOCHS = 400_000_000, 32


def get_config(text=None):
    """Options: size=tiny|small|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, patch, text_width, text_depth, text_heads, space, batch, rate = SIZES[size]

    c = common.base()
    c.objective, c.modality = "contrastive", "towers"
    c.batch_size, c.steps, c.log_every = batch, EPOCHS * PAIRS // batch, 50
    c.dtype = "float32" if size in ("tiny", "small") else "bfloat16"
    c.image_size, c.image_mean, c.image_std = 224, MEAN, STD
    c.data = common.data(kind="tfds", name="pairs")
    c.eval_data.test.split = "validation"
    c.evaluators = ("retrieval",)
    c.augment = common.augment(flip=False, scale=(0.9, 1.0), crop_ratio=1.0)
    c.tokenizer = {"kind": "clip", "path": ""}
    c.pair = {"length": 77}  # at most model.text.rows
    c.contrast = {"width": space, "max_scale": 100.0}
    tall = size in ("base", "large")
    c.model = transformer(width, depth, heads, tall) | {
        "towers": ("image", "text"),
        "patch_size": patch,
        "init": "torch",
        "input_norm": True,
    }
    # The text tower is as the image tower in all that is not named here.
    c.model.text = transformer(text_width, text_depth, text_heads, tall) | {
        "rows": 77,  # of the table of positions
        "vocabulary": 0,  # rows of the table of words, 0: as many as the tokenizer has
        "pool": "end",  # or highest: the token with the highest id
        "end": None,  # the id that ends a text, None: the tokenizer's eos
        "init": "clip",
        "input_norm": False,
    }
    c.optimizer.update(
        {
            "learning_rate": rate,
            "warmup_steps": 2000,
            "beta2": 0.98,
            "eps": 1e-6,
            "weight_decay": 0.2,
            "no_decay": "bias|scale|cls_token|norm",
        }
    )
    if size == "tiny":
        tiny(c)
    else:
        c.checkpoint.every = 5000
    if chosen["smoke"]:
        smoke(c)
    return c


def transformer(width: int, depth: int, heads: int, tall: bool) -> dict:
    """One tower's encoder: pre-norm, quick GELU, no dropout."""
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": 4 * width,
        "norm": "pre",
        "eps": 1e-5,
        "qkv_bias": "qkv",
        "activation": "quick_gelu",  # or gelu
        "layer_scale": 0.0,
        "drop_path": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
        "scan": tall,  # one layer's program for all: quick to compile on TPU
        "remat": "full" if tall else "none",  # or dots
    }


def tiny(c):
    """64 px emoji with their keywords."""
    emoji(c)
    c.augment.update({"flip": True, "scale": (0.5, 1.0)})
    c.tokenizer.kind, c.pair.length, c.model.text.rows = "small_xlmr", 32, 32
    c.steps, c.log_every, c.checkpoint.every, c.optimizer.warmup_steps = 1000, 10, 500, 50


def emoji(c):
    """Pairs of emoji and their keywords, to train and to evaluate with."""
    c.image_size = 64
    pairs = {"kind": "emoji", "fields": {"text": "keywords"}}
    c.data, c.eval_data.train = common.data(**pairs), common.data(**pairs)
    c.eval_data.test = common.data(**pairs, split="test")


def smoke(c):
    """20 updates on synthetic pairs."""
    c.steps, c.batch_size, c.log_every, c.optimizer.warmup_steps = 20, 32, 1, 5
    for part in (c.data, c.eval_data.train, c.eval_data.test):
        part.update({"kind": "synthetic", "image_size": 64, "num_examples": 256})
        part.fields.text = ""
    c.eval_data.test.num_examples = 64
    c.checkpoint.every, c.loader.threads = 10, 2
