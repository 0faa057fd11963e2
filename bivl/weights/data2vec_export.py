"""Our data2vec models as folders for transformers: Data2VecVision, Data2VecText, Data2VecAudio.

An encoder is one of these whatever trained it, if it is built alike: so data2vec 2.0's of texts is.
"""

import json
from collections.abc import Mapping

import numpy as np

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.decoding import BOUNDARY, Letters
from bivl.weights import data2vec_tables as tables
from bivl.weights.export import Export, Origin
from bivl.weights.rules import pair, under
from bivl.weights.vocabularies import UNWRITTEN

NO_PLACE = {
    "head": "transformers has no regression head",
    "decoder": "transformers has no decoder of data2vec 2.0",
}
ENCODERS = ("data2vec", "data2vec2")


def built(model, wanted: dict) -> bool:
    """Whether `config.model` has these settings; what it lacks is as EncoderConfig has it."""
    defaults = {"input_norm": False, "final_norm": True, "alibi": False}
    return all(model.get(key, defaults.get(key)) == value for key, value in wanted.items())


def sizes(config, origin: Origin, model_type: str, architecture: str) -> dict:
    """What config.json says of an encoder of any kind; what else the source's said stays."""
    m = config.model
    return {"architectures": [architecture], **origin.config} | {
        "model_type": model_type,
        "dtype": "float32",
        "hidden_size": m.width,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": m.eps,
    }


def encoder(config, origin: Origin, kind: str, tuned: str) -> tuple[dict, str]:
    """(what all of config.json's share, what stands before the encoder's names).

    `tuned`: the ending of the class where a head is ours, else "".
    """
    start = f"data2vec_{kind}."
    name = f"Data2Vec{kind.capitalize()}{tuned or 'Model'}"
    settings = sizes(config, origin, f"data2vec-{kind}", name)
    bare = not (tuned or any(name.startswith(start) for name in origin.names))
    return settings, "" if bare else start


def labels(settings: dict, classes: int, origin: Origin) -> dict:
    """The names of classes, the source's own where they are as many, or where ours is no classifier
    of its: it may have another head, which is given back as it was."""
    found = settings.get("id2label")
    if "head/logits/kernel" in origin.absent:
        return settings
    if not isinstance(found, Mapping) or len(found) != classes:
        names = {str(i): f"LABEL_{i}" for i in range(classes)}
        settings |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    return settings


def image(config, ours, origin: Origin) -> Export | None:
    """Data2VecVisionModel, or ForImageClassification."""
    m, tuned = config.model, config.objective == "classify"
    alike = config.modality == "image" and (tuned or config.objective in ENCODERS)
    if not alike or not built(m, {"norm": "pre", "qkv_bias": "qv", "input_norm": False}):
        return None
    final = m.get("final_norm", True)
    mean = config.classifier.pool == "mean" if tuned else not final
    head = (mean, not mean) if tuned else (None, final)
    if m.positions not in ("relative", "relative_layers", "none") or (
        tuned and (config.classifier.norm, final, config.classifier.hidden) != (*head, False)
    ):
        raise UserError(
            "transformers' Data2VecVision has relative positions or none, and one norm, before or "
            "after pooling; this model has others"
        )
    settings, start = encoder(config, origin, "vision", "ForImageClassification" if tuned else "")
    settings |= patches(config, origin, mean)
    other = tables.RELATIVE if m.positions == "relative_layers" else f"{tables.RELATIVE}[n]"
    table = tuple(rule for rule in tables.HUGGINGFACE_IMAGE if rule.path != other)
    if tuned:
        settings = labels(settings, config.num_classes, origin)
        table = (*under(start, table), *pair("classifier", "head/logits"))
        return Export(settings, table, files={"preprocessor_config.json": views(config)})
    files = {"preprocessor_config.json": views(config)}
    return Export(settings, under(start, table), NO_PLACE, files=files)


def patches(config, origin: Origin, mean: bool) -> dict:
    """What config.json says of an encoder of images as BEiT's and data2vec's are; `mean`: whether
    patches are averaged behind it."""
    m = config.model
    return {
        "image_size": config.image_size,
        "patch_size": m.patch_size,
        "use_mask_token": "embed/mask_token/value" not in origin.absent,
        "use_absolute_position_embeddings": False,
        "use_shared_relative_position_bias": m.positions == "relative",
        "use_relative_position_bias": m.positions == "relative_layers",
        "layer_scale_init_value": m.layer_scale,
        "use_mean_pooling": mean,
    }


