"""Our ViLT as a folder for transformers: ViltModel, ViltForMaskedLM, and what the model came as."""

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.vocabulary import wordpiece
from bivl.weights import vilt_tables as tables
from bivl.weights.export import Export, Origin

NO_PLACE = {"itm_head": "transformers' ViLT has no head for matching"}
WANTED = {"norm": "pre", "layer_scale": 0.0, "input_norm": False, "final_norm": True}


def pairs(config, ours, origin: Origin) -> Export | None:
    """ViltModel, ForMaskedLM where words can be named, or the class that it came as."""
    if config.objective != "vilt" or config.modality != "single_stream":
        return None
    m, words = config.model, "mlm_head/bias/value" in ours
    for key, value in (WANTED | {"eps": m.text_eps}).items():
        if m[key] != value:
            raise UserError(f"transformers' ViLT has {key}={value!r}; this model has {m[key]!r}")
    if not m.pooler and not origin.names:
        raise UserError("transformers' ViLT has a pooler; this model has none")
    if m.qkv_bias == "qv":
        raise UserError("transformers' ViLT has biases of q, k and v or none; this model has qv")
    start = "vilt." if words or any(name.startswith("vilt.") for name in origin.names) else ""
    files = {"preprocessor_config.json": seen(config)} | vocabulary(config)
    left = {name: why for name, why in NO_PLACE.items() if f"{name}/kernel" in ours}
    table = tables.encoder(start) + tables.heads()
    return Export(settings(config, ours, origin, words), table, left, files=files)


def settings(config, ours, origin: Origin, words: bool) -> dict:
    """ViltConfig."""
    m, side = config.model, config.image_size
    given = origin.config.get("image_size")
    if isinstance(given, int) and given // m.patch_size == side // m.patch_size:
        side = given  # of which a rest at the edge is not read
    fresh = {"architectures": ["ViltForMaskedLM" if words else "ViltModel"]}
    return {**fresh, "max_image_length": -1, **origin.config} | {
        "model_type": "vilt",
        "dtype": "float32",
        "vocab_size": ours["embed/words/table"][0],
        "type_vocab_size": ours["embed/segment/value"][0],
        "modality_type_vocab_size": ours["embed/modality/value"][0],
        "max_position_embeddings": ours["embed/text_positions/value"][0],
        "hidden_size": m.width,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": m.activation,
        "layer_norm_eps": m.eps,
        "qkv_bias": m.qkv_bias == "qkv",
        "image_size": side,
        "patch_size": m.patch_size,
        "tie_word_embeddings": bool(m.tied),
    }


def seen(config) -> dict:
    """What ViltImageProcessor does to an image: the same as `preprocess` here, but that it keeps
    the image's shape."""
    return {
        "image_processor_type": "ViltImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "size_divisor": config.model.patch_size,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_pad": True,
    }


def vocabulary(config) -> dict:
    """The files of BertTokenizer; none where there is another tokenizer."""
    if config.tokenizer.kind != "wordpiece":
        return {}
    tokenizer = tokenizers.load(config.tokenizer)
    pieces, special = (
        wordpiece.pieces(tokenizer.data),
        dict(zip(("cls", "pad", "sep", "unk", "mask"), tokenizer.special, strict=True)),
    )
    names = {f"{name}_token": pieces[number] for name, number in special.items()}
    kind = {"tokenizer_class": "BertTokenizer", "model_max_length": config.model.text_rows}
    return {
        "vocab.txt": "\n".join((*pieces, "")),
        "tokenizer_config.json": kind | names | wordpiece.settings(tokenizer.data),
    }


HUGGINGFACE = (pairs,)
