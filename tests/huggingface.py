"""transformers' data2vec of text and speech: random models, and their weights as our parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import sequence_trees

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT_NAMES = (  # fairseq's -> transformers', in this order
    ("encoder.sentence_encoder.", ""),
    ("embed_tokens", "embeddings.word_embeddings"),
    ("embed_positions", "embeddings.position_embeddings"),
    ("layernorm_embedding", "embeddings.LayerNorm"),
    (r"^layers\.", "encoder.layer."),
    (r"self_attn\.q_proj", "attention.self.query"),
    (r"self_attn\.k_proj", "attention.self.key"),
    (r"self_attn\.v_proj", "attention.self.value"),
    (r"self_attn\.out_proj", "attention.output.dense"),
    ("self_attn_layer_norm", "attention.output.LayerNorm"),
    ("final_layer_norm", "output.LayerNorm"),
    ("fc1", "intermediate.dense"),
    ("fc2", "output.dense"),
)
SOUND_NAMES = (
    ("mask_emb", "masked_spec_embed"),
    (r"(conv_layers\.\d+)\.0", r"\1.conv"),
    (r"(conv_layers\.\d+)\.2\.1", r"\1.layer_norm"),
    (r"^layer_norm", "feature_projection.layer_norm"),
    ("post_extract_proj", "feature_projection.projection"),
    (r"pos_conv\.(\d+)\.0", r"pos_conv_embed.layers.\1.conv"),
    (r"self_attn\.", "attention."),
    ("self_attn_layer_norm", "layer_norm"),
    ("fc1", "feed_forward.intermediate_dense"),
    ("fc2", "feed_forward.output_dense"),
)


def drawn(model):
    """The model with every parameter random; token types, which fairseq lacks, are zero."""
    rng = np.random.default_rng(model.config.hidden_size)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            if "token_type" in name:
                value.zero_()
            elif "embed" in name and "LayerNorm" not in name and "conv" not in name:
                value.copy_(0.5 * noise)
            elif name.endswith("bias"):
                value.copy_(0.2 * noise)
            elif value.ndim == 1:  # scale of a norm
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    return model.eval()


def converted(model, names, tree, head: str):
    """The model's weights as Data2Vec's parameters; each is used, each once. The head is zero."""
    left = {name: value.numpy(force=True) for name, value in model.named_parameters()}
    left.pop("embeddings.token_type_embeddings.weight", None)
    width = model.config.hidden_size

    def get(name):
        if name.startswith(head):
            wide = 2 * width
            inner, outer = (wide, width) if ".0." in name else (width, wide)
            shape = (inner, outer if "regression" in head else width)
            return np.zeros(shape if name.endswith("weight") else shape[0], np.float32)
        for fairseq, huggingface in names:
            name = re.sub(fairseq, huggingface, name)
        return left.pop(name)

    params = tree(get)
    assert not left
    return jax.tree.map(jnp.asarray, params)


def text_model(vocabulary, length, width, depth, heads, mlp):
    config = transformers.Data2VecTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=length + 2,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        type_vocab_size=1,
        pad_token_id=1,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    return drawn(transformers.Data2VecTextModel(config, add_pooling_layer=False))


def sound_model(channels, kernels, strides, width, depth, heads, mlp, positions):
    config = transformers.Data2VecAudioConfig(
        conv_dim=[channels] * len(kernels),
        conv_kernel=kernels,
        conv_stride=strides,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        num_conv_pos_embeddings=positions[0],
        conv_pos_kernel_size=positions[1],
        num_conv_pos_embedding_groups=positions[2],
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    return drawn(transformers.Data2VecAudioModel(config))


def text_params(model, depth, heads):
    tree = lambda get: sequence_trees.text(get, depth, heads)  # noqa: E731
    return converted(model, TEXT_NAMES, tree, "encoder.regression_head")


def sound_params(model, kernels, depth, heads, positions):
    tree = lambda get: sequence_trees.audio(get, depth, heads, len(kernels), positions[0])  # noqa: E731
    return converted(model, SOUND_NAMES, tree, "final_proj")


def run(model, ffn: str, **batch):
    """transformers' outputs, and what the modules whose names match `ffn` gave, layer by layer."""
    given = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: given.append(out))
        for name, module in model.named_modules()
        if re.fullmatch(ffn, name)
    ]
    tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in batch.items()}
    with torch.no_grad():
        out = model(**tensors, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, given


def read_text(model, tokens):
    real = (tokens != 1).astype(np.int64)
    batch = {"input_ids": tokens.astype(np.int64), "attention_mask": real}
    return run(model, r"encoder\.layer\.\d+\.output\.dense", **batch)


def hear(model, audio, padding, mask=None):
    batch = {"input_values": audio, "attention_mask": (~padding).astype(np.int64)}
    batch |= {} if mask is None else {"mask_time_indices": mask}
    return run(model, r"encoder\.layers\.\d+\.feed_forward\.output_dense", **batch)
