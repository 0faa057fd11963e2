"""data2vec 1.0 on speech, as fairseq and Hugging Face store it: which of them a file is, and the
config that it becomes."""

import dataclasses
import re
from typing import NamedTuple

from bivl.core.errors import UserError
from bivl.weights import data2vec_tables as tables
from bivl.weights import plan as plans
from bivl.weights import vocabularies
from bivl.weights.plan import NO_HEAD, Plan
from bivl.weights.rules import Rule, norm, pair, under

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # of every published model
NO_MASK = "the file has no vector for masked frames"


class Names(NamedTuple):
    """Where a speech layout has what its sizes are read from; `@` is a number."""

    projection: str
    extractor: str
    positions: str
    fc1: str
    mask: str
    letters: str


def numbered(weights, name: str, rank: int, first: int = 0) -> list[tuple[int, ...]]:
    """The shapes of the tensors that `name` numbers from `first` on."""
    number = plans.count(weights, re.escape(name).replace("@", r"(\d+)") + "$")
    names = [name.replace("@", str(first + i)) for i in range(max(number, 1))]
    return [plans.shape(weights, name, rank) for name in names]


def front_end(weights, names: Names, width: int, first: int) -> tuple[dict, dict]:
    """(changes, unknown) for the extractor and the convolutions of positions, which are numbered
    from `first` on."""
    extractor = numbered(weights, names.extractor, 3)
    at, inputs, kernel = numbered(weights, names.positions, 3, first)[0]
    if at != width or width % inputs:
        raise UserError(f"{names.positions.replace('@', str(first))} is of another width: {at}")
    kernels = tuple(shape[2] for shape in extractor)
    changes = {
        "model.extractor.width": extractor[0][0],
        "model.extractor.kernels": kernels,
        "model.position_conv.depth": len(numbered(weights, names.positions, 3, first)),
        "model.position_conv.kernel": kernel,
        "model.position_conv.groups": width // inputs,
    }
    strides = plans.setting(weights.config, "conv_stride") or _fairseq_strides(weights)
    if strides is None and kernels == KERNELS:
        strides = STRIDES
    whole = isinstance(strides, list | tuple) and all(type(x) is int and x > 0 for x in strides)
    if not whole or len(strides) != len(kernels):
        return changes, {"model.extractor.strides": "the file does not say one for each layer"}
    return changes | {"model.extractor.strides": tuple(strides)}, {}


def _fairseq_strides(weights) -> tuple[int, ...] | None:
    """From `[(512, 10, 5)] + [(512, 3, 2)] * 4`, channels, kernel and stride of the layers."""
    spec = plans.setting(weights.config, "conv_feature_layers", "feature_encoder_spec")
    if not isinstance(spec, str) or len(spec) > 1000:
        return None
    strides: list[int] = []
    for part in spec.replace(" ", "").split("+"):
        found = re.fullmatch(r"\[((?:\(\d+,\d+,\d+\),?)+)\](?:\*(\d{1,2}))?", part)
        if not found:
            return None
        layers = re.findall(r"\(\d+,\d+,(\d{1,4})\)", found[1])
        strides += [int(stride) for stride in layers] * int(found[2] or 1)
    return tuple(strides)


def speech_plan(weights, folder, names: Names, table, version: str = "1", first: int = 0) -> Plan:
    """The plan of a speech model of data2vec 1.0 or 2.0, with letters on it or without."""
    has = weights.tensors.__contains__
    width, _ = plans.shape(weights, names.projection, 2)
    mlp, _ = plans.shape(weights, names.fc1.replace("@", "0"), 2)
    blocks = re.escape(names.fc1).replace("@", r"(\d+)") + "$"
    changes, unknown = plans.encoder_sizes(weights, blocks, width, mlp)
    ours, strides = front_end(weights, names, width, first)
    normalize = plans.setting(weights.config, "normalize", default=True)
    changes |= {**ours, "audio.normalize": bool(normalize)}
    fresh = {} if version == "2" or has(names.mask) else {"embed/fill": NO_MASK}
    if has(names.letters):
        classes, _ = plans.shape(weights, names.letters, 2)
        changes["letters"], notes = vocabularies.letters(folder, classes)
        recipe = "vox_960h" if plans.size(width) == "large" else "base_960h"
        config = f"finetune/ctc.py:version={version},recipe={recipe}"
        return Plan(config, changes, table, fresh, unknown | strides, notes=notes)
    changes |= plans.pretraining(changes["model.depth"], 8)
    config = f"pretrain/data2vec{version.strip('1')}_speech.py"
    return Plan(config, changes, table, fresh, unknown | strides)


