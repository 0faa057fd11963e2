"""Shipped configs of data2vec on text and speech against fairseq's, key by key.

Sources: `examples/data2vec/config/text/pretraining/base.yaml`, `audio/pretraining/
base_librispeech.yaml` and, of 2.0, `config/v2/{base,large}_{text,audio}_only_task.yaml`.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import sequences
from bivl.core import config as configs
from bivl.core import ema, optimizer
from bivl.core.errors import UserError
from bivl.modalities import speech, text
from bivl.objectives import data2vec, data2vec2

COUNTS = json.loads((Path(__file__).parents[1] / "golden/data2vec_sizes.json").read_text())
LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
OBJECTIVES = {"data2vec": data2vec, "data2vec2": data2vec2}
EXTRACTOR = (512, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
ROOT = 1e9  # stands for a scale of 1 / sqrt(D), which is None in configs

# One column a model: its config, then name by name what fairseq has.
COLUMNS = {
    "text 1.0": "data2vec_text.py:size=base",
    "T-Base": "data2vec2_text.py:size=base",
    "T-Large": "data2vec2_text.py:size=large",
    "audio 1.0": "data2vec_speech.py:size=base",
    "A-Base": "data2vec2_speech.py:size=base",
    "A-Large": "data2vec2_speech.py:size=large",
}
TABLE = {
    # name:                 text 1.0    T-Base    T-Large   audio 1.0  A-Base    A-Large
    "model.width":         (768,        768,      1024,     768,       768,      1024),
    "model.depth":         (12,         12,       24,       12,        12,       24),
    "model.num_heads":     (12,         12,       16,       12,        12,       16),
    "model.mlp_dim":       (3072,       3072,     4096,     3072,      3072,     4096),
    "model.norm":          ("post",) * 6,
    "model.eps":           (1e-5,) * 6,
    "model.qkv_bias":      ("qkv",) * 6,
    "model.init":          ("normal",) * 6,
    "model.dropout":       (0.1,) * 6,
    "model.attention_dropout":  (0.1,) * 6,
    "model.activation_dropout": (0.0,) * 6,
    "model.drop_path":     (0.0,) * 6,
    "model.layer_scale":   (0.0,) * 6,
    "model.final_norm":    (False,) * 6,
    "model.input_norm":    (False,      False,    False,    True,      True,     True),
    "model.layer_drop":    (0.0,        0.0,      0.0,      0.05,      0.05,     0.0),
    "top_k_layers":        (10,         12,       24,       8,         8,        16),
    "target.layer":        ("ffn",) * 6,
    "target.layer_norms":  (("layer",), ("instance",), ("layer",), *[("instance",)] * 3),
    "target.norms":        ((),         (),       ("instance",), (),   (),       ()),
    "target.embed_dropout": (False,     True,     True,     False,     False,    False),
    "loss.beta":           (4.0,        0.0,      0.0,      0.0,       0.0,      0.0),
    "loss.reduction":      ("sum",) * 6,
    "loss.scale":          (1.0,        1.0,      1.0,      ROOT,      ROOT,     ROOT),
    "loss.std_weight":     (0.0,) * 6,
    "mask_ratio":          (0.35,       0.48,     0.5,      0.65,      0.5,      0.55),
    "masking.kind":        ("span",     "random", "random", "span", *["inverse_block"] * 2),
    "ema_decay_start":     (0.999,      0.9999,   0.9999,   0.999,     0.999,    0.9997),
    "ema_decay_end":       (0.9999,     0.99999,  0.99999,  0.9999,    0.99999,  1.0),
    "ema_anneal_steps":    (300_000,    100_000,  100_000,  30_000,    75_000,   300_000),
    "steps":               (1_000_000,  1_000_000, 600_000, 400_000,   400_000,  600_000),
    "optimizer.schedule":  ("cosine",   "cosine", "cosine", "tri_stage", "cosine", "cosine"),
    "optimizer.learning_rate": (2e-4,   2e-4,     1e-4,     5e-4,      7.5e-4,   4e-4),
    "optimizer.end_learning_rate": (0.0,) * 6,
    "optimizer.beta1":     (0.9,) * 6,
    "optimizer.beta2":     (0.98,) * 6,
    "optimizer.eps":       (1e-6,) * 6,
    "optimizer.weight_decay": (0.01,) * 6,
    "optimizer.layer_decay": (1.0,) * 6,
    "optimizer.clip_norm": (5.0,        1.0,      1.0,      0.0,       0.0,      1.0),
}  # fmt: skip
SOME = {  # what not every model has
    "text 1.0": {
        "optimizer.warmup_steps": 10_000,
        "masking.span": 4,
        "target.input": "masked",
        "text.break_mode": "complete_doc",
        "head.layers": 2,
        "head.init": "normal",
    },
    "audio 1.0": {
        "optimizer.phases": (0.03, 0.9, 0.07),
        "optimizer.final_scale": 0.01,
        "masking.span": 10,
        "masking.equal": 16,
        "model.alibi": False,
        "head.layers": 1,
        "head.init": "torch",
    },
    "T-Base": {"optimizer.warmup_steps": 4000, "masking.num_masks": 8, "decoder.width": 768},
    "T-Large": {"optimizer.warmup_steps": 4000, "masking.num_masks": 8, "decoder.width": 768},
    "A-Base": {"optimizer.warmup_steps": 8000, "masking.num_masks": 8, "decoder.width": 384},
    "A-Large": {"optimizer.warmup_steps": 10_000, "masking.num_masks": 12, "decoder.width": 768},
}
DECODERS = {  # depth, kernel, groups, residual, projections, dropout of the input, noise
    "T": (5, 9, 1, False, 2, 0.1, 0.01),
    "A": (4, 7, 16, True, 1, 0.1, 0.01),
}
DECODER = ("depth", "kernel", "groups", "residual", "projection_layers", "dropout", "noise")
BATCHES = {  # tokens, or seconds of sound, in fairseq's batch of all its GPUs
    "text 1.0": 16 * 8192,
    "T-Base": 16 * 4 * 512,
    "T-Large": 32 * 2 * 512,
    "audio 1.0": 16 * 3.8e6 / 16_000,
    "A-Base": 8 * 62.5,
    "A-Large": 48 * 20,
}


@pytest.fixture(autouse=True)
def roberta_ids(monkeypatch):
    ids = sequences.Tokenizer(size=50265, mask=50264)
    monkeypatch.setattr(text.tokenizers, "load", lambda config: ids)


def load(column):
    return configs.load(f"configs/pretrain/{COLUMNS[column]}")


def shapes(config):
    """(params, teacher) as shapes."""
    init = OBJECTIVES[config.objective].make(config).init
    return jax.eval_shape(init, jax.random.key(0))[:2]


@pytest.mark.parametrize("column", COLUMNS)
def test_constants(column):
    flat = configs.flatten(load(column))
    place = list(COLUMNS).index(column)
    wanted = {name: values[place] for name, values in TABLE.items()} | SOME[column]
    if column[1] == "-":
        wanted |= dict(zip([f"decoder.{k}" for k in DECODER], DECODERS[column[0]], strict=True))
        wanted |= {"loss.cls_weight": 0.0}
    if column[0] == "A":
        adjust = {"A-Base": 0.05, "A-Large": 0.1}[column]
        wanted |= {"masking.block": 5, "masking.adjust": adjust, "masking.inverse": False}
        wanted |= {"model.alibi": True}
    if "audio.length" in flat:
        extractor = (flat[f"model.extractor.{k}"] for k in ("width", "kernels", "strides"))
        positions = (flat[f"model.position_conv.{k}"] for k in ("depth", "kernel", "groups"))
        assert (tuple(extractor), tuple(positions)) == (EXTRACTOR, (5, 19, 16))
        wanted |= {"audio.normalize": True}
    else:
        wanted |= {"text.length": 512, "model.embed_dropout": 0.1}
        wanted |= {"text.break_mode": "none"} if column[0] == "T" else {}
    wanted = {name: None if value is ROOT else value for name, value in wanted.items()}
    assert {name: flat[name] for name in wanted} == wanted


def test_the_main_row_of_the_paper():
    """masks=bert differs from what fairseq ships in nothing but the paper's own numbers."""
    shipped = configs.flatten(load("text 1.0"))
    flat = configs.flatten(configs.load("configs/pretrain/data2vec_text.py:size=base,masks=bert"))
    changed = {name: value for name, value in flat.items() if shipped.get(name) != value}
    masking = {"kind": "bert", "kept": 0.1, "randomized": 0.1, "score": "masked"}
    assert changed == {f"masking.{key}": value for key, value in masking.items()} | {
        "mask_ratio": 0.15,
        "ema_anneal_steps": 100_000,
        "optimizer.schedule": "tri_stage",
    }
    assert shipped.keys() - flat.keys() == {"masking.span"}
    assert flat["optimizer.phases"] == (0.05, 0.8, 0.15)
    with pytest.raises(UserError, match="masks=words is unknown; use one of"):
        configs.load("configs/pretrain/data2vec_text.py:masks=words")


