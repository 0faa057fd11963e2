"""BEiT-3: masked data modeling on images, texts and pairs, with the paper's numbers.

    python -m bivl.train --config=configs/pretrain/beit3.py --workdir=DIR \
        --config.teacher.checkpoint=TOKENIZER --config.tokenizer.path=beit3.spm \
        --config.data.images.name=imagenet21k --config.data.texts.dir=TEXTS --config.data.pairs...

size=giant   1408 x 40, patch 14: 1M updates of 2,048 images, texts and pairs each, two weeks on 256
             A100 (paper and its authors). Published: COCO retrieval TR/IR@1 84.8 / 67.2, VQAv2
             84.0, ImageNet 89.6, all fine-tuned. The released layout has 2.1 B parameters;
             --config.model.experts=shared --config.model.pair_layers=3 is the paper's, 1.9 B.
size=large   1024 x 24, patch 16; released checkpoints: ImageNet 87.6, VQAv2 81.9, NLVR2 89.4.
size=base    768 x 12, patch 16; ImageNet 85.4, VQAv2 77.7, NLVR2 84.4. Batch, updates and rate of
             these two are not published. Batch 12,288 and 300,000 updates are Magneto's for such
             data (arXiv 2210.06423, section 7), and base's rate 2e-3; large has the giant's 1e-3.
size=small   384 x 12, one GPU or TPU chip; no published score.
size=tiny    128 x 4 on 48 px emoji, their keywords and `pydoc`, or scenes
             (data=scenes): minutes on two CPU cores.
smoke        20 updates of `tiny` with a tokenizer that has learned nothing.

Official files, for bivl.convert: `beit3_{base,large}_patch16_224.pth`, the same with `_indomain`,
and `beit3.spm` beside them.

The tokenizer is a checkpoint of configs/pretrain/vqkd.py. Pre-training code was never published;
what the paper leaves open is set here: all losses weigh 1 (loss_weights); both sides of a pair are
masked (pair.corrupt); 80 % of chosen words become <mask>, 10 % another word and 10 % stay, as in
the released captioning code (pair.masking, text.masking); no whole words; texts of 512 tokens
packed by documents (text.break_mode), captions of 64; 75 of 196 patches; crops of 0.2 to 1 of an
image and 0.5 to 1 of a pair's (BEiT v2, VLMo); pixels of mean and std 0.5; the lowest rate 1e-5; no
decay of vectors, biases, positions and CLS (`beit2`).

TPU slices (launch/README.md has what they give):
    size=base    v5e:8x8  --config.model.remat=full
    size=large   v5p:4x4x4
    size=giant   2 x v5p:4x4x8
"""

from configs import common

SIZES = {
    # size: width, depth, heads, mlp, patch, batch, updates, learning rate
    "tiny": (128, 4, 4, 512, 8, 192, 300, 1e-3),
    "small": (384, 12, 6, 1536, 16, 768, 300_000, 1e-3),
    "base": (768, 12, 12, 3072, 16, 12_288, 300_000, 2e-3),
    "large": (1024, 24, 16, 4096, 16, 12_288, 300_000, 1e-3),
    "giant": (1408, 40, 16, 6144, 14, 6144, 1_000_000, 1e-3),
}


