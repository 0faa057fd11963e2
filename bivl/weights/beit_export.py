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
    ending = "ForImageClassification" if tuned else "ForMaskedImageModeling"
    settings = encoder.sizes(config, origin, "beit", f"Beit{ending if start else 'Model'}")
    settings |= encoder.patches(config, origin, mean and bool(start or tuned))
    if tuned:
        table = tables.classified(start)
        settings = encoder.labels(settings, config.num_classes, origin)
    else:
        settings["vocab_size"] = ours["lm_head/bias"][0]
        table = tables.masked(start, "layernorm")
    other = RELATIVE if m.positions == "relative_layers" else f"{RELATIVE}[n]"
    table = tuple(rule for rule in table if rule.path != other)
    files = {"preprocessor_config.json": encoder.views(config)}
    return Export(settings, table, NO_PLACE, files=files)


def _behind(start: str, origin: Origin) -> bool:
    return any(name.startswith(start) for name in origin.names)
