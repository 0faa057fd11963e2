r"""GLUE and other classes of texts: data2vec 1.0 and 2.0 with RoBERTa's recipes, tiny.

    python -m bivl.train --config=configs/finetune/glue.py:task=mnli --workdir=DIR \
        --config.init=PRETRAINED --config.data.dir=GLUE/MNLI \
        --config.tokenizer.path=ROBERTA_VOCABULARY

task=mnli|qnli|qqp|sst2|cola|mrpc|rte|stsb   ten epochs of the task's own *.tsv, one GPU. Published
             for data2vec 1.0 with span masks (paper, table 4): MNLI 82.8 and 83.4 (the second with
             --config.eval_data.test.split=dev_mismatched), QNLI 91.1, QQP 89.0, SST-2 92.4, CoLA
             60.3, MRPC 90.0, RTE 69.9, STS-B 87.7, each the mean of five seeds, on the development
             set. The paper takes the best learning rate of 1, 2, 3, 4e-5 over all tasks, version 2
             of 1, 2, 4, 6e-5 for each.
version=1|2  whose encoder: configs/pretrain/data2vec_text.py or data2vec2_text.py.
size=base    that encoder's size; `large` is there for version 2, `small` for version 1.
size=tiny    128 x 4 x 4, the names of the packaged emoji by category; two CPU cores; no published
             score. PRETRAINED is of the same version's size=tiny, or none.
smoke        20 updates of `tiny`, under a minute on two CPU cores.

Official files: PRETRAINED is what bivl.convert makes of `nlp_base.pt`, data2vec's or data2vec2's
(fairseq `examples/data2vec/README.md`), or of Hugging Face's `data2vec-text-base`. No fine-tuned
one is published.

Follows fairseq's `examples/roberta/config/finetuning` (2.0: `config/v2/text_finetuning`): a tanh
head on <s>, polynomial decay, every parameter decayed. STS-B's scores are learned as fifths, which
its preprocessing makes of them. CoLA's train.tsv and dev.tsv lack the line that names the columns:
put `source label star sentence` there, with tabs.
"""

from configs import common, finetune
from configs.pretrain import data2vec2_text, data2vec_text

SIZES = ("tiny", "base")
PAIR = ("sentence1", "sentence2")
TASKS = {
    # task: classes, text, pair, label, batch, updates, warm-up
    "mnli": (3, *PAIR, "gold_label", 32, 123_873, 7432),
    "qnli": (2, "question", "sentence", "label", 32, 33_112, 1986),
    "qqp": (2, "question1", "question2", "is_duplicate", 32, 113_272, 28_318),
    "sst2": (2, "sentence", "", "label", 32, 20_935, 1256),
    "cola": (2, "sentence", "", "label", 16, 5336, 320),
    "mrpc": (2, "#1 String", "#2 String", "Quality", 16, 2296, 137),
    "rte": (2, *PAIR, "label", 16, 2036, 122),
    "stsb": (1, *PAIR, "score", 16, 3598, 214),
}


def get_config(text=None):
    """Options: task, version=1|2, size=tiny|small|base|large, smoke."""
    known = {"task": "mnli", "version": "1", "size": "base", "smoke": False}
    chosen = common.options(text, known)
    for name, values in (("task", TASKS), ("version", ("1", "2"))):
        if chosen[name] not in values:
            raise ValueError(f"{name}={chosen[name]} is unknown; use one of {sorted(values)}")
    pretrain = data2vec_text if chosen["version"] == "1" else data2vec2_text
    size = "tiny" if chosen["smoke"] else chosen["size"]

    c = pretrain.get_config("smoke" if chosen["smoke"] else f"size={size}")
    c.unlock()
    glue(c, chosen["task"])
    if size == "tiny":
        tiny(c)
    if chosen["smoke"]:
        c.steps, c.batch_size, c.log_every, c.optimizer.warmup_steps = 20, 8, 1, 5
        c.data.split, c.eval_data.test.split, c.checkpoint.every = "train[:64]", "test[:64]", 10
    return c


def glue(c, task: str) -> None:
    """A task's recipe."""
    classes, first, second, label, batch, steps, warmup = TASKS[task]
    finetune.start(c, "classify")
    finetune.classifier(c, classes, pool="first", norm=False, hidden=True)
    c.label_scale = 0.2 if task == "stsb" else 1.0
    c.model.update(dict.fromkeys(("dropout", "attention_dropout", "embed_dropout"), 0.1))
    c.masking, c.text = {"kind": "none"}, {"length": c.text.length}
    c.text.input_length = c.text.length  # tokens of a row; 128 is quicker and cuts a few texts
    c.data = common.data(kind="tsv", fields={"text": first, "text_pair": second, "label": label})
    c.eval_data.test.split = "dev_matched" if task == "mnli" else "dev"
    c.evaluators, c.eval.glue.task = ("glue",), task
    c.batch_size, c.steps = batch, steps
    c.optimizer.update(
        {
            "schedule": "polynomial",
            "learning_rate": 2e-5,
            "warmup_steps": warmup,
            "beta2": 0.98,
            "eps": 1e-6,
            "weight_decay": 0.1,
            "no_decay": "^$",  # everything is decayed
        }
    )


def tiny(c) -> None:
    """Names of emoji, byte by byte."""
    c.data = common.data(kind="emoji")
    c.eval_data.test.split = "test"
    c.num_classes, c.evaluators, c.label_scale = 9, ("accuracy",), 1.0
    c.text.input_length = 40
    c.batch_size, c.steps, c.log_every, c.checkpoint.every = 32, 700, 10, 500
    c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 70, "clip_norm": 1.0})
