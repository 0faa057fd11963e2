"""Our image-text models under the names of BEiT-3's own code, as safetensors: transformers has no
such model. bivl's is one too, but for its heads.
"""

from bivl.core.errors import UserError
from bivl.weights import beit3_tables as tables
from bivl.weights.data2vec_export import built
from bivl.weights.export import Export, Origin

WANTED = {"norm": "sub", "qkv_bias": "qkv", "layer_scale": 0.0, "experts": "decoupled"}
NO_PLACE = {
    f"heads/{name}": "BEiT-3 has no such head"
    for name in ("decoder", "image_regression", "text_regression")
}


def official(config, ours, origin: Origin) -> Export | None:
    """microsoft/unilm's model of the objective, config.json by the names of torchscale's
    EncoderConfig."""
    m = config.model
    if config.modality != "image_text" or not built(m, WANTED):
        return None
    bare = "vision_embed.cls_token" in origin.names
    tuned = config.objective == "classify"
    table = tables.official("" if bare else "beit3.", texts=not tuned)
    if tuned:
        c = config.classifier
        if (c.pool, c.norm, c.hidden) != ("mean", True, False):
            raise UserError("BEiT-3 classifies by the mean of the patches and a norm alone")
        table += tables.CLASSIFIED
    settings = {
        "model_type": "beit3",
        "encoder_embed_dim": m.width,
        "encoder_layers": m.depth,
        "encoder_attention_heads": m.num_heads,
        "encoder_ffn_embed_dim": m.mlp_dim,
        "layernorm_eps": m.eps,
        "normalize_output": "trunk/image_norm/scale" in ours,
        "img_size": config.image_size,
        "patch_size": m.patch_size,
        "multiway": True,
    }
    if "embed/words/table" in ours:
        settings["vocab_size"] = ours["embed/words/table"][0]
    return Export(settings, (*table, *tables.MASKED, *tables.CONTRASTED), NO_PLACE)
