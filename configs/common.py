"""What every config starts from: the keys that all share, with their defaults."""

from ml_collections import ConfigDict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# One data set. `fields` maps our names to the data set's; "" leaves a name as it is.
DATA = {
    "kind": "synthetic",
    "name": "",
    "dir": "",
    "split": "train",
    "num_examples": 0,
    "image_size": 32,
    "fields": {
        name: ""
        for name in ("image", "text", "text_pair", "audio", "label", "question", "answer", "id")
    },
}


def data(**changes) -> ConfigDict:
    """A data mapping that differs from the default as given."""
    return ConfigDict(
        {**DATA, **changes, "fields": {**DATA["fields"], **changes.get("fields", {})}}
    )


def base() -> ConfigDict:
    """The shared keys."""
    return ConfigDict(
        {
            "objective": "",  # module of bivl.objectives
            "modality": "",  # module of bivl.modalities
            "seed": 0,
            "steps": 0,
            "batch_size": 0,  # examples of all devices together
            "log_every": 1,  # updates between lines of metrics.jsonl
            "evaluate_every": 0,  # updates between evaluations; 0: only at the end
            "dtype": "float32",  # what layers compute in; parameters are always float32
            "evaluators": (),
            "init": "",  # a checkpoint directory to start from
            "data": data(),
            "loader": {"threads": 2, "workers": 0},
            "eval_data": {"train": data(kind=""), "test": data(kind="", split="test")},
            "eval": {
                "batch_size": 0,  # 0: as in training
                "knn": {"k": (10, 20, 100, 200), "temperature": 0.07, "floors": True},
                "linear": {"max_iterations": 200, "l2": tuple(10.0**-i for i in range(-1, 8))},
                "fewshot": {"shots": (1, 5, 10, 25), "seeds": 3, "ridge": 1024.0},
                "pictures": {"num_images": 8},
                "cross_attention": {"num_pairs": 6, "num_words": 6},
                "accuracy": {},
                "glue": {"task": ""},
                "cloze": {"positions": 20_000, "max_iterations": 50},
                "wer": {"decoder": "greedy", "width": 32, "lm": "", "alpha": 0.5, "beta": 1.0},
                "retrieval": {"recall_at": (1, 5, 10), "floor": False, "probe": False},
                "zeroshot": {"templates": ("a photo of a {}.",)},
            },
            "optimizer": {
                "schedule": "cosine",  # or constant, polynomial, tri_stage
                "learning_rate": 0.0,
                "end_learning_rate": 0.0,
                "warmup_steps": 0,
                "phases": (0.05, 0.8, 0.15),  # tri_stage: shares of warm-up, hold, decay
                "final_scale": 0.01,  # tri_stage: last learning rate over peak
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "no_decay": "bias|scale|cls_token|norm",  # paths (regex) without weight decay
                "clip_norm": 0.0,  # global norm; 0: none
                "layer_decay": 1.0,
                "layer_decay_embed": True,  # False: the embedding keeps the full rate
                "freeze": "",  # paths (regex) of parameters that stand still ...
                "freeze_steps": 0,  # ... for so many updates
                "fast": "",  # paths (regex) of parameters whose rate is ...
                "fast_rate": 1.0,  # ... so many times as large
                "accumulate": 1,  # micro-batches an update
            },
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "gather": "update",  # arrays divided over fsdp; or layer, for least memory
            },
            "checkpoint": {"every": 1000, "keep": 2},
            "guard": {"target_std": 0.1, "prediction_std": 0.01, "after": 5000, "patience": 100},
            "wandb": "",  # W&B project to log to, where wandb is installed
        }
    )


def transformer(width: int, depth: int, heads: int, **changes) -> dict:
    """An encoder as data2vec 1.0 on text and speech and all of 2.0 have it: BERT's post-norm."""
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": 4 * width,
        "norm": "post",  # or pre, sub
        "eps": 1e-5,
        "qkv_bias": "qkv",
        "layer_scale": 0.0,
        "drop_path": 0.0,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "attention": "xla",  # or cudnn (GPU), flash (TPU); both without attention_dropout
        "activation_dropout": 0.0,
        "layer_drop": 0.0,
        "init": "normal",
        "input_norm": False,
        "final_norm": False,
        "scan": depth > 4,  # one layer's program for all: quick to compile on TPU
        "remat": "none",  # or full, dots
        **changes,
    }


def augment(**changes) -> dict:
    """What training does to images, and what evaluation cuts out of them."""
    return {
        "color_jitter": (0.0, 0.0, 0.0),  # brightness, contrast, saturation
        "flip": True,
        "scale": (0.08, 1.0),  # of the random window: its share of the image
        "ratio": (3 / 4, 4 / 3),  # its width over its height
        "scaled_decoding": False,  # JPEGs at 1/2, 1/4 or 1/8, where the window stays large enough
        "crop_ratio": 0.875,  # evaluation: central crop over short side
        **changes,
    }


def fairseq_adam(c: ConfigDict, rate: float, warmup: int, clip: float) -> None:
    """The optimizer of data2vec on text and speech: every parameter is decayed."""
    c.optimizer.update(
        {
            "learning_rate": rate,
            "warmup_steps": warmup,
            "beta2": 0.98,
            "eps": 1e-6,
            "weight_decay": 0.01,
            "no_decay": "^$",
            "clip_norm": clip,
        }
    )


def options(text: str | None, known: dict) -> dict:
    """`a,b=c` -> {a: True, b: "c"}, as written after the colon of --config=FILE:OPTIONS.

    `known` maps each option to its default; other names raise ValueError.
    """
    chosen = dict(known)
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"option {name!r} is unknown; this config has {sorted(known)}")
        chosen[name] = {"": True, "true": True, "false": False}.get(value.lower(), value)
    return chosen