def views(config) -> dict:
    """What BeitImageProcessor does to an image, as `preprocess` does here."""
    side, squashed = config.image_size, config.augment.get("squash", False)
    short = {"shortest_edge": round(side / config.augment.crop_ratio)}
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side} if squashed else short,
        "resample": 3,
        "do_center_crop": not squashed,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def text(config, ours, origin: Origin) -> Export | None:
    """Data2VecTextModel, or ForSequenceClassification."""
    m, tuned = config.model, config.objective == "classify"
    alike = config.modality == "text" and (tuned or config.objective in ENCODERS)
    wanted = {"norm": "post", "qkv_bias": "qkv", "input_norm": False, "final_norm": False}
    if not alike or not built(m, wanted | {"layer_scale": 0.0}):
        return None
    settings, start = encoder(config, origin, "text", "ForSequenceClassification" if tuned else "")
    settings |= {
        "vocab_size": ours["embed/tokens/table"][0],
        "max_position_embeddings": ours["embed/positions/value"][0],
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    settings.setdefault("type_vocab_size", 1)
    table, files = tables.huggingface_text(1), words(config)
    if not tuned:
        width = m.width
        pooler = {"pooler.dense.weight": np.eye(width), "pooler.dense.bias": np.zeros(width)}
        return Export(settings, under(start, table), NO_PLACE, pooler, files)
    c = config.classifier
    if (c.pool, c.norm, c.hidden) != ("first", False, True):
        raise UserError("transformers classifies texts by a tanh head on the first token alone")
    settings = labels(settings, config.num_classes, origin)
    return Export(settings, under(start, table) + tables.text_head("classifier."), files=files)


def words(config) -> dict:
    """The files of a byte-level BPE tokenizer; none where there is another, or one with pieces that
    have no id."""
    if config.tokenizer.kind not in ("bpe", "small"):
        return {}
    tokenizer = tokenizers.load(config.tokenizer)
    model = json.loads(tokenizer.data)["model"]
    if len(model["vocab"]) != tokenizer.size:
        return {}
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    names |= {"sep": "</s>", "cls": "<s>"}
    settings = {"tokenizer_class": "RobertaTokenizer", "model_max_length": config.text.length}
    return {
        "vocab.json": model["vocab"],
        "merges.txt": "\n".join(("#version: 0.2", *pairs, "")),
        "tokenizer_config.json": settings | {f"{key}_token": name for key, name in names.items()},
    }


def audio(config, ours, origin: Origin) -> Export | None:
    """Data2VecAudioModel, or ForCTC."""
    m, tuned = config.model, config.objective == "ctc"
    alike = config.modality == "speech" and (tuned or config.objective in ENCODERS)
    wanted = {"norm": "post", "qkv_bias": "qkv", "input_norm": True, "final_norm": False}
    if not alike or not built(m, wanted | {"layer_scale": 0.0, "alibi": False, "eps": 1e-5}):
        return None
    settings, start = encoder(config, origin, "audio", "ForCTC" if tuned else "")
    e, at = m.extractor, m.position_conv
    settings |= {
        "conv_dim": [e.width] * len(e.kernels),
        "conv_kernel": list(e.kernels),
        "conv_stride": list(e.strides),
        "conv_bias": False,
        "feat_extract_activation": "gelu",
        "num_conv_pos_embeddings": at.depth,
        "conv_pos_kernel_size": at.kernel,
        "num_conv_pos_embedding_groups": at.groups,
    }
    if "embed/fill/value" not in ours or "embed/fill/value" in origin.absent:
        settings |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    elif not (settings.get("mask_time_prob", 0.05) or settings.get("mask_feature_prob", 0.0)):
        settings["mask_time_prob"] = 0.05
    files = {"preprocessor_config.json": hearing(config)}
    table = under(start, tables.HUGGINGFACE_AUDIO)
    if not tuned:
        return Export(settings, table, NO_PLACE, files=files)
    settings |= {"vocab_size": ours["letters/bias"][0], "pad_token_id": 0}
    files |= spelling(config)
    return Export(settings, (*table, *pair("lm_head", "letters")), files=files)


def hearing(config) -> dict:
    """What Wav2Vec2FeatureExtractor does to a sound, as `preprocess` does here."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": bool(config.audio.normalize),
        "return_attention_mask": True,
    }


def spelling(config) -> dict:
    """The vocabulary of Wav2Vec2CTCTokenizer; what is no letter gets a name."""
    special = iter(("<s>", "</s>", "<unk>"))
    names = ["<pad>"]
    for letter in Letters(config.letters).letters:
        private = UNWRITTEN <= ord(letter) <= 0xF8FF
        names.append(next(special, f"<class_{len(names)}>") if private else letter)
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": BOUNDARY}
    settings |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "do_lower_case": False}
    return {"vocab.json": dict(zip(names, range(len(names)), strict=True))} | {
        "tokenizer_config.json": settings
    }


HUGGINGFACE = (image, text, audio)
