"""What holds for one pre-training objective holds for all: resume, meshes, evaluation, loading."""

import argparse
import functools
import shutil

import jax
import numpy as np
import pytest

import bivl
import runs
from bivl import embed, evaluate, train
from bivl.core.errors import UserError

OTHERS = [name for name in runs.PRETRAIN if name != "data2vec_image"]  # that one: test_train.py
# On meshes, where dropout draws: one of each kind here, the rest with `pytest -m meshes`.
KINDS = ("data2vec_text", "data2vec2_speech", "vqkd", "bivl", "vqa", "align")
MESHED = [pytest.param(x, marks=() if x in KINDS else pytest.mark.meshes) for x in OTHERS]
DROPOUT = {"dropout": "0.1", "attention_dropout": "0.1"}
CHANGES = runs.mesh(2, 2, 2) | {"steps": "5", "checkpoint.every": "3"}
TOGETHER = {  # what a model is given in one call; by modality, others are modalities themselves
    "speech": (("audio",),),
    "image_text": (("image", "text"),),
    "single_stream": (("image", "text"),),
    "towers": (("image",), ("text",)),
}


def dropout(name):
    """Changes that draw random numbers in every block that can."""
    where = "model.text" if name == "align" else "model"
    return {f"{where}.{key}": value for key, value in DROPOUT.items()}


@pytest.fixture(scope="module")
def trained(quick_compile, tmp_path_factory):
    """Objective -> (workdir, final state) of 5 updates on a mesh of 2 x 2 x 2 devices."""

    @functools.cache
    def run(name):
        workdir = tmp_path_factory.mktemp(name) / "run"
        return workdir, train.train(runs.tiny(CHANGES | dropout(name), name), workdir)

    return run


@pytest.mark.parametrize("name", OTHERS)
def test_resume_gives_the_same_bits(trained, tmp_path, name):
    workdir, straight = trained(name)
    before, resumed = runs.lines(workdir), shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / "5")
    again = train.train(runs.tiny(CHANGES | dropout(name), name), resumed)
    runs.assert_same(again, straight)
    assert runs.without_times(runs.lines(resumed)) == runs.without_times(before)


@pytest.mark.parametrize("name", MESHED)
def test_the_losses_on_a_mesh_are_those_of_one_device(trained, name):
    """On 2 x 2 x 2 here; 1 x 8 x 1 and 8 x 1 x 1 in test_train.py and in two processes."""
    workdir, state = trained(name)
    found = [[line["loss"], line["grad_norm"]] for line in runs.lines(workdir)]
    expected, alone = runs.few_losses(1, dropout(name), name)
    assert len(set(expected[:, 0])) == 5
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, state.extras, alone.extras)  # the codebook of vqkd, statistics of align


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_loaded_and_read(trained, name):
    model = bivl.load(trained(name)[0])
    inputs = {
        "image": [np.zeros((40, 30, 3), np.uint8)] * 2,
        "text": ["a word", "three words and more"],
        "audio": [np.sin(np.arange(9000) / 20), np.sin(np.arange(20_000) / 10)],
    }
    modality = model.config.modality
    for kinds in TOGETHER.get(modality, ((modality,),)):
        check_read(model, {kind: inputs[kind] for kind in kinds})


def check_read(model, inputs):
    batch = model.preprocess(**inputs)
    out = model.encode(batch, layers=True)
    assert out["tokens"].shape[::2] == (2, 32)
    assert len(out["layers"]) == model.config.model.get("depth", 2) + 1  # or stages of maps
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))
    np.testing.assert_allclose(np.linalg.norm(model.embed(batch), axis=-1), 1, rtol=1e-5)
    if "padding" in out:  # what is padding does not change the rest
        alone = model.encode(model.preprocess(**{kind: x[:1] for kind, x in inputs.items()}))
        real = int((~alone["padding"]).sum())
        assert real == int((~out["padding"][0]).sum())
        near = 0.05 if "audio" in inputs else 1e-5  # convolutions mix padding into last frames
        ours, others = (x["tokens"][0][~x["padding"][0]][: real // 2] for x in (alone, out))
        np.testing.assert_allclose(ours, others, atol=near)


def test_embed_reads_one_set_with_the_checkpoint_of_a_mixture(trained, tmp_path):
    """What --config.data says, or else the mixture's first part with images."""
    flags, out = [f"--checkpoint={trained('beit3')[0]}"], tmp_path / "vectors.npz"
    data = {"kind": "synthetic", "num_examples": 11, "image_size": 32}
    embed.main([*flags, f"--out={out}", *(f"--config.data.{k}={v}" for k, v in data.items())])
    with np.load(out) as found:
        assert found["features"].shape == (11, 32) and np.isfinite(found["features"]).all()
    given = argparse.Namespace(checkpoint=str(trained("beit3")[0]), step=None)
    saved = evaluate.saved_config(given, [])
    assert embed.saved_config(given, []).data == saved.data.images
    with pytest.raises(UserError, match="no 'masked' features of text; take cloze out"):
        evaluate.main([*flags, f"--out={tmp_path}", "--config.evaluators=cloze"])
