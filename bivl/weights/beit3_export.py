"""Our image-text models under the names of BEiT-3's own code, as safetensors: transformers has no
such model. bivl's is one too, but for its heads.
"""

from bivl.core.errors import UserError
from bivl.weights import beit3_tables as tables
from bivl.weights.data2vec_export import built
from bivl.weights.export import Export, Origin

HEADS = {"classify": tables.CLASSIFIED, "vqa": tables.ANSWERED, "nlvr2": tables.COMPARED}
ENCODERS = {"classify": (False, False), "vqa": (True, False)}  # with texts, with the last norm
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
    head = HEADS.get(config.objective, (*tables.MASKED, *tables.CONTRASTED))
    table = tables.official("" if bare else "beit3.", *ENCODERS.get(config.objective, ()))
    if config.objective == "classify":
        c = config.classifier
        if (c.pool, c.norm, c.hidden) != ("mean", True, False):
            raise UserError("BEiT-3 classifies by the mean of the patches and a norm alone")
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
    return Export(settings, (*table, *head), NO_PLACE)
