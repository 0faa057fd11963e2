"""BEiT-3 tells whether a statement about two images is true: NLVR2 with the released recipe, tiny.

    python -m bivl.train --config=configs/finetune/nlvr2.py --workdir=DIR --config.init=PRETRAINED \
        --config.tokenizer.path=beit3.spm --config.data.name=nlvr2 --config.data.dir=PREPARED

size=base    224 px, 20 epochs at batch 256 (6,740 updates); published, NLVR2 dev / test-P: 83.6 /
             84.4, from the `_indomain` checkpoint 84.6 / 85.3 at --config.optimizer.learning_rate=
             5e-4 (microsoft/unilm beit3/README.md).
size=large   the same; published: 88.5 / 89.4, and 89.2 / 90.0 at 1e-4.
size=tiny    128 x 4 x 4 on 48 px, statements about two invented scenes, from scratch or from
             configs/pretrain/beit3.py:size=tiny; half of them are true. No published score, and
             none of ours yet.
smoke        20 updates of `tiny`, under a minute on two CPU cores.

PRETRAINED is what bivl.convert makes of `beit3_{base,large}_patch16_224.pth` or the same with
`_indomain`, `beit3.spm` beside it. Tuned files are `beit3_{base,large}_patch16_224_nlvr2.pth`; the
published score (test-P 84.386 and 89.437) without training:

    python -m bivl.convert --source=FILE --out=DIR
    python -m bivl.evaluate --checkpoint=DIR --config.data.name=nlvr2 --config.data.dir=PREPARED \
        --config.eval_data.test.split=test1

A prepared set has image and image2 (the left and the right one), text, and label (0 false, 1 true).

Follows `beit3/get_started/get_started_for_nlvr2.md`: 5 epochs of warm-up, drop path 0.2, weight
decay 0.2, rates that fall from layer to layer. An epoch is 86,373 statements.
"""

from configs import common
from configs.finetune import vqa
from configs.pretrain import beit3

SIZES = {  # peak lr, layer decay, drop path
    "tiny": (1e-3, 1.0, 0.0),
    "base": (7e-4, 0.65, 0.2),
    "large": (3e-4, 0.85, 0.2),
}
BATCH, EPOCH = 256, 86_373 // 256
FIELDS = {"image2": ""}


def get_config(text=None):
    """Options: size=tiny|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    rate, decay, drop_path = SIZES[size]

    c = beit3.get_config(f"size={size}")
    vqa.answering(c, "nlvr2", 224)
    c.num_classes, c.classifier = 2, {"scale": 0.001}
    c.data = common.data(kind="tfds", name="nlvr2", fields=FIELDS)
    c.batch_size, c.steps = BATCH, 20 * EPOCH
    c.model.drop_path = drop_path
    c.optimizer.update(
        {
            "learning_rate": rate,
            "warmup_steps": 5 * EPOCH,
            "weight_decay": 0.2,
            "layer_decay": decay,
        }
    )
    if size == "tiny":
        vqa.small(c)
        statements = {"kind": "scenes", "name": "statements", "image_size": 48}
        c.data = common.data(**statements, num_examples=40_000, fields=FIELDS)
        c.eval_data.test.update({**statements, "num_examples": 2000})
        c.classifier.scale = 1.0
    if chosen["smoke"]:
        vqa.smoke(c)
    return c
