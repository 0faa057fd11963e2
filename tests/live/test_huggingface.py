"""Our encoder against transformers' Data2VecVisionModel, both with the same random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bivl
from bivl import train
from bivl.core import checkpoint
from bivl.core import config as configs
from bivl.core.state import State
from bivl.modalities import image
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec
from golden import data2vec_vision as golden

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.live

# Square images only: for others transformers reads the bias table with height and width exchanged.
SIZES = {  # image, patch, width, depth, heads, mlp
    "4x4": (32, 8, 32, 3, 2, 128),
    "5x5_odd_head": (35, 7, 45, 2, 3, 70),
    "3x3_one_block": (18, 6, 40, 1, 5, 24),
    "2x2_one_head": (10, 5, 16, 2, 1, 32),
}
SPREAD = {"bias": 0.2, "lambda": 0.5, "bias_table": 0.5, "token": 0.5}
BEIT_TO_HUGGINGFACE = (  # in this order; q, k, v are one matrix in BEiT
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("rel_pos_bias", "encoder.relative_position_bias"),
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    ("attn.q_bias", "attention.attention.query.bias"),
    ("attn.v_bias", "attention.attention.value.bias"),
    ("attn.proj", "attention.output.dense"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("gamma_", "lambda_"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def converted(model, depth, heads):
    """The model's weights as Data2Vec's parameters; each is used, each once. The head is zero."""
    left = {name: value.numpy(force=True) for name, value in model.named_parameters()}
    width = model.config.hidden_size

    def get(name):
        if name.startswith("lm_head"):
            return np.zeros((width, width) if name.endswith("weight") else width, np.float32)
        for beit, huggingface in BEIT_TO_HUGGINGFACE:
            name = re.sub(beit, huggingface, name)
        if "attn.qkv" in name:
            parts = ("query", "key", "value")
            names = [name.replace("attn.qkv", f"attention.attention.{part}") for part in parts]
            return np.concatenate([left.pop(part) for part in names])
        return left.pop(name)

    params = golden.tree(get, depth, heads)
    assert not left
    return params


def reference(image_size, patch_size, width, depth, heads, mlp):
    """transformers' model with every parameter drawn, the bias table and layer scales too."""
    config = transformers.Data2VecVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        layer_norm_eps=1e-6,
        layer_scale_init_value=0.1,
        use_shared_relative_position_bias=True,
        use_mask_token=True,
        use_mean_pooling=False,
        attn_implementation="eager",
    )
    model = transformers.Data2VecVisionModel(config, add_pooling_layer=True).eval()
    rng = np.random.default_rng(image_size)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.as_tensor(rng.standard_normal(value.shape), dtype=torch.float32)
            spread = next((s for kind, s in SPREAD.items() if kind in name.split(".", 1)[1]), None)
            if spread:
                value.copy_(spread * noise)
            elif value.ndim == 1:  # scale of a norm
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_(noise / np.sqrt(value[0].numel()))
    return model


def our_config(image_size, patch_size, width, depth, heads, mlp):
    config = configs.load("configs/pretrain/data2vec_image.py:smoke")
    configs.override(config, [("masking.min_block", "1")])  # four patches leave room for no other
    sizes = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": heads}
    sizes = {f"model.{name}": value for name, value in (sizes | {"mlp_dim": mlp}).items()}
    sizes |= {"image_size": image_size, "data.image_size": image_size, "top_k_layers": 1}
    configs.override(config, [(name, str(value)) for name, value in sizes.items()])
    return config


@pytest.fixture(scope="module", params=sorted(SIZES))
def case(request):
    """Sizes, transformers' model, our parameters, images [2, S, S, 3] and mask [2, T]."""
    sizes = SIZES[request.param]
    model = reference(*sizes)
    rng = np.random.default_rng(1)
    images = rng.standard_normal((2, sizes[0], sizes[0], 3)).astype(np.float32)
    mask = rng.random((2, (sizes[0] // sizes[1]) ** 2)) < 0.5
    mask[0, 0] = True
    return sizes, model, converted(model, sizes[3], sizes[4]), images, mask


def run(model, images, mask=None):
    """transformers' outputs: last_hidden_state, pooler_output, hidden_states, attentions."""
    with torch.no_grad():
        return model(
            torch.as_tensor(images).permute(0, 3, 1, 2),
            bool_masked_pos=None if mask is None else torch.as_tensor(mask),
            output_hidden_states=True,
            output_attentions=True,
        )


def close(ours, theirs):
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_equals_transformers(case, masked, scan):
    sizes, model, params, images, mask = case
    wanted = run(model, images, mask if masked else None)
    config = our_config(*sizes)
    config.model.scan = scan
    encoder = EncoderConfig.of(config.model, "float32")
    ours = data2vec.Data2Vec(image.make_embed(config, "float32"), encoder)
    batch = {"image": jnp.asarray(images), "mask": jnp.asarray(mask)}
    options = {"collect": ("layers", "weights"), "method": "encode"}
    got = jax.jit(lambda p: ours.apply({"params": p}, batch, masked, **options)[1])(params)
    for ours, theirs in zip(got.layers, wanted.hidden_states, strict=True):
        close(ours, theirs)
    for ours, theirs in zip(got.weights, wanted.attentions, strict=True):
        close(ours, theirs)
    close(got.tokens, wanted.last_hidden_state)
    unmasked = run(model, images).last_hidden_state
    assert not masked or np.abs(got.tokens - unmasked.numpy()).max() > 0.01


def test_loaded_checkpoint_equals_transformers(case, tmp_path):
    sizes, model, params, images, _ = case
    wanted = run(model, images)
    config = our_config(*sizes)
    config.mesh.data = 1
    program = train.build(config, jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, params)
    state = State(jnp.int32(0), params, params, {}, program.tx.init(params))
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(0, state, config, wait=True)
    checkpoints.close()

    loaded = bivl.load(tmp_path)
    got = loaded.encode({"image": images}, layers=True)
    for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
        close(ours, theirs)
    close(got["tokens"], wanted.last_hidden_state)
    close(got["pooled"], wanted.pooler_output)
    side = sizes[0] // sizes[1]
    attention = wanted.attentions[-1][:, :, 0, 1:].unflatten(-1, (side, side))
    close(loaded.predict["attention"]({"image": images}), attention)
