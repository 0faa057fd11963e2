"""What holds for one pre-training objective holds for all: resume, meshes, evaluation, loading."""

import shutil

import jax
import numpy as np
import pytest

import bivl
import runs
from bivl import train

pytestmark = pytest.mark.usefixtures("quick_compile")

OTHERS = [name for name in runs.PRETRAIN if name != "data2vec_image"]  # that one: test_train.py
DROPOUT = {"model.dropout": "0.1", "model.attention_dropout": "0.1"}


@pytest.mark.parametrize("name", OTHERS)
def test_resume_gives_the_same_bits(tmp_path, name):
    changes = DROPOUT | {"checkpoint.every": "2"}
    straight = train.train(runs.tiny(changes, name), tmp_path)
    before = runs.lines(tmp_path)
    assert len({line["loss"] for line in before}) == 4
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    runs.assert_same(train.train(runs.tiny(changes, name), tmp_path), straight)
    assert runs.without_times(runs.lines(tmp_path)) == runs.without_times(before)


@pytest.mark.parametrize("name", OTHERS)
def test_the_losses_on_a_mesh_are_those_of_one_device(name):
    """On 2 x 2 x 2 here; 1 x 8 x 1 and 8 x 1 x 1 in test_train.py and in two processes."""
    expected = runs.few_losses(1, DROPOUT, name)
    assert len(set(expected[:, 0])) == 5
    found = runs.few_losses(8, runs.mesh(2, 2, 2) | DROPOUT, name)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_loaded_and_read(tmp_path, name):
    train.train(runs.tiny({"steps": "1"}, name), tmp_path)
    model = bivl.load(tmp_path)
    inputs = {
        "image": [np.zeros((40, 30, 3), np.uint8)] * 2,
        "text": ["a word", "three words and more"],
        "audio": [np.sin(np.arange(9000) / 20), np.sin(np.arange(20_000) / 10)],
    }
    modality = model.config.modality
    kinds = {"speech": ("audio",), "image_text": ("image", "text")}.get(modality, (modality,))
    batch = model.preprocess(**{kind: inputs[kind] for kind in kinds})
    out = model.encode(batch, layers=True)
    assert out["tokens"].shape[::2] == (2, 32) and len(out["layers"]) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))
    np.testing.assert_allclose(np.linalg.norm(model.embed(batch), axis=-1), 1, rtol=1e-5)
    if "padding" in out:  # what is padding does not change the rest
        alone = model.encode(model.preprocess(**{kind: inputs[kind][:1] for kind in kinds}))
        real = int((~alone["padding"]).sum())
        assert real == int((~out["padding"][0]).sum())
        near = 0.05 if modality == "speech" else 1e-5  # convolutions mix padding into last frames
        ours, others = alone["tokens"][0, : real // 2], out["tokens"][0, : real // 2]
        np.testing.assert_allclose(ours, others, atol=near)
