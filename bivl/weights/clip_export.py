"""Our two towers as folders for transformers: CLIPModel, CLIPVisionModel, CLIPTextModel and the
last two with projections."""

import json

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary.clip import END, START
from bivl.weights import clip_tables as tables
from bivl.weights.data2vec_export import views
from bivl.weights.export import Export, Origin

KINDS = {"image": "vision", "text": "text"}
TABLES = {"image": tables.huggingface_image, "text": tables.huggingface_text}
OLD_END = 2  # in config.json: the token with the highest id stands for its text


def towers(config, ours, origin: Origin) -> Export | None:
    """CLIPModel, or one tower of it."""
    if config.modality != "towers" or config.objective != "contrastive":
        return None
    present, width = tuple(config.model.towers), config.contrast.width
    if len(present) == 2 and not width:
        raise UserError("transformers' CLIPModel has projections; this model has none")
    both = {name: settings(config, ours, origin, name) for name in present}
    whole = len(present) == 2 or origin.config.get("model_type") == "clip"
    files = {"preprocessor_config.json": seen(config)} if "image" in present else {}
    files |= words(config) if "text" in present else {}
    if whole:
        made = {"architectures": ["CLIPModel"], "logit_scale_init_value": 2.6592, **origin.config}
        made |= {"model_type": "clip", "dtype": "float32"}
        made |= {"projection_dim": width} if width else {}
        for name, own in both.items():
            made.pop(f"{KINDS[name]}_config_dict", None)  # it would win over the other
            made[f"{KINDS[name]}_config"] = own
    else:
        name = present[0]
        ending = "ModelWithProjection" if width else "Model"
        made = {"architectures": [f"CLIP{KINDS[name].capitalize()}{ending}"], **both[name]}
        made["dtype"] = "float32"
    table = ()
    for name in both:
        start = f"{KINDS[name]}_model."
        bare = not (whole or width or any(key.startswith(start) for key in origin.names))
        table += TABLES[name]("" if bare else start)
    return Export(made, table + tables.HUGGINGFACE_HEADS, files=files)


def settings(config, ours, origin: Origin, name: str) -> dict:
    """CLIPVisionConfig or CLIPTextConfig."""
    m = config.model.to_dict()
    m = m if name == "image" else m | m["text"]
    wanted = {"norm": "pre", "qkv_bias": "qkv", "layer_scale": 0.0, "input_norm": name == "image"}
    for key, value in wanted.items():
        if m[key] != value:
            raise UserError(
                f"transformers' CLIP has {key}={value!r}; the {name} tower here has {m[key]!r}"
            )
    whole = origin.config.get("model_type", "clip") == "clip"
    own = origin.config.get(f"{KINDS[name]}_config") if whole else origin.config
    found = dict(own or {}) | {
        "model_type": f"clip_{KINDS[name]}_model",
        "hidden_size": m["width"],
        "intermediate_size": m["mlp_dim"],
        "num_hidden_layers": m["depth"],
        "num_attention_heads": m["num_heads"],
        "hidden_act": m["activation"],
        "layer_norm_eps": m["eps"],
    }
    if config.contrast.width:
        found["projection_dim"] = config.contrast.width
    if name == "image":
        return found | {"image_size": config.image_size, "patch_size": m["patch_size"]}
    tokenizer = tokenizers.load(config.tokenizer)
    end = tokenizer.eos if m["end"] is None else m["end"]
    found.setdefault("bos_token_id", tokenizer.bos)
    return found | {
        "vocab_size": ours["text_embed/words/table"][0],
        "max_position_embeddings": ours["text_embed/positions/value"][0],
        "eos_token_id": OLD_END if m["pool"] == "highest" else end,
    }


def seen(config) -> dict:
    """What CLIPImageProcessor does to an image, as `preprocess` does here."""
    kind = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True}
    return views(config) | kind


def words(config) -> dict:
    """The files of CLIPTokenizer; none where there is another tokenizer."""
    if config.tokenizer.kind != "clip":
        return {}
    model = json.loads(tokenizers.load(config.tokenizer).data)["model"]
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    names = {"bos_token": START} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), END)
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.model.text.rows}
    return {
        "vocab.json": model["vocab"],
        "merges.txt": "\n".join(("#version: 0.2", *pairs, "")),
        "tokenizer_config.json": kind | names,
    }


HUGGINGFACE = (towers,)