def fairseq_names(start: str) -> Names:
    """Of data2vec 1.0, behind `start`."""
    return Names(
        f"{start}post_extract_proj.weight",
        f"{start}feature_extractor.conv_layers.@.0.weight",
        f"{start}encoder.pos_conv.@.0.weight",
        f"{start}encoder.layers.@.fc1.weight",
        f"{start}mask_emb",
        "w2v_encoder.proj.weight",
    )


def is_fairseq(weights, asked: bool) -> bool:
    """Its positions are a stack of convolutions, where wav2vec 2.0 has one."""
    start = plans.prefix(weights, "post_extract_proj.weight")
    return start is not None and f"{start}encoder.pos_conv.0.0.weight" in weights.tensors


def fairseq(weights, folder) -> Plan:
    """fairseq `examples/data2vec/models/data2vec_audio.py`, alone or with letters."""
    plans.require_post_norm(weights)
    start, has = plans.prefix(weights, "post_extract_proj.weight"), weights.tensors.__contains__
    table = under(start, tables.FAIRSEQ_AUDIO) + pair("w2v_encoder.proj", "letters")
    plan = speech_plan(weights, folder, fairseq_names(start), table)
    if "letters" in plan.changes:
        dropped = Rule(f"{start}final_proj.*", drop="the model is fine-tuned")
        return dataclasses.replace(plan, table=(dropped, *table))
    heads = (f"{start}final_proj.weight", f"{start}final_proj.0.weight")
    fresh = {} if any(map(has, heads)) else {"head": NO_HEAD}
    ema = f"{start}_ema."
    teacher = (
        *norm(f"{ema}layer_norm", "trunk/input_norm"),
        *under(ema, tables.split_blocks("layers.", tables.FAIRSEQ)),
        Rule(f"{ema}*", drop="the teacher's is the student's"),
    )
    return dataclasses.replace(plan, fresh={**plan.fresh, **fresh}, teacher=teacher)


def huggingface_names(start: str) -> Names:
    """Of Data2VecAudio, behind `start`."""
    return Names(
        f"{start}feature_projection.projection.weight",
        f"{start}feature_extractor.conv_layers.@.conv.weight",
        f"{start}encoder.pos_conv_embed.layers.@.conv.weight",
        f"{start}encoder.layers.@.feed_forward.intermediate_dense.weight",
        f"{start}masked_spec_embed",
        "lm_head.weight",
    )


def huggingface(weights, folder) -> Plan:
    """transformers' Data2VecAudioModel and what stands on it."""
    wanted = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "conv_bias": False}
    wanted |= {"add_adapter": False, "layer_norm_eps": 1e-5, "pad_token_id": 0}
    plans.require(weights.config, wanted)
    start = plans.prefix(weights, "feature_projection.projection.weight") or ""
    table = under(start, tables.HUGGINGFACE_AUDIO) + (tables.AUDIO_HEADS if start else ())
    plan = speech_plan(weights, folder, huggingface_names(start), table)
    changes = dict(plan.changes)
    given = vocabularies.preprocessor(folder)
    changes["audio.normalize"] = bool(given.get("do_normalize", changes["audio.normalize"]))
    fresh = dict(plan.fresh) | ({} if "letters" in changes else {"head": NO_HEAD})
    return dataclasses.replace(plan, changes=changes, fresh=fresh)
