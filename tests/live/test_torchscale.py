"""BEiT-3's encoder against microsoft/torchscale (0.2.0, the version BEiT-3 pins), same weights.

`tests/golden/torch_beit3.py`, from which numbers are recorded, must agree with it, and so must our
own encoder.
"""

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import beit3_tree

torch = pytest.importorskip("torch")
pytest.importorskip("torchscale")
pytestmark = pytest.mark.live

SIZE_NAMES = ["width", "depth", "num_heads", "mlp_dim", "image_size", "patch_size", "vocabulary"]
SIZES = {  # by these names
    "recorded": (24, 3, 3, 40, 12, 4, 50),
    "odd_head": (45, 2, 3, 70, 20, 4, 101),
    "one_patch": (40, 1, 5, 24, 7, 7, 23),
}
LENGTHS = (6, 9, 4)  # of the texts of a padded batch
TOLERANCE = 2e-5  # torchscale computes softmax and GELU in float32
OURS = 2e-5  # and we compute everything in it


@pytest.fixture(scope="module")
def recorder():
    """The recording script as a module, beside which it finds its reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("tests/golden")
        yield importlib.import_module("record_beit3")


@pytest.fixture(scope="module")
def torchscale():
    """`BEiT3` and `EncoderConfig`; what it imports for FSDP and drop path alone may be missing."""
    stubs = {
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
        "timm.models.layers": {"drop_path": lambda x, probability, training: x},
    }
    with pytest.MonkeyPatch.context() as patch:
        for path, names in stubs.items():
            try:
                importlib.import_module(path)
            except ImportError:
                parts = path.split(".")
                for end in range(1, len(parts) + 1):
                    name = ".".join(parts[:end])
                    patch.setitem(sys.modules, name, types.ModuleType(name))
                for name, value in names.items():
                    setattr(sys.modules[path], name, value)
        model = importlib.import_module("torchscale.model.BEiT3")
        config = importlib.import_module("torchscale.architecture.config")
        yield types.SimpleNamespace(BEiT3=model.BEiT3, EncoderConfig=config.EncoderConfig)


def build(torchscale, config):
    """torchscale's BEiT-3 of these sizes, as the published fine-tuning code asks for it."""
    names = {
        "encoder_embed_dim": config.width,
        "encoder_layers": config.depth,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_embed_dim": config.mlp_dim,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "vocab_size": config.vocabulary,
    }
    options = torchscale.EncoderConfig(**names, multiway=True, no_output_layer=True)
    return torchscale.BEiT3(options).eval()


@torch.no_grad()
def run(model, call):
    """torchscale's layers [B, L, D] (the input of the first, then outputs) and final tokens."""
    layers = []

    def before(module, args, kwargs):
        layers.append(args[0])

    def after(module, args, output):
        layers.append(output[0])

    blocked = call.get("blocked")  # to be a number: torchscale writes -1e8 into its own copy
    hooks = [model.encoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in model.encoder.layers]
    out = model(
        textual_tokens=call.get("tokens"),
        visual_tokens=call.get("image"),
        text_padding_position=call.get("padding"),
        vision_masked_position=call.get("masked"),
        attn_mask=None if blocked is None else blocked.double(),
    )
    for hook in hooks:
        hook.remove()
    return layers, out["encoder_out"]


@pytest.fixture(scope="module", params=SIZES)
def case(request, recorder, torchscale):
    """Sizes, torchscale's model with random weights, and inputs of all calls, in float64."""
    config = recorder.reference.ModelConfig(*SIZES[request.param])
    rng = np.random.default_rng(len(request.param))
    model = build(torchscale, config).double()
    recorder.randomize(model, rng)
    return config, model, recorder.make_inputs(rng, config, LENGTHS)


CALLS = ("image", "image_masked", "text", "pair", "pair_masked", "caption")


@pytest.mark.parametrize("call", CALLS)
def test_the_reference_agrees(recorder, case, call):
    config, theirs, inputs = case
    ours = recorder.reference.BEiT3(config).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given = {name: inputs[name] for name in recorder.CALLS[call]}
    wanted, last = run(theirs, given)
    with torch.no_grad():
        layers, tokens = ours(**given)
    for got, value in zip((*layers, tokens), (*wanted, last), strict=True):
        assert got.std() > 0.1
        np.testing.assert_allclose(got, value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("call", CALLS)
def test_our_encoder_agrees(recorder, case, call):
    """Every layer at what is no padding, in float32."""
    config, theirs, inputs = case
    given = {name: inputs[name] for name in recorder.CALLS[call]}
    wanted, last = run(theirs, given)
    state = theirs.state_dict()
    get = lambda name: state[name].float().numpy()  # noqa: E731
    params = jax.tree.map(jnp.asarray, beit3_tree.tree(get, config.depth, config.num_heads))
    sizes = {name: getattr(config, name) for name in SIZE_NAMES}
    ours = beit3_tree.model(**sizes)
    arrays = {name: value.numpy() for name, value in given.items() if name != "padding"}
    if "image" in arrays:
        arrays["image"] = arrays["image"].transpose(0, 2, 3, 1).astype(np.float32)
    if "tokens" in arrays:
        np.testing.assert_array_equal(arrays["tokens"] == beit3_tree.PAD, given["padding"])
    call_ours = jax.jit(lambda params: beit3_tree.call(ours, params, **arrays))
    layers, tokens, valid = map(np.asarray, call_ours(params))
    assert len(layers) == len(wanted) == config.depth + 1
    for got, value in zip((*layers, tokens), (*wanted, last), strict=True):
        np.testing.assert_allclose(got[valid], value.numpy()[valid], rtol=0, atol=OURS)


def test_all_calls_are_compared(recorder):
    assert tuple(recorder.CALLS) == CALLS


@pytest.mark.parametrize(
    ("sizes", "count"), [((768, 12, 12, 3072), 220_987_392), ((1024, 24, 16, 4096), 672_702_464)]
)
def test_parameters_of_the_released_models(recorder, sizes, count):
    with torch.device("meta"):
        ours = recorder.reference.BEiT3(recorder.reference.ModelConfig(*sizes))
    assert sum(value.numel() for value in ours.parameters()) == count


def test_recording_again_gives_the_stored_numbers(recorder, monkeypatch, tmp_path):
    stored = dict(np.load(recorder.FOLDER / "beit3.npz", allow_pickle=False))
    monkeypatch.setattr(recorder, "FOLDER", tmp_path)
    recorder.main()
    again = dict(np.load(tmp_path / "beit3.npz", allow_pickle=False))
    assert again.keys() == stored.keys()
    for name, value in stored.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_allclose(again[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
