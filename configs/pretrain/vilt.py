"""ViLT: one encoder over a text and its image, without region features, with the paper's numbers.

    python -m bivl.train --config=configs/pretrain/vilt.py --workdir=DIR \
        --config.data.name=PAIRS --config.tokenizer.path=vocab.txt

size=base    ViT-B/32 at 384 px and texts of 40 tokens: 200,000 updates of 4,096 pairs from COCO,
             Visual Genome, Conceptual Captions and SBU, 9.9 M captions, on 64 V100 (arXiv
             2102.03334, section 4). Published, fine-tuned: VQAv2 71.3, NLVR2 76.1, COCO retrieval
             TR/IR@1 61.5 / 42.7.
size=tiny    128 x 4, on 64 px emoji and their keywords: minutes on two CPU cores.
smoke        20 updates of `tiny` on synthetic images with captions.

Official weights: `python -m bivl.convert --source=FOLDER --out=DIR` for a folder of Hugging Face's
ViltForMaskedLM (dandelin/vilt-b32-mlm) and its other classes.

ViLT starts from a ViT-B/32 trained on ImageNet, here nothing does unless --config.init names it.
Its images keep their shape, with positions resized, and 200 patches are drawn in training; here all
are squares and keep all of their patches. Masked are whole words where the tokenizer is BERT's
(pair.masking); images of pairs that do not match come from the same batch.

TPU slices (launch/README.md has what they give):
    size=base    v5e:8x8  --config.optimizer.accumulate=2
"""

from configs import common
from configs.pretrain import clip

SIZES = {
    # size: width, depth, heads, patch, image, text, batch, updates, warm-up, rate
    "tiny": (128, 4, 4, 8, 64, 32, 64, 1000, 50, 5e-4),
    "base": (768, 12, 12, 32, 384, 40, 4096, 200_000, 20_000, 1e-4),
}


def get_config(text=None):
    """Options: size=tiny|base, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, patch, side, length, batch, steps, warmup, rate = SIZES[size]

    c = common.base()
    c.objective, c.modality = "vilt", "single_stream"
    c.batch_size, c.steps, c.log_every = batch, steps, 50
    c.dtype = "float32" if size == "tiny" else "bfloat16"
    c.image_size, c.image_mean, c.image_std = side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    c.data = common.data(kind="tfds", name="pairs")
    c.eval_data.test.split = "validation"
    c.augment = common.augment(flip=False, scale=(0.9, 1.0), crop_ratio=1.0)
    c.augment.squash = False  # evaluation sees all of an image, whatever its shape
    c.tokenizer = {"kind": "wordpiece", "path": ""}
    words = {"kind": "words", "kept": 0.1, "randomized": 0.1}
    c.pair = {"length": length, "mask_ratio": 0.15, "masking": words}
    c.loss_weights = {"mlm": 1.0, "itm": 1.0, "wpa": 0.1}
    c.model = common.transformer(width, depth, heads, norm="pre", final_norm=True) | {
        "patch_size": patch,
        "text_rows": length,  # of the table of the text's positions
        "vocabulary": 0,  # rows of the table of words, 0: as many as the tokenizer has
        "segments": 2,  # rows of BERT's table of segments, of which the first is read
        "modalities": 2,  # rows: text, image and, in NLVR2's models, a second image
        "pad": None,  # the id of pads where a batch has no `padding`, None: the tokenizer's
        "pooler": True,
        "tied": False,  # whether words are named by the rows of their own table
        "activation": "gelu",
        "eps": 1e-6,
        "text_eps": 1e-12,
        "activation_dropout": 0.1,
        "attention_dropout": 0.0,
    }
    c.optimizer.update(
        {
            "schedule": "polynomial",
            "learning_rate": rate,
            "warmup_steps": warmup,
            "beta2": 0.98,
            "weight_decay": 0.01,
            "no_decay": "bias|scale|norm",
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
    clip.emoji(c)
    c.augment.update({"flip": True, "scale": (0.5, 1.0)})
    c.tokenizer.kind = "small_xlmr"
    c.evaluators = ("knn",)
    c.log_every, c.checkpoint.every = 10, 500