@pytest.mark.parametrize("column", COLUMNS)
def test_batches_hold_as_much_as_those_of_the_reference(column):
    c = load(column)
    size = c.text.length if c.modality == "text" else c.audio.length / speech.RATE
    assert abs(c.batch_size * size / BATCHES[column] - 1) < 0.05


def test_every_weight_is_decayed():
    for column in COLUMNS:
        c = load(column)
        decayed = optimizer.decay_mask(shapes(c)[0], c.optimizer.no_decay)
        assert all(jax.tree.leaves(decayed)), column


@pytest.mark.parametrize(
    "column, kept, sight",
    [("T-Base", 266, 512), ("T-Large", 256, 512), ("A-Base", 375, 749), ("A-Large", 338, 749)],
)
def test_kept_places(column, kept, sight):
    """T - floor(T R) frames of 15 s, 266 and 256 of 512 tokens."""
    c = load(column)
    modality = {"text": text, "speech": speech}[c.modality]
    spec = modality.spec(c)
    masks = c.masking.num_masks
    assert spec["keep"].shape == (c.batch_size, masks, kept)
    assert spec["mask"].shape == (c.batch_size, masks, sight)


COUNTED = {  # name in data2vec_sizes.json: column, changes of its model
    "data2vec_text_base": ("text 1.0", {}),
    "data2vec_text_large": ("text 1.0", LARGE),
    "data2vec_audio_base": ("audio 1.0", {}),
    "data2vec_audio_large": ("audio 1.0", LARGE),
    "data2vec2_text_base": ("T-Base", {}),
    "data2vec2_text_large": ("T-Large", {}),
    "data2vec2_audio_base": ("A-Base", {}),
    "data2vec2_audio_large": ("A-Large", {}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts_match_the_reference(name):
    column, changes = COUNTED[name]
    c = load(column)
    with c.unlocked():
        c.model.update(changes)
    params, teacher = shapes(c)
    heads = ("head", "decoder")
    sizes = {key: sum(x.size for x in jax.tree.leaves(part)) for key, part in params.items()}
    head = sum(size for key, size in sizes.items() if key in heads)
    total = sum(sizes.values())
    assert {"encoder": total - head, "head": head, "total": total} == COUNTS[name]
    assert not set(teacher) & set(heads)
    assert COUNTS.keys() == COUNTED.keys()


@pytest.mark.parametrize(
    "column, name",
    [
        ("text 1.0", "data2vec_text"),
        ("audio 1.0", "data2vec_audio"),
        ("T-Base", "data2vec2_text"),
        ("A-Base", "data2vec2_audio"),
    ],
)
def test_schedules_match_the_reference(column, name):
    c, recorded = load(column), sequences.load(name)
    updates = recorded["schedule/update"]
    assert updates.max() == c.steps
    schedule = optimizer.make_schedule(c.optimizer, c.steps)
    got = jax.vmap(schedule)(updates.astype(np.int32))
    atol = 1e-6 * c.optimizer.learning_rate  # cosine of float32 near pi
    np.testing.assert_allclose(got, recorded["schedule/learning_rate"], rtol=2e-6, atol=atol)
    rate = ema.update_rate(c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps)
    got = [rate(n) for n in updates]
    np.testing.assert_allclose(got, 1 - recorded["schedule/ema_decay"], rtol=1e-5)


def test_a_decay_of_one_freezes_the_teacher():
    """A-Large's after 300,000 updates: its own parts stand still."""
    c = load("A-Large")
    rate = ema.update_rate(c.ema_decay_start, c.ema_decay_end, c.ema_anneal_steps)
    assert rate(299_999) > 0 == rate(300_000) == rate(600_000)
