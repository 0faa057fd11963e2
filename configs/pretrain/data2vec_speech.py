"""data2vec 1.0 on speech: the base model as shipped, small and tiny for one chip or CPU.

    python -m bivl.train --config=configs/pretrain/data2vec_speech.py --workdir=DIR \
        --config.data.dir=LIBRISPEECH

size=base    LibriSpeech 960 h, 400,000 updates of 256 crops of 15 s (64 minutes; the reference's
             batches hold 63). Published: word error rates on test-other with a 4-gram model of
             12.3, 9.1, 8.1, 6.8, 5.5 after fine-tuning on 10 min, 1, 10, 100, 960 h (paper,
             table 2).
size=small   384 x 12 x 6, one GPU or TPU chip; no published score.
size=tiny    128 x 4 x 4, crops of 1 s of an invented language; two CPU cores.
smoke        20 updates of `tiny`, under a minute on two CPU cores.

Official files, for bivl.convert: `audio_base_ls.pt`, and of Libri-light `vox_pretrained.pt`
(fairseq `examples/data2vec/README.md`); Hugging Face's `data2vec-audio-base` and `-large`.

Follows fairseq's `examples/data2vec/config/audio/pretraining/base_librispeech.yaml`: the last phase
of the schedule decays exponentially (the paper says linearly), convolutional positions are the
student's (the released checkpoint says that the teacher had its own: --config.ema_shared=
embed/extractor,embed/norm,embed/projection,embed/fill,head). fairseq crops to the shortest
utterance of a batch; here crops have one length, and what is shorter is padded.

TPU slices (launch/README.md has what they give):
    size=base    v5e:4x4  --config.optimizer.accumulate=2
"""

from configs import common

EXTRACTOR = {"kernels": (10, 3, 3, 3, 3, 2, 2), "strides": (5, 2, 2, 2, 2, 2, 2)}
SIZES = {  # width, depth, heads, K, extractor's width
    "tiny": (128, 4, 4, 4, 64),
    "small": (384, 12, 6, 8, 512),
    "base": (768, 12, 12, 8, 512),
}


def get_config(text=None):
    """Options: size=tiny|small|base, smoke."""
    chosen = common.options(text, {"size": "base", "smoke": False})
    if chosen["size"] not in SIZES:
        raise ValueError(f"size={chosen['size']} is unknown; use one of {sorted(SIZES)}")
    size = "tiny" if chosen["smoke"] else chosen["size"]
    width, depth, heads, k, channels = SIZES[size]

    c = common.base()
    c.objective, c.modality = "data2vec", "speech"
    c.batch_size, c.steps, c.log_every = 256, 400_000, 100
    c.dtype = c.teacher_dtype = "bfloat16" if size == "base" else "float32"
    c.audio = {"length": 240_000, "normalize": True}  # samples at 16 kHz
    c.data = common.data(
        kind="librispeech", split="train-clean-100+train-clean-360+train-other-500"
    )
    c.eval_data.test.split = "dev-other"
    # Masks are equal among a GPU's crops there, 3.8 M samples.
    c.mask_ratio, c.masking = 0.65, {"kind": "span", "span": 10, "equal": 16}
    c.model = common.transformer(width, depth, heads, input_norm=True, layer_drop=0.05)
    c.model.extractor = EXTRACTOR | {"width": channels}
    c.model.position_conv = {"depth": 5, "kernel": 19, "groups": 16}
    c.model.alibi = False
    c.head = {"layers": 1, "init": "torch"}
    c.top_k_layers = k
    c.target = {"layer": "ffn", "layer_norms": ("instance",), "norms": (), "embed_dropout": False}
    c.loss = {"beta": 0.0, "reduction": "sum", "scale": None, "std_weight": 0.0, "std_margin": 0.5}
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.999, 0.9999, 30_000
    c.ema_shared = ("embed", "head")  # parameters (paths) that the teacher takes from the student
    c.checkpoint.every = 5000
    common.fairseq_adam(c, rate=5e-4, warmup=0, clip=0.0)
    c.optimizer.update({"schedule": "tri_stage", "phases": (0.03, 0.9, 0.07)})
    if size == "tiny":
        tiny(c)
    if chosen["smoke"]:
        smoke(c)
    return c


def tiny(c):
    """Crops of 1 s of invented speech: something to look at in minutes on two CPU cores.

    A slow teacher and a low rate: the extractor, which teacher and student share, would else find
    that targets are easiest to meet where all frames are alike.
    """
    c.audio.length = 16_000
    c.model.update({"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0})
    c.data = common.data(kind="synthetic", name="speech", num_examples=2000)
    words = {"kind": "synthetic", "name": "spoken_words"}
    c.eval_data.train = common.data(**words, num_examples=800)
    c.eval_data.test = common.data(**words, num_examples=400, split="test")
    c.evaluators = ("knn", "linear")
    c.eval.knn.floors = False
    c.batch_size, c.steps, c.log_every, c.checkpoint.every = 16, 1000, 10, 500
    c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps = 0.999, 0.9999, 1000
    c.optimizer.update({"learning_rate": 3e-4, "phases": (0.1, 0.6, 0.3)})


def smoke(c):
    """20 updates."""
    c.steps, c.batch_size, c.log_every = 20, 8, 1
    c.data.num_examples, c.checkpoint.every = 64, 10
    c.eval_data.train.num_examples, c.eval_data.test.num_examples = 400, 40
    c.evaluators = ("knn",)
