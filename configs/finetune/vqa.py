"""BEiT-3 answers questions about images: VQAv2 with the released recipe, and small sets.

    python -m bivl.train --config=configs/finetune/vqa.py --workdir=DIR --config.init=PRETRAINED \
        --config.tokenizer.path=beit3.spm --config.data.name=vqav2 --config.data.dir=PREPARED

size=base    480 px, 10 epochs at batch 128 (51,410 updates); published, VQAv2 test-dev: 77.65,
             from the `_indomain` checkpoint 78.46 (microsoft/unilm beit3/README.md).
size=large   the same; published: 81.85 and 82.53.
size=tiny    128 x 4 x 4 on 48 px, from scratch or from configs/pretrain/{bivl,beit3}.py:size=tiny.
             data=scenes asks about invented scenes, data=easy_vqa about one shape each (the package
             easy-vqa). It shows that all runs, and hardly more: CLS, which alone the head reads,
             finds the words within 200 updates, the image much later. Of 2,000 questions about
             scenes 27.3 % after its 800 updates from bivl, of easy_vqa 65.9 % after 600, where
             questions without their images give 22.7 and 65.0 %. Layers without sub-LN see sooner
             (--config.model.norm=pre --config.model.layer_scale=0, from scratch 67.5 % of easy_vqa
             after 1,200 updates).
smoke        20 updates of `tiny`, under a minute on two CPU cores.

PRETRAINED is what bivl.convert makes, at the size of these images, of
`beit3_{base,large}_patch16_224.pth` or the same with `_indomain`, `beit3.spm` beside it:

    python -m bivl.convert --source=FILE --out=PRETRAINED --config.image_size=480

Tuned files are `beit3_{base,large}_patch16_480_vqa.pth`, of 3,129 answers; bivl.convert keeps their
head, and

    python -m bivl.evaluate --checkpoint=DIR --config.data.name=vqav2 --config.data.dir=PREPARED

gives the share of questions whose commonest answer is named. The published score credits every
annotator's answer and is computed by EvalAI for test-dev. A prepared set has image, question and
answer, a number below 3,129 in the order of the reference's `answer2label.txt`.

Follows `beit3/get_started/get_started_for_vqav2.md`: no final norm, no decay of rates by layers,
drop path 0.1 (large 0.15), weight decay 0.01, beta2 0.98, a rate 20 times as large for the head
but not for its pooler, RandAugment at level 7. One thing of it is not here: one answer counts as
right (objectives/vqa.py), and not each as far as the annotators agree. An epoch is all of the
658,111 questions of train and val; the reference leaves out those without a frequent answer, and
1,000 images.
"""

from configs import common
from configs.pretrain import beit3

SIZES = {  # peak lr, drop path
    "tiny": (1e-3, 0.0),
    "base": (3e-5, 0.1),
    "large": (2e-5, 0.15),
}
ANSWERS, BATCH, EPOCH = 3129, 128, 658_111 // 128
UNUSED = ("loss_weights", "teacher", "text", "teacher_dtype")
FIELDS = {"text": "question", "label": "answer"}


def get_config(text=None):
    """Options: size=tiny|base|large, smoke; of tiny data=scenes|easy_vqa."""
    chosen = common.options(text, {"size": "base", "data": "scenes", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    rate, drop_path = SIZES[size]

    c = beit3.get_config(f"size={size}")
    c.num_classes = ANSWERS
    answering(c, "vqa", 480)
    c.data = common.data(kind="tfds", name="vqav2", fields=FIELDS)
    c.batch_size, c.steps = BATCH, 10 * EPOCH
    c.model.update({"drop_path": drop_path, "final_norm": False})
    c.augment.update({"rand_level": 7.0, "rand_layers": 2})  # RandAugment; level 0: none
    c.optimizer.update(
        {"learning_rate": rate, "warmup_steps": EPOCH, "weight_decay": 0.01, "beta2": 0.98}
    )
    c.optimizer.update({"fast": "^head/(fc|norm|logits)/", "fast_rate": 20.0})
    if size == "tiny":
        tiny(c, chosen["data"])
    if chosen["smoke"]:
        smoke(c)
    return c


def answering(c, objective: str, size: int) -> None:
    """A pre-training config of BEiT-3 -> what its tuning on images with texts shares."""
    c.unlock()
    c.objective, c.image_size, c.evaluators = objective, size, ("accuracy",)
    for key in set(UNUSED) & set(c):
        del c[key]
    c.eval_data = common.base().eval_data
    c.eval_data.test.split = "validation"
    # The whole image in a square; flips change left and right, and are there in the reference too.
    c.augment = common.augment(scale=(0.5, 1.0), squash=True)
    c.optimizer = common.base().optimizer
    c.optimizer.update(
        {"end_learning_rate": 1e-6, "no_decay": "bias|scale|cls_token|norm|image_positions"}
    )


def tiny(c, data: str) -> None:
    """Small pictures from scratch, whole, for what is asked may stand at their edge."""
    if data not in ("scenes", "easy_vqa"):
        raise ValueError(f"data={data} is unknown; use scenes or easy_vqa")
    small(c)
    c.augment.rand_level, c.optimizer.fast_rate = 0.0, 1.0
    c.num_classes, c.data = 30, common.data(kind="scenes", image_size=48, num_examples=40_000)
    c.eval_data.test.update({"kind": "scenes", "image_size": 48, "num_examples": 2000})
    if data == "easy_vqa":
        c.num_classes, c.data = 13, common.data(kind="easy_vqa")
        c.eval_data.test.update({"kind": "easy_vqa", "split": "test[:2000]"})
    for part in (c.data, c.eval_data.test):
        part.fields.update(FIELDS)


def small(c) -> None:
    """The model and training of `tiny`."""
    c.image_size, c.pair.length = 48, 20
    c.augment.update({"flip": False, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
    c.eval_data.test.split = "test"
    c.batch_size, c.steps, c.log_every, c.checkpoint.every = 64, 800, 10, 400
    c.model.layer_scale = 1.0  # without a checkpoint, small ones take long to grow
    c.optimizer.update({"warmup_steps": 50, "clip_norm": 3.0})


def smoke(c) -> None:
    """20 updates."""
    c.steps, c.batch_size, c.log_every, c.optimizer.warmup_steps = 20, 8, 1, 5
    c.data.num_examples, c.eval_data.test.num_examples, c.checkpoint.every = 64, 32, 10
