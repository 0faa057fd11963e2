"""data2vec 2.0 on texts: T-Base and T-Large as shipped, tiny for two CPU cores.

    python -m bivl.train --config=configs/pretrain/data2vec2_text.py --workdir=DIR \
        --config.data.dir=FOLDER_OF_TEXTS --config.tokenizer.path=ROBERTA_VOCABULARY

size=base    books and Wikipedia, a million updates of 64 blocks of 512 tokens x 8 masks. 16 GPUs.
             No published score that we have read.
size=large   600,000 updates of 64 blocks, lr 1e-4, 32 GPUs; the same.
size=tiny    128 x 4 x 4, 64 bytes of the interpreter's own documentation; two CPU cores.
smoke        20 updates of `tiny`, under a minute on two CPU cores.

Official file, for bivl.convert: data2vec2's `nlp_base.pt` (fairseq `examples/data2vec/README.md`)
beside RoBERTa's `encoder.json`, `vocab.bpe` and `dict.txt`.

Follows fairseq's `examples/data2vec/config/v2/base_text_only_task.yaml` and its large sibling, the
learned embeddings' dropout included, which the teacher shares with the student there
(target.embed_dropout). The file `large_text_only_task_pgrp_1M.yaml` differs in loss.beta=4 and a
million updates.

TPU slices (launch/README.md has what they give):
    size=base    v5e:4x4
    size=large   v5e:4x4  --config.optimizer.accumulate=4
"""

from configs import common
from configs.pretrain import data2vec_text

SIZES = {
    # size: width, depth, heads, decoder width, updates, lr, ratio, layer norms, norms
    "tiny": (128, 4, 4, 128, 2000, 1e-3, 0.48, ("instance",), ()),
    "base": (768, 12, 12, 768, 1_000_000, 2e-4, 0.48, ("instance",), ()),
    "large": (1024, 24, 16, 768, 600_000, 1e-4, 0.5, ("layer",), ("instance",)),
}


def get_config(text=None):
    """Options: size=tiny|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, decoder, steps, rate, ratio, layer_norms, norms = SIZES[size]

    c = data2vec_text.get_config()
    c.unlock()
    c.objective = "data2vec2"
    del c.head
    c.batch_size, c.steps, c.text.break_mode = 64, steps, "none"
    c.mask_ratio, c.masking = ratio, {"kind": "random", "num_masks": 8}
    c.model.update(common.transformer(width, depth, heads))
    c.decoder = {"width": decoder, "depth": 5, "kernel": 9, "groups": 1, "residual": False}
    c.decoder.update({"projection_layers": 2, "dropout": 0.1, "noise": 0.01})
    c.top_k_layers = depth
    c.target.update({"layer_norms": layer_norms, "norms": norms})
    c.target.update({"input": "full", "embed_dropout": True})
    c.loss.update({"beta": 0.0, "cls_weight": 0.0})
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.9999, 0.99999, 100_000
    common.fairseq_adam(c, rate=rate, warmup=4000, clip=1.0)
    if size == "tiny":
        tiny(c)
    if chosen["smoke"]:
        data2vec_text.smoke(c)
    return c


def tiny(c):
    """As data2vec 1.0's, with a smaller decoder."""
    masking, ratio = c.masking.to_dict() | {"num_masks": 4}, c.mask_ratio
    data2vec_text.tiny(c)
    c.masking, c.mask_ratio = masking, ratio
    c.dtype = c.teacher_dtype = "float32"
    c.decoder.depth, c.decoder.dropout, c.batch_size = 3, 0.0, 8
