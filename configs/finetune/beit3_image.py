"""BEiT-3's image branch, fine-tuned: ImageNet-1k with the released recipe, tiny.

    python -m bivl.train --config=configs/finetune/beit3_image.py --workdir=DIR \
        --config.init=PRETRAINED --config.data.dir=PREPARED_IMAGENET

size=base    50 epochs at batch 1,024 (62,550 updates); published: 85.4 % top-1, 97.6 % top-5
             (microsoft/unilm beit3/README.md). PRETRAINED is what bivl.convert makes of
             beit3_base_patch16_224.pth.
size=large   the same; published: 87.6 % top-1, 98.3 % top-5, from beit3_large_patch16_224.pth.
size=tiny    128 x 4 x 4 on 64 px, scikit-learn's digits; two CPU cores, two minutes; no published
             score. PRETRAINED is one of configs/pretrain/beit3.py:size=tiny, or none.
smoke        20 updates of `tiny` on synthetic images, under a minute on two CPU cores.

The published score without training, from beit3_base_patch16_224_in1k.pth or the large one:

    python -m bivl.convert --source=FILE --out=DIR
    python -m bivl.evaluate --checkpoint=DIR --config.data.dir=PREPARED_IMAGENET

Follows `beit3/get_started/get_started_for_image_classification.md`: mean of the patches, LayerNorm
and a linear map that begins near zero; the final norm of pre-training is left out, and nothing of
texts is there.
"""

from configs import common
from configs.finetune import data2vec_image
from configs.pretrain import beit3

SIZES = {  # peak lr, layer decay, drop path
    "tiny": (1e-3, 0.9, 0.0),
    "base": (7e-4, 0.65, 0.15),
    "large": (2e-4, 0.8, 0.25),
}
UNUSED = ("loss_weights", "teacher", "text", "pair")


def get_config(text=None):
    """Options: size=tiny|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    rate, decay, drop_path = SIZES[size]

    c = beit3.get_config(f"size={size}")
    c.unlock()
    for key in UNUSED:
        del c[key]
    c.data, c.eval_data = common.data(kind="tfds", name="imagenet2012"), common.base().eval_data
    c.eval_data.test.split = "validation"
    c.image_mean, c.image_std = common.IMAGENET_MEAN, common.IMAGENET_STD
    data2vec_image.imagenet(c, scale=0.001)
    c.augment.crop_ratio = 1.0
    c.masking = {"kind": "block"}  # none is drawn: the mask token of pre-training comes along
    c.tokenizer = {"kind": "ids", "path": "", "size": 64_002}  # no text is read
    epoch = data2vec_image.EPOCH
    c.batch_size, c.steps = data2vec_image.BATCH, 50 * epoch
    c.model.update({"drop_path": drop_path, "final_norm": False, "vocabulary": 64_010})
    c.optimizer.update(
        {
            "learning_rate": rate,
            "end_learning_rate": 1e-6,
            "warmup_steps": 5 * epoch,
            "weight_decay": 0.05,
            "no_decay": "bias|scale|cls_token|norm|image_positions",
            "layer_decay": decay,
        }
    )
    if size == "tiny":
        data2vec_image.tiny(c)
    if chosen["smoke"]:
        data2vec_image.smoke(c)
    return c
