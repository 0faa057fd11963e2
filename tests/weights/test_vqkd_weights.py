"""A file with the names of VQ-KD's own code, converted without PyTorch: golden numbers."""

import json

import jax
import numpy as np
import pytest
from weight_writers import safetensors

import bivl
from bivl import convert
from bivl.core import checkpoint
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.objectives import mim
from golden import vqkd

pytestmark = pytest.mark.usefixtures("quick_compile")
CLOSE = 2e-5


@pytest.fixture(scope="module")
def recorded():
    arrays = vqkd.load()
    return {k.removeprefix("vqkd/"): v for k, v in arrays.items() if k.startswith("vqkd/")}


def theirs(recorded):
    """With the buffers, and what a training checkpoint has besides."""
    params = {k.removeprefix("params/"): v for k, v in recorded.items() if k.startswith("params/")}
    book = recorded["codebook"]
    counts = np.ones(len(book), np.float32)
    return params | {
        "quantize.embedding.weight": book,
        "quantize.embedding.cluster_size": counts,
        "quantize.embedding.embed_avg": book,
        "quantize.embedding.initted": np.ones(1, np.float32),
        "quantize.cluster_size": counts,
        "teacher_model.visual.proj": np.ones((6, 6), np.float32),
        "scaling_layer.shift": np.ones((1, 3, 1, 1), np.float32),
    }


def converted(folder, params, *flags):
    out = folder / "ours"
    safetensors(folder / "theirs.safetensors", params)
    flags = f"--config.model.num_heads={vqkd.HEADS}", *flags
    convert.main([f"--source={folder}/theirs.safetensors", f"--out={out}", *flags])
    return out, json.loads((out / "conversion.json").read_text())


def test_codes_are_those_recorded(tmp_path, recorded):
    out, report = converted(tmp_path, theirs(recorded))
    assert (report["family"], report["missing"], report["unused"]) == ("vqkd", [], [])
    loaded = bivl.load(out)
    batch = {"image": recorded["images"]}
    np.testing.assert_array_equal(loaded.predict["codes"](batch), recorded["codes"])
    wanted = vqkd.vqkd(lambda name: recorded[f"params/{name}"])
    assert jax.tree.structure(loaded.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)
    assert {row["key"].split(".")[0] for row in report["dropped"]} == {
        "quantize",
        "teacher_model",
        "scaling_layer",
    }
    assert [row["path"] for row in report["initialised"]] == ["extras/codebook/idle"]


def test_the_codebook_stays_fitted(tmp_path, recorded):
    """Trained on, no k-means would begin it anew; and types are ours."""
    out, _ = converted(tmp_path, theirs(recorded))
    step = checkpoint.find(out)
    book = {
        "vectors": jax.ShapeDtypeStruct((12, 4), np.float32),
        "idle": jax.ShapeDtypeStruct((12,), np.int32),
        "fitted": jax.ShapeDtypeStruct((), bool),
    }
    found = checkpoint.restore_part(step, {"extras": {"codebook": book}})["extras"]["codebook"]
    assert found["fitted"].dtype == bool and found["fitted"]
    assert found["idle"].dtype == np.int32 and (found["idle"] > 2**20).all()
    np.testing.assert_array_equal(found["vectors"], recorded["codebook"])


def test_it_is_a_tokenizer_of_pre_training(tmp_path, recorded):
    """Its codes are BEiT v2's targets; its own teacher is not asked for."""
    out, _ = converted(tmp_path, theirs(recorded))
    config = configs.load("configs/pretrain/beit2.py:smoke")
    with config.unlocked(), config.ignore_type():
        config.image_size, config.model.patch_size, config.masking.min_block = 16, 4, 2
        config.teacher.random, config.teacher.checkpoint = False, str(out)
        config.teacher.config = checkpoint.read_config(checkpoint.find(out))
    made = mim.make(config)
    assert made.frozen == {"teacher": str(out)}
    params, _, _ = jax.eval_shape(made.init, jax.random.key(0))
    assert params["lm_head"]["bias"].value.shape == (12,)


def test_training_on_asks_for_a_teacher(tmp_path, recorded):
    out, _ = converted(tmp_path, theirs(recorded))
    config = checkpoint.read_config(checkpoint.find(out))
    with config.unlocked():
        config.steps = 10
    with pytest.raises(UserError, match="config.teacher.checkpoint is empty; name a checkpoint"):
        bivl.model.make_objective(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("decoder.fc_norm.bias", None, "is missing, for decode_trunk/norm/bias"),
        ("encoder.pos_embed", np.ones((1, 16, 16), "f"), "has 16 rows, not CLS and a square"),
        (
            "quantize.embedding.weight",
            np.ones((12, 5), "f"),
            "decoder.patch_embed.proj.weight has shape",
        ),
        ("encoder.gate", np.ones(3, "f"), "encoder.gate is not used"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key, value, said, tmp_path, recorded):
    params = theirs(recorded)
    params.pop(key, None)
    params |= {} if value is None else {key: value}
    with pytest.raises(UserError) as caught:
        converted(tmp_path, params)
    assert said in str(caught.value) and "\n" not in str(caught.value)
