"""The tiny ALIGN of align.npz: transformers' settings, and names and shapes of its tensors."""

VISION = {
    "image_size": 21,
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "depth_divisor": 4,
    "kernel_sizes": [3, 5, 3],
    "in_channels": [32, 16, 32],
    "out_channels": [16, 32, 48],
    "depthwise_padding": [3],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 1],
    "expand_ratios": [1, 3, 2],
    "squeeze_expansion_ratio": 0.25,
    "batch_norm_eps": 0.01,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "vocab_size": 13,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 0,
}
CONFIG = {"model_type": "align", "projection_dim": 12, "temperature_init_value": 1.0}
CONFIG |= {"vision_config": VISION, "text_config": TEXT}
# Channels in, expanded, squeezed and out, kernel, stride and padding before the first pixel.
BLOCKS = (
    (8, 8, 2, 4, 3, 1, 1),
    (4, 12, 1, 8, 5, 2, 1),
    (8, 24, 2, 8, 5, 1, 2),
    (8, 16, 2, 12, 3, 2, 1),
)
RESIDUAL = 2  # the only block that is not the first of its stage


def batch_norm(name: str, width: int) -> dict:
    """Shapes of a batch norm."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (width,) for part in parts}


def linear(name: str, out: int, into: int) -> dict:
    """Shapes of a map."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def image_shapes() -> dict:
    """Name -> shape of the image tower's."""
    start = "vision_model.embeddings."
    found = {f"{start}convolution.weight": (8, 3, 3, 3)} | batch_norm(f"{start}batchnorm", 8)
    for i, (inputs, hidden, squeezed, outputs, kernel, _, _) in enumerate(BLOCKS):
        b = f"vision_model.encoder.blocks.{i}."
        if hidden != inputs:
            found[f"{b}expansion.expand_conv.weight"] = (hidden, inputs, 1, 1)
            found |= batch_norm(f"{b}expansion.expand_bn", hidden)
        found[f"{b}depthwise_conv.depthwise_conv.weight"] = (hidden, 1, kernel, kernel)
        found |= batch_norm(f"{b}depthwise_conv.depthwise_norm", hidden)
        for name, (out, into) in {
            "reduce": (squeezed, hidden),
            "expand": (hidden, squeezed),
        }.items():
            found[f"{b}squeeze_excite.{name}.weight"] = (out, into, 1, 1)
            found[f"{b}squeeze_excite.{name}.bias"] = (out,)
        found[f"{b}projection.project_conv.weight"] = (outputs, hidden, 1, 1)
        found |= batch_norm(f"{b}projection.project_bn", outputs)
    return found


def text_shapes() -> dict:
    """Name -> shape of the text tower's."""
    e, width = "text_model.embeddings.", TEXT["hidden_size"]
    rows = {"word": TEXT["vocab_size"], "position": 7, "token_type": 2}
    found = {f"{e}{name}_embeddings.weight": (n, width) for name, n in rows.items()}
    norms = [f"{e}LayerNorm"]
    for i in range(TEXT["num_hidden_layers"]):
        b = f"text_model.encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            found |= linear(f"{b}attention.{name}", width, width)
        found |= linear(f"{b}intermediate.dense", 10, width)
        found |= linear(f"{b}output.dense", width, 10)
        norms += [f"{b}attention.output.LayerNorm", f"{b}output.LayerNorm"]
    found |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return found | linear("text_model.pooler.dense", width, width)


def shapes() -> dict:
    """Name -> shape of all but the counts of batches."""
    head = linear("text_projection", 12, TEXT["hidden_size"])
    return image_shapes() | text_shapes() | head | {"temperature": ()}
