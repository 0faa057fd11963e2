"""Our encoders of text and speech against transformers' data2vec, with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bivl
import huggingface
import sequences
from bivl import train
from bivl.core import checkpoint
from bivl.core import config as configs
from bivl.core.state import State
from bivl.data import tokenizers
from bivl.modalities import speech, text
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.live

TEXTS = {  # vocabulary, tokens, width, depth, heads, mlp
    "small": (37, 11, 24, 3, 2, 50),
    "odd_head": (101, 30, 45, 2, 3, 70),
    "one_block": (23, 5, 40, 1, 5, 24),
}
SOUNDS = {  # channels, kernels, strides, width, depth, heads, mlp, positions (how many, k, groups)
    "published_front": (12, (10, 3, 3, 3, 3, 2, 2), (5, *[2] * 6), 32, 3, 4, 64, (5, 19, 4)),
    "odd_head": (7, (9, 4, 2), (4, 3, 2), 45, 2, 3, 70, (2, 7, 5)),
    "even_kernel": (5, (8, 3), (5, 2), 24, 1, 2, 40, (1, 4, 3)),
}
SAMPLES = {"published_front": 8000, "odd_head": 701, "even_kernel": 333}


def encoder_config(spec, width, depth, heads, mlp):
    config = configs.load(f"configs/pretrain/{spec}")
    with config.unlocked():
        sizes = {"width": width, "depth": depth, "num_heads": heads, "mlp_dim": mlp}
        config.model.update(sizes)
        config.top_k_layers, config.mesh.data = 1, 1
    return config


def text_config(vocabulary, length, *sizes):
    config = encoder_config("data2vec_text.py:smoke", *sizes)
    config.text.length = length
    return config


def sound_config(channels, kernels, strides, *sizes, samples):
    *sizes, positions = sizes
    config = encoder_config("data2vec_speech.py:smoke", *sizes)
    config.audio.length = samples
    config.model.extractor = {"width": channels, "kernels": kernels, "strides": strides}
    config.model.position_conv = dict(zip(("depth", "kernel", "groups"), positions, strict=True))
    return config


def encoded(modality, config, params, batch, masked):
    encoder = EncoderConfig.of(config.model, "float32")
    head = config.head.layers, config.head.init
    model = data2vec.Data2Vec(modality.make_embed(config, "float32"), encoder, *head)
    options = {"collect": ("layers", "ffn"), "method": "encode"}
    return jax.jit(lambda p: model.apply({"params": p}, batch, masked, **options)[1])(params)


def assert_same_layers(got, layers, ffn, real):
    """At real places; what stands at pads is nobody's business."""
    assert len(got.layers) == len(layers) and len(got.ffn) == len(ffn)
    for ours, theirs in zip((*got.layers, *got.ffn), (*layers, *ffn), strict=True):
        np.testing.assert_allclose(ours[real], theirs.numpy()[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_text_equals_transformers(name, scan, monkeypatch):
    """A padded batch; to both, a masked token is a token like others."""
    vocabulary, length, *sizes = TEXTS[name]
    ids = sequences.Tokenizer(size=vocabulary, mask=vocabulary - 1)
    monkeypatch.setattr(text.tokenizers, "load", lambda config: ids)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, vocabulary, (3, length)).astype(np.int32)
    tokens[:, 0], tokens[1, length // 2 :], tokens[2, 3:] = 0, 1, 1
    model, config = huggingface.text_model(*TEXTS[name]), text_config(*TEXTS[name])
    config.model.scan = scan
    params = huggingface.text_params(model, *sizes[1:3])
    wanted, ffn = huggingface.read_text(model, tokens)
    got = encoded(text, config, params, {"tokens": tokens}, False)
    assert_same_layers(got, wanted.hidden_states, ffn, tokens != 1)
    masked = {"inputs": tokens, "tokens": np.ones_like(tokens)}
    again = encoded(text, config, params, masked, True)
    np.testing.assert_array_equal(again.tokens, got.tokens)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SOUNDS)
def test_speech_equals_transformers(name, masked, scan):
    """A padded batch, everywhere: the convolutions carry padding into what is real."""
    channels, kernels, strides, width, depth, heads, mlp, positions = SOUNDS[name]
    samples, rng = SAMPLES[name], np.random.default_rng(0)
    lengths = np.array([samples, samples * 2 // 3, samples // 2])
    padding = np.arange(samples) >= lengths[:, None]
    audio = np.where(padding, 0, rng.standard_normal(padding.shape)).astype(np.float32)
    model, config = (
        huggingface.sound_model(*SOUNDS[name]),
        sound_config(*SOUNDS[name], samples=samples),
    )
    config.model.scan = scan
    (frames,) = speech.grid(config)
    mask = rng.random((3, frames)) < 0.4
    params = huggingface.sound_params(model, kernels, depth, heads, positions)
    wanted, ffn = huggingface.hear(model, audio, padding, mask if masked else None)
    batch = {"audio": audio, "length": lengths, "mask": mask}
    got = encoded(speech, config, params, batch, masked)
    assert_same_layers(got, wanted.hidden_states, ffn, np.ones((3, frames), bool))
    plain, _ = huggingface.hear(model, audio, padding)
    assert not masked or np.abs(got.tokens - plain.last_hidden_state.numpy()).max() > 0.01


def saved(config, params, folder):
    """The parameters as a checkpoint of a run, loaded."""
    program = train.build(config, jax.devices()[:1])
    teacher = jax.tree.map(lambda x: jnp.zeros(x.shape), program.abstract.teacher)
    state = State(jnp.int32(0), params, teacher, {}, program.tx.init(params))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(0, state, config, wait=True)
    checkpoints.close()
    return bivl.load(folder)


def test_loaded_text_equals_transformers(tmp_path):
    """From words on; the batch is as long as its longest text."""
    config = text_config(0, 60, 32, 2, 4, 64)
    model = huggingface.text_model(tokenizers.load(config.tokenizer).size, 60, 32, 2, 4, 64)
    loaded = saved(config, huggingface.text_params(model, 2, 4), tmp_path)
    batch = loaded.preprocess(text=["One short text.", "Another " + "text " * 6, "Hm"])
    pairs = loaded.preprocess(text=["Is it?", "Was it?"], text_pair=["It is, it is.", "No"])
    assert batch["padding"].sum() > 4 and batch["tokens"].shape[1] < 60
    for given in (batch, pairs):
        real = ~given["padding"]
        wanted, _ = huggingface.read_text(model, given["tokens"])
        got = loaded.encode(given, layers=True)
        np.testing.assert_array_equal(got["padding"], given["padding"])
        for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
            np.testing.assert_allclose(ours[real], theirs.numpy()[real], rtol=0, atol=1e-4)
        last = wanted.last_hidden_state.numpy()
        np.testing.assert_allclose(got["tokens"][real], last[real], rtol=0, atol=1e-4)
        np.testing.assert_allclose(got["pooled"], last[:, 0], rtol=0, atol=1e-4)


def test_loaded_speech_equals_transformers(tmp_path):
    """From raw sound on; pooled is the mean of the real frames."""
    sizes = SOUNDS["published_front"]
    model, config = huggingface.sound_model(*sizes), sound_config(*sizes, samples=16_000)
    loaded = saved(
        config, huggingface.sound_params(model, sizes[1], *sizes[4:6], sizes[7]), tmp_path
    )
    rng = np.random.default_rng(2)
    sounds = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (20_011, 9_999, 16_000)]
    batch = loaded.preprocess(audio=sounds)
    lengths = (~batch["padding"]).sum(1)
    np.testing.assert_array_equal(lengths, [len(x) for x in sounds])
    for row, n in zip(batch["audio"], lengths, strict=True):
        assert abs(row[:n].mean()) < 1e-5 and abs(row[:n].std() - 1) < 0.01 and not row[n:].any()
    wanted, _ = huggingface.hear(model, batch["audio"], batch["padding"])
    got = loaded.encode(batch, layers=True)
    for ours, theirs in zip(got["layers"], wanted.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)
    last = wanted.last_hidden_state.numpy()
    np.testing.assert_allclose(got["tokens"], last, rtol=0, atol=1e-4)
    frames = model._get_feat_extract_output_lengths(torch.as_tensor(lengths)).numpy()
    np.testing.assert_array_equal((~np.asarray(got["padding"])).sum(1), frames)
    means = np.stack([row[:n].mean(0) for row, n in zip(last, frames, strict=True)])
    np.testing.assert_allclose(got["pooled"], means, rtol=0, atol=1e-4)
