"""Our masked image models, and classifiers that came from BEiT, as folders for transformers' Beit.

Classifiers from elsewhere are written as Data2VecVision, which is the same model.
"""

from bivl.core.errors import UserError
from bivl.weights import beit_tables as tables
from bivl.weights import data2vec_export as encoder
from bivl.weights.data2vec_tables import RELATIVE
from bivl.weights.export import Export, Origin

OURS = ("beit", "beit2")  # whose classifiers go to Beit
NO_PLACE = {"aggregator": "transformers has no aggregation of patches"}


def huggingface(config, ours, origin: Origin) -> Export | None:
    """BeitForMaskedImageModeling, BeitForImageClassification, or what the source was."""
    m, tuned = config.model, config.objective == "classify"
    came = origin.family in OURS or origin.config.get("model_type") == "beit"
    if config.modality != "image" or not (config.objective == "mim" or (tuned and came)):
        return None
    final = m.get("final_norm", True)
    mean = config.classifier.pool == "mean" if tuned else True
    head = (mean, not mean, False)
    if (
        m.positions not in ("relative", "relative_layers", "none")
        or not encoder.built(m, {"norm": "pre", "qkv_bias": "qv", "input_norm": False})
        or (tuned and (config.classifier.norm, final, config.classifier.hidden) != head)
    ):
        raise UserError(
            "transformers' Beit has relative positions or none, and one norm, before or after "
            "pooling; this model has others"
        )
    start = "beit." if not origin.names or _behind("beit.", origin) else ""
    settings = _settings(config, origin, start, mean and bool(start or tuned))
    if tuned:
        table = tables.classified(start)
        settings = encoder.labels(settings, config.num_classes)
    else:
        settings["vocab_size"] = ours["lm_head/bias"][0]
        table = tables.masked(start, "layernorm")
    other = RELATIVE if m.positions == "relative_layers" else f"{RELATIVE}[n]"
    table = tuple(rule for rule in table if rule.path != other)
    files = {"preprocessor_config.json": _views(config)}
    return Export(settings, table, NO_PLACE, files=files)


def _behind(start: str, origin: Origin) -> bool:
    return any(name.startswith(start) for name in origin.names)


def _settings(config, origin: Origin, start: str, mean: bool) -> dict:
    m, tuned = config.model, config.objective == "classify"
    ending = "ForImageClassification" if tuned else "ForMaskedImageModeling"
    fresh = {"architectures": [f"Beit{ending if start else 'Model'}"]}
    return {**fresh, **origin.config} | {
        "model_type": "beit",
        "dtype": "float32",
        "hidden_size": m.width,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": m.eps,
        "image_size": config.image_size,
        "patch_size": m.patch_size,
        "use_mask_token": "embed/mask_token/value" not in origin.absent,
        "use_absolute_position_embeddings": False,
        "use_shared_relative_position_bias": m.positions == "relative",
        "use_relative_position_bias": m.positions == "relative_layers",
        "layer_scale_init_value": m.layer_scale,
        "use_mean_pooling": mean,
    }


def _views(config) -> dict:
    """What BeitImageProcessor does, as `preprocess` here."""
    views, side = encoder.views(config), config.image_size
    if config.augment.get("squash", False):
        views |= {"do_center_crop": False, "size": {"height": side, "width": side}}
    return views
