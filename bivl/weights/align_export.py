"""Our two towers, one of them convolutional, as folders for transformers: AlignModel,
AlignVisionModel, AlignTextModel."""

import numpy as np

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary import wordpiece
from bivl.models.efficientnet import EfficientNetConfig
from bivl.weights import align_tables as tables
from bivl.weights.data2vec_export import views
from bivl.weights.export import Export, Origin

KINDS = {"image": "vision", "text": "text"}
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def towers(config, ours, origin: Origin) -> Export | None:
    """AlignModel, or one tower of it."""
    alike = (config.modality, config.objective) == ("towers", "contrastive")
    if not alike or config.model.get("trunk", "") != "efficientnet":
        return None
    present, width = tuple(config.model.towers), config.contrast.width
    if len(present) == 2 and not width:
        raise UserError("transformers' AlignModel has a projection; this model has none")
    make = {"image": vision, "text": text}
    whole = len(present) == 2
    table, constants, files, both = (), {}, {}, {}
    for name in present:
        start = f"{KINDS[name]}_model."
        start = start if whole or any(key.startswith(start) for key in origin.names) else ""
        own = origin.config.get(f"{KINDS[name]}_config") if whole else origin.config
        both[name] = {**(own or {}), "model_type": f"align_{KINDS[name]}_model"}
        part = make[name](config, ours, start, both[name])
        table, constants, files = table + part[0], constants | part[1], files | part[2]
    if whole:
        made = {"architectures": ["AlignModel"], "temperature_init_value": 1.0, **origin.config}
        made |= {"model_type": "align", "projection_dim": width}
        made |= {f"{KINDS[name]}_config": own for name, own in both.items()}
    else:
        name = present[0]
        made = {"architectures": [f"Align{KINDS[name].capitalize()}Model"], **both[name]}
    made["dtype"] = "float32"
    return Export(made, table + tables.HEADS, constants=constants, files=files)


def vision(config, ours, start: str, settings: dict) -> tuple:
    """(rules, constants, files) of the image tower; completes its `settings`."""
    c = EfficientNetConfig.of(config.model, config.dtype)
    settings.setdefault("batch_norm_momentum", 1 - c.decay)  # as PyTorch understands it
    settings.setdefault("hidden_act", "swish")
    # The kernel of the last pooling, which must cover the last map.
    if settings.get("hidden_dim", 0) < max(1, c.side(config.image_size)):
        settings["hidden_dim"] = max(c.width, c.side(config.image_size))
    if c.stem != 32:
        raise UserError(f"transformers' ALIGN has model.stem=32; the model here has {c.stem}")
    settings |= {
        "num_channels": 3,
        "pooling_type": "mean",
        "image_size": config.image_size,
        "in_channels": [c.stem, *c.widths[:-1]],
        "out_channels": list(c.widths),
        "num_block_repeats": list(c.repeats),
        "kernel_sizes": list(c.kernels),
        "strides": list(c.strides),
        "expand_ratios": list(c.expansions),
        "depthwise_padding": list(c.centred),
        "width_coefficient": c.width_scale,
        "depth_coefficient": c.depth_scale,
        "depth_divisor": c.multiple,
        "squeeze_expansion_ratio": c.squeeze,
        "batch_norm_eps": c.eps,
        "drop_connect_rate": c.drop_path,
    }
    rules = tables.image(start)
    counts = {
        rule.pattern.replace("running_mean", tables.COUNT).format(n=n): np.zeros((), np.int64)
        for rule in rules
        for n in range(c.depth)
        if rule.pattern.endswith(".running_mean") and rule.path.format(n=n) in ours
    }
    return rules, counts, {"preprocessor_config.json": seen(config)}


def seen(config) -> dict:
    """What EfficientNetImageProcessor does to an image, as `preprocess` does here."""
    found, a = views(config), config.augment
    found |= {"image_processor_type": "EfficientNetImageProcessor", "include_top": False}
    found |= {"rescale_factor": 1 / 255, "rescale_offset": False}
    found["resample"] = RESAMPLE[a.get("interpolation", "bicubic")]
    if a.get("squash", False):
        whole = max(a.get("squash_to", 0), config.image_size)
        found |= {"size": {"height": whole, "width": whole}, "do_center_crop": True}
    return found


def text(config, ours, start: str, settings: dict) -> tuple:
    """(rules, constants, files) of the text tower; completes its `settings`."""
    t = config.model.text
    wanted = {"norm": "post", "qkv_bias": "qkv", "layer_scale": 0.0, "input_norm": True}
    wanted |= {"final_norm": False, "activation": "gelu", "pool": "first"}
    for key, value in wanted.items():
        if t.get(key, "gelu") != value:
            raise UserError(
                f"transformers' ALIGN has {key}={value!r}; the text tower here has {t[key]!r}"
            )
    tokenizer = tokenizers.load(config.tokenizer)
    settings.setdefault("type_vocab_size", 1)
    settings |= {
        "hidden_size": t.width,
        "intermediate_size": t.mlp_dim,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": t.eps,
        "vocab_size": ours["text_embed/words/table"][0],
        "max_position_embeddings": ours["text_embed/positions/value"][0],
        "pad_token_id": tokenizer.pad if t.pad is None else t.pad,
    }
    pooler = {f"{start}pooler.dense.weight": np.eye(t.width)}
    pooler |= {f"{start}pooler.dense.bias": np.zeros(t.width)}
    return tables.text(start, 1), pooler, words(config, tokenizer)


def words(config, tokenizer) -> dict:
    """The files of BertTokenizer; none where there is another tokenizer."""
    if config.tokenizer.kind != "wordpiece":
        return {}
    pieces = wordpiece.pieces(tokenizer.data)
    kind = {"tokenizer_class": "BertTokenizer", "model_max_length": config.pair.length}
    return {
        "vocab.txt": "\n".join((*pieces, "")),
        "tokenizer_config.json": kind | wordpiece.settings(tokenizer.data),
    }


HUGGINGFACE = (towers,)
