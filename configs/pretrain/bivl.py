"""bivl: BEiT-3's multiway encoder taught by its own average on images, texts and pairs.

    python -m bivl.train --config=configs/pretrain/bivl.py --workdir=DIR \
        --config.data.images.name=... --config.data.texts.dir=... --config.data.pairs.name=...

size=giant|large|base|small   data, batch, masks and schedule of configs/pretrain/beit3.py, with no
                              tokenizer of images; no score is known yet.
clones       four masks of 75 % of an image that share its targets, as in data2vec 2.0.
size=tiny    128 x 4 on 48 px emoji, their keywords and `pydoc`, or scenes
             (data=scenes): minutes on two CPU cores.
smoke        20 updates of `tiny`.

TPU slices (launch/README.md has what they give):
    size=base    v5e:8x8  --config.model.remat=full
    size=large   v5p:4x4x4
    size=giant   2 x v5p:4x4x8
"""

from configs import common
from configs.pretrain import beit3

DECODER = {"width": 384, "depth": 4, "kernel": 3, "groups": 16}
SIZES = beit3.SIZES
LOSSES = ("images", "texts", "pairs_image", "pairs_text")


def get_config(text=None):
    """Options: size=tiny|small|base|large|giant, clones, smoke; of tiny data=emoji|scenes."""
    known = {"size": "base", "data": "emoji", "clones": False, "smoke": False}
    chosen = common.options(text, known)
    same = f"size={chosen['size']},data={chosen['data']}"
    c = beit3.get_config(same + ",smoke" * bool(chosen["smoke"]))
    size = "tiny" if chosen["smoke"] else chosen["size"]
    c.objective = "bivl"
    c.teacher = {"checkpoint": "", "random": False, "config": {}}  # for token_weights of images
    c.top_k_layers = max(2, c.model.depth // 2)
    c.target = {"layer": "end", "pairs": "joint"}  # or ffn; apart
    c.target.image = {"layer_norms": ("instance",), "norms": ()}
    c.target.text = {"layer_norms": ("instance",), "norms": ()}
    c.loss = {"beta": 0.0, "reduction": "mean", "scale": None}
    c.token_weights = dict.fromkeys(LOSSES, 0.0)
    c.token_weights.update({"texts": 1.0, "pairs_text": 1.0})
    c.contrast = {"weight": 1.0, "width": c.model.width, "pool": "mean", "text": "encoder"}
    c.contrast.masked = ("text",)  # images whole, as they will be looked for
    c.decoder = DECODER | {"residual": True, "projection_layers": 1, "dropout": 0.0, "noise": 0.01}
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.999, 0.9999, 30_000
    c.ema_shared = ()
    if size == "tiny":
        c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.998, 0.9998, 300
        c.decoder.width, c.contrast.width = 128, 512  # words want room
    if chosen["clones"]:
        c.mask_ratio = 0.75
        c.masking = {"kind": "inverse_block", "num_masks": 4, "block": 3, "adjust": 0.07}
    return c
