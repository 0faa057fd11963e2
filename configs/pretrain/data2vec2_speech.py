"""data2vec 2.0 on speech: A-Base and A-Large as shipped, tiny for two CPU cores.

    python -m bivl.train --config=configs/pretrain/data2vec2_speech.py --workdir=DIR \
        --config.data.dir=LIBRISPEECH

size=base    LibriSpeech 960 h, 400,000 updates of 32 crops of 15 s x 8 masks (the reference: 8
             GPUs, 62.5 s each); word error rate 6.4 on test-other with a 4-gram model after
             fine-tuning on 100 h (paper, as quoted in fairseq issue 5380).
size=large   Libri-light, 600,000 updates of 64 crops x 12 masks; the teacher stands still after
             300,000. No published score that we have read.
size=tiny    128 x 4 x 4, crops of 1.5 s of an invented language; two CPU cores.
smoke        20 updates of `tiny`, under a minute on two CPU cores.

Official files, for bivl.convert: `base_libri.pt` and `large_vox.pt` (fairseq
`examples/data2vec/README.md`); with --teacher their averaged model comes along.

Follows fairseq's `examples/data2vec/config/v2/base_audio_only_task.yaml` and its large sibling, in
which blocks mark what is masked, not what is kept (`inverse_mask: false`), though the paper
presents inverse block masking. There, crops and masks are cropped apart, so that counts drift; not
here.

TPU slices (launch/README.md has what they give):
    size=base    v5e:4x4
    size=large   v5e:8x8  --config.model.remat=full
"""

from configs import common
from configs.pretrain import data2vec_speech

SIZES = {
    # size: width, depth, heads, K, M, ratio, adjust, decoder, tau_0, tau_e, N, lr, warm-up, clip
    "tiny": (128, 4, 4, 4, 4, 0.5, 0.05, 64, 0.999, 0.9999, 1000, 5e-4, 50, 1.0),
    "base": (768, 12, 12, 8, 8, 0.5, 0.05, 384, 0.999, 0.99999, 75_000, 7.5e-4, 8000, 0.0),
    "large": (1024, 24, 16, 16, 12, 0.55, 0.1, 768, 0.9997, 1.0, 300_000, 4e-4, 10_000, 1.0),
}


def get_config(text=None):
    """Options: size=tiny|base|large, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, k, masks, ratio, adjust, decoder, *teacher, rate, warmup, clip = SIZES[
        size
    ]

    c = data2vec_speech.get_config()
    c.unlock()
    c.objective = "data2vec2"
    del c.head
    c.batch_size, c.steps = (64, 600_000) if size == "large" else (32, 400_000)
    c.mask_ratio = ratio
    c.masking = {"kind": "inverse_block", "num_masks": masks, "block": 5, "adjust": adjust}
    c.masking.inverse = False
    drop = 0.0 if size == "large" else 0.05
    c.model.update(common.transformer(width, depth, heads, input_norm=True, layer_drop=drop))
    c.model.alibi = True
    c.decoder = {"width": decoder, "depth": 4, "kernel": 7, "groups": 16, "residual": True}
    c.decoder.update({"projection_layers": 1, "dropout": 0.1, "noise": 0.01})
    c.top_k_layers = k
    c.loss.cls_weight = 0.0
    c.ema_shared = ("embed/extractor", "embed/norm", "embed/projection")
    common.fairseq_adam(c, rate, warmup, clip)
    c.optimizer.schedule = "cosine"
    if size == "tiny":
        tiny(c)
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = teacher
    if chosen["smoke"]:
        data2vec_speech.smoke(c)
        c.optimizer.warmup_steps = 5
    return c


def tiny(c):
    """As data2vec 1.0's, with longer crops and shorter convolutions for positions: those of the
    base model reach over a second, and their padding would tell every frame where it stands."""
    data2vec_speech.tiny(c)
    c.audio.length, c.model.position_conv.kernel = 24_000, 5
    c.dtype = c.teacher_dtype = "float32"
    c.model.extractor.width, c.decoder.dropout, c.batch_size = 64, 0.0, 8