def get_config(text=None):
    """Options: size=tiny|small|base|large|giant, smoke; of tiny data=emoji|scenes."""
    chosen = common.options(text, {"size": "base", "data": "emoji", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, mlp, patch, batch, steps, rate = SIZES[size]

    c = common.base()
    c.objective, c.modality = "mdm", "image_text"
    c.batch_size, c.steps, c.log_every = batch, steps, 50
    c.dtype = "float32" if size in ("tiny", "small") else "bfloat16"
    c.teacher_dtype = c.dtype
    c.image_size, c.image_mean, c.image_std = 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    c.data = {
        "images": common.data(kind="tfds", name="imagenet21k", weight=1),
        "texts": common.data(kind="text", weight=1),
        "pairs": common.data(kind="tfds", name="pairs", weight=1),
    }
    c.eval_data.test.split = "validation"
    jitter = (0.4, 0.4, 0.4)
    c.augment = common.augment(color_jitter=jitter, scale=(0.2, 1.0), crop_ratio=1.0)
    c.tokenizer = {"kind": "xlmr", "path": ""}  # beit3.spm
    share = 75 / 196 if patch == 16 else 102 / 256
    c.mask_ratio, c.masking = share, {"kind": "block", "min_block": 16, "exact": True}
    words = {"kind": "beit3", "kept": 0.1, "randomized": 0.1}
    c.text = {"length": 512, "break_mode": "complete_doc", "cache": ""}
    c.text.update({"mask_ratio": 0.15, "masking": dict(words)})
    c.pair = {"length": 64, "mask_ratio": 0.5, "masking": dict(words)}
    c.pair.update({"corrupt": "both", "scale": (0.5, 1.0)})
    c.loss_weights = dict.fromkeys(("images", "texts", "pairs_image", "pairs_text"), 1.0)
    c.model = {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": mlp,
        "patch_size": patch,
        "text_rows": 1024,  # of the table of positions; two of them are never read
        "vocabulary": 64_010,  # rows of the table of words, 0: as many as the tokenizer has
        "experts": "decoupled",  # the released layout; or shared, the paper's
        "pair_layers": 0,  # of `shared`: top layers with an FFN for pairs
        "norm": "sub",  # or pre
        "eps": 1e-5,
        "qkv_bias": "qkv",
        "layer_scale": 0.0,
        "drop_path": 0.1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
        "init": "scratch",  # or magneto, beit
        "scan": size not in ("tiny", "small"),
        "remat": "full" if size in ("large", "giant") else "none",
    }
    c.teacher = {"checkpoint": "", "random": False, "config": {}}  # `config` is the checkpoint's
    c.optimizer.update(
        {
            "learning_rate": rate,
            "end_learning_rate": 1e-5,
            "warmup_steps": 10_000,
            "beta2": 0.98,
            "eps": 1e-6,
            "weight_decay": 0.05,
            "no_decay": "bias|scale|cls_token|norm|positions",
            "clip_norm": 3.0,
        }
    )
    if size == "tiny":
        tiny(c, chosen["data"])
    else:
        c.checkpoint.every = 5000
    if chosen["smoke"]:
        smoke(c)
    return c


def tiny(c, data):
    """48 px emoji with the words of their keywords, alone and as pairs, and `pydoc`; or scenes.

    Crops are larger than the published ones and hardly skewed: emoji are drawn to a template, and
    little of one is left in its fifth.
    """
    if data not in ("emoji", "scenes"):
        raise ValueError(f"data={data} is unknown; use emoji or scenes")
    c.image_size, c.augment.color_jitter = 48, (0.0, 0.0, 0.0)
    c.augment.scale, c.augment.ratio, c.pair.scale = (0.6, 1.0), (0.9, 1.11), (0.9, 1.0)
    c.text.length, c.text.break_mode, c.pair.length = 48, "none", 24
    texts = {"text": "words"}
    pairs, train, test = ({"kind": "emoji", "fields": texts} for _ in range(3))
    test["split"] = "test"
    if data == "scenes":
        # Captions tell left from right and name every thing in the picture.
        c.augment.flip, c.pair.scale, c.pair.length = False, (1.0, 1.0), 44
        pairs, train, test = (
            {"kind": "scenes", "image_size": 48, "num_examples": count, "split": split}
            for count, split in ((20_000, "train"), (2000, "train"), (400, "test"))
        )
    images = {key: value for key, value in pairs.items() if key != "fields"}  # no words are read
    c.data = {
        "images": common.data(**images, weight=1),
        "texts": common.data(kind="pydoc", weight=1),
        "pairs": common.data(**pairs, weight=2),
    }
    c.eval_data = {"train": common.data(**train), "test": common.data(**test)}
    c.tokenizer.kind = "small_xlmr"
    c.masking.min_block, c.mask_ratio = 4, 0.4
    c.model.update({"text_rows": 130, "vocabulary": 0, "drop_path": 0.0, "layer_scale": 0.1})
    c.evaluators = ("knn", "linear", "retrieval")
    c.eval.retrieval.floor = True
    c.log_every, c.checkpoint.every, c.optimizer.warmup_steps = 10, 500, 30


def smoke(c):
    """20 updates."""
    c.steps, c.batch_size, c.log_every, c.optimizer.warmup_steps = 20, 24, 1, 5
    for part in (c.data.images, c.data.pairs, c.eval_data.train, c.eval_data.test):
        part.update({"kind": "synthetic", "image_size": 64, "num_examples": 256})
        part.fields.text = ""
    c.eval_data.test.num_examples, c.eval.retrieval.floor = 64, False
    c.data.pairs.weight, c.checkpoint.every, c.evaluators, c.loader.threads = 1, 10, ("knn",), 2
    from configs.pretrain import vqkd

    tokenizer = vqkd.get_config("smoke")
    tokenizer.image_size = tokenizer.teacher.config.image_size = c.image_size
    c.teacher.random, c.teacher.config = True, tokenizer.to_dict()
