"""Contrastive tuning of an image-text encoder for retrieval: BEiT-3's intermediate stage.

    python -m bivl.train --config=configs/finetune/contrastive.py --config.init=CHECKPOINT \
        --workdir=DIR

Symmetric InfoNCE of images alone and texts alone (objectives/contrastive.py). The encoder, its
sizes and the data of pairs are those of configs/pretrain/beit3.py, as bivl has them; the optimizer
is the giant's (arXiv 2208.10442, appendix A): rate 3e-5, decay 0.95 a layer, drop path 0.3, batch
16,384, no dropout. What it leaves open is as in the released fine-tuning code: the lowest rate
1e-6, decay of the positions of texts, pairs flipped and cropped but not jittered, and evaluation
that sees all of an image, squashed.

Official files, COCO 5k IR@1 / TR@1 at 384 px (beit3/README.md):
`beit3_base_patch16_384_coco_retrieval.pth` 61.4 / 79.1, `beit3_large_...` 63.4 / 82.1; Flickr30k:
`beit3_base_patch16_384_f30k_retrieval.pth` 86.2 / 96.3, large 88.1 / 97.2; they were tuned from
`beit3_{base,large}_itc_patch16_224.pth`. With `beit3.spm` beside FILE, and a prepared set of image,
text and id (captions of one picture share their id):

    python -m bivl.convert --source=FILE --out=DIR
    python -m bivl.evaluate --checkpoint=DIR --config.eval_data.test.kind=tfds \
        --config.eval_data.test.name=coco --config.eval_data.test.dir=PREPARED

size=tiny tunes for two minutes on two CPU cores: 150 updates of 128 pairs at rate 1e-3.
"""

from configs import common
from configs.pretrain import beit3


def get_config(text=None):
    """Options: size=tiny|small|base|large|giant, smoke; of tiny data=emoji|scenes."""
    chosen = common.options(text, {"size": "base", "data": "emoji", "smoke": False})
    c = beit3.get_config(text)
    tiny = chosen["smoke"] or chosen["size"] == "tiny"
    c.objective, pairs = "contrastive", c.data.pairs.to_dict()
    del pairs["weight"], c.teacher, c.loss_weights, c["text"], c.teacher_dtype
    c.data = common.data(**pairs)
    c.contrast = {"width": c.model.width, "pool": "first"}  # or mean, patches
    c.contrast.text = "encoder"  # or words: the sum of their own vectors
    c.contrast.masked = ()
    c.evaluators = ("retrieval",)
    c.augment.scale = c.pair.scale
    if tiny:
        # Few pairs are learnt by heart: half of the words are hidden.
        c.contrast.masked = () if chosen["smoke"] else ("text",)
        c.contrast.pool = "mean"  # nothing has taught the first tokens of our own models
        c.contrast.width = 512  # words want room
        c.batch_size, c.steps = (64, 20) if chosen["smoke"] else (128, 150)
        c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20})
        return c
    c.batch_size, c.steps, c.model.drop_path = 16_384, 6_500, 0.3
    c.optimizer.update({"learning_rate": 3e-5, "warmup_steps": 1_300, "beta2": 0.999})
    c.optimizer.update({"layer_decay": 0.95, "eps": 1e-8, "clip_norm": 0.0})
    c.optimizer.end_learning_rate = 1e-6
    c.optimizer.no_decay = "bias|scale|cls_token|norm|image_positions"
    c.augment.update({"color_jitter": (0.0, 0.0, 0.0), "squash": True})
    return c
