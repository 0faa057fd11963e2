"""data2vec 1.0 on texts: the base model as shipped, small and tiny for one chip or CPU.

    python -m bivl.train --config=configs/pretrain/data2vec_text.py --workdir=DIR \
        --config.data.dir=FOLDER_OF_TEXTS --config.tokenizer.path=ROBERTA_VOCABULARY

size=base    books and Wikipedia, a million updates of 256 blocks of 512 tokens; published: GLUE
             average 82.9 (data2vec paper, table 4, the row of wav2vec 2.0 masking). 16 GPUs.
size=small   384 x 12 x 6, one GPU or TPU chip; no published score.
masks=bert   of small and base, the paper's main row: GLUE average 82.7. BERT's masks of 15 %, a
             tri-stage rate, and a teacher whose decay rises for 100,000 updates and not 300,000.
size=tiny    128 x 4 x 4, 64 bytes of the interpreter's own documentation; two CPU cores.
smoke        20 updates of `tiny`, under a minute on two CPU cores.

Official files, for bivl.convert: data2vec's `nlp_base.pt` (fairseq `examples/data2vec/README.md`)
beside RoBERTa's `encoder.json`, `vocab.bpe` and `dict.txt`, or Hugging Face's `data2vec-text-base`.

Follows fairseq's `examples/data2vec/config/text/pretraining/base.yaml`. There the teacher reads the
masked tokens alone, not the whole text as the paper says (fairseq issue 4881): target.input=masked
follows the code that was released, `full` the paper. Of BERT's masks that code scores the tokens
that became <mask>, not those that were kept or exchanged: masking.score=all does.

TPU slices (launch/README.md has what they give):
    size=base    v5e:4x4
"""

from configs import common

SIZES = {  # width, depth, heads, K
    "tiny": (128, 4, 4, 4),
    "small": (384, 12, 6, 10),
    "base": (768, 12, 12, 10),
}


def get_config(text=None):
    """Options: size=tiny|small|base, smoke; of small and base masks=span|bert."""
    chosen = common.options(text, {"size": "base", "masks": "span", "smoke": False})
    for name, values in (("size", SIZES), ("masks", ("span", "bert"))):
        if chosen[name] not in values:
            raise ValueError(f"{name}={chosen[name]} is unknown; use one of {sorted(values)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, k = SIZES[size]

    c = common.base()
    c.objective, c.modality = "data2vec", "text"
    c.batch_size, c.steps, c.log_every = 256, 1_000_000, 100
    c.dtype = c.teacher_dtype = "bfloat16" if size == "base" else "float32"
    c.tokenizer = {"kind": "bpe", "path": ""}  # or sentencepiece, small
    c.text = {"length": 512, "break_mode": "complete_doc", "cache": ""}
    c.data = common.data(kind="text")
    c.evaluators, c.evaluate_every = ("cloze",), 50_000
    c.mask_ratio, c.masking = 0.35, {"kind": "span", "span": 4}
    c.model = common.transformer(width, depth, heads, embed_dropout=0.1)
    c.head = {"layers": 2, "init": "normal"}
    c.top_k_layers = k
    c.target = {"layer": "ffn", "layer_norms": ("layer",), "norms": ()}
    c.target.update({"input": "masked", "embed_dropout": False})
    c.loss = {"beta": 4.0, "reduction": "sum", "scale": 1.0, "std_weight": 0.0, "std_margin": 0.5}
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.999, 0.9999, 300_000
    c.ema_shared = ("embed", "head")  # parameters (paths) that the teacher takes from the student
    c.checkpoint.every = 5000
    common.fairseq_adam(c, rate=2e-4, warmup=10_000, clip=5.0)
    if size == "tiny":
        tiny(c)
    elif chosen["masks"] == "bert":
        bert(c)
    if chosen["smoke"]:
        smoke(c)
    return c


def bert(c):
    """The main row of the paper's table 4."""
    c.mask_ratio = 0.15
    c.masking = {"kind": "bert", "kept": 0.1, "randomized": 0.1, "score": "masked"}
    c.ema_anneal_steps = 100_000
    c.optimizer.update({"schedule": "tri_stage", "phases": (0.05, 0.8, 0.15)})


def tiny(c):
    """Blocks of 64 bytes of documentation: something to look at in minutes on two CPU cores.

    Single masks, a high rate and a slow teacher, whose targets stay those of a random network for
    the first hundreds of updates: so few updates then reach beyond the frequencies of bytes, which
    spans, or a teacher that follows quickly and drifts towards pure position, did not.
    """
    c.tokenizer.kind, c.text.length, c.text.break_mode = "bytes", 64, "none"
    c.data = common.data(kind="pydoc")
    c.mask_ratio = 0.2
    c.masking = {"kind": "bert", "kept": 0.0, "randomized": 0.0, "score": "masked"}
    c.model.update({"dropout": 0.0, "attention_dropout": 0.0, "embed_dropout": 0.0})
    c.target.input = "full"
    c.batch_size, c.steps, c.log_every, c.checkpoint.every = 32, 1000, 10, 500
    c.evaluate_every = 0
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.999, 0.9999, 1000
    c.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})


def smoke(c):
    """20 updates."""
    c.steps, c.batch_size, c.log_every, c.optimizer.warmup_steps = 20, 8, 1, 5
    c.checkpoint.every, c.eval.cloze.positions = 10, 500
