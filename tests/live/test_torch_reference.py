"""The PyTorch reference of tests/golden run afresh: other weights and shapes than the recorded."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core import config as configs
from bivl.objectives import data2vec
from golden import data2vec_vision as golden

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live

PIPELINES = {  # flags of the reference that are on: ours
    "layer_norm final_layer_norm": {"layer_norms": ("layer",), "norms": ("layer",)},
    "instance_norm final_layer_norm": {"layer_norms": ("instance",), "norms": ("layer",)},
    "batch_norm group_norm": {"layer_norms": ("batch", "group"), "norms": ()},
}


@pytest.fixture(scope="module")
def recorder():
    """The recording script as a module, beside which it finds its reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(golden.FILE.parent))
        yield importlib.import_module("record_data2vec_vision")


@pytest.fixture(scope="module")
def case(recorder):
    """Reference student and teacher with fresh weights, images [3, 20, 20, 3] and mask [3, 25]."""
    reference = recorder.reference
    model = reference.ModelConfig(
        image_size=20, patch_size=4, width=24, depth=4, num_heads=3, mlp_dim=56
    )
    rng = np.random.default_rng(7)
    models = [reference.Data2VecVision(model).double() for _ in range(2)]
    for each in models:
        recorder.load(each, recorder.random_parameters(each, rng))
    images = rng.standard_normal((3, 20, 20, 3))
    mask = rng.random((3, 25)) < np.array([[0.3], [0.6], [0.9]])
    mask[:, 0] = True
    return *models, torch.as_tensor(images), torch.as_tensor(mask)


def config_of(**changes):
    config = configs.load("configs/pretrain/data2vec_image.py:smoke")
    sizes = {"patch_size": 4, "width": 24, "depth": 4, "num_heads": 3, "mlp_dim": 56}
    values = {f"model.{name}": value for name, value in sizes.items()}
    values |= {"image_size": 20, "data.image_size": 20, "batch_size": 3, "top_k_layers": 3}
    configs.override(config, [(name, str(value)) for name, value in (values | changes).items()])
    return config


def ours(values):
    """`values` maps a parameter's BEiT name to its tensor; the result is a tree like ours."""
    tree = golden.tree(lambda name: np.float32(values[name].numpy(force=True)), 4, 3)
    return jax.tree.map(jnp.asarray, tree)


def batch_of(images, mask):
    return {"image": jnp.asarray(images.numpy(), jnp.float32), "mask": jnp.asarray(mask.numpy())}


@pytest.mark.parametrize("collect", ["end", "ffn"])
@pytest.mark.parametrize("flags", sorted(PIPELINES))
def test_targets(recorder, case, flags, collect):
    _, teacher, images, mask = case
    names = [f.name for f in recorder.dataclasses.fields(recorder.reference.TargetConfig)]
    chosen = {name: name in flags.split() for name in names if name not in ("top_k", "collect")}
    settings = recorder.reference.TargetConfig(top_k=3, collect=collect, **chosen)
    wanted = recorder.reference.teacher_targets(teacher, images, settings)
    config = config_of(**{"target.layer": collect})
    with config.unlocked(), config.ignore_type():
        config.target.update(PIPELINES[flags])
    objective = data2vec.make(config)
    params = ours(dict(teacher.named_parameters()))
    got = jax.jit(objective.targets)(params, params, {}, batch_of(images, mask), jax.random.key(0))
    np.testing.assert_allclose(got["values"], wanted.numpy(), atol=2e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients(recorder, case, beta, reduction):
    student, teacher, images, mask = case
    reference = recorder.reference
    settings = reference.TargetConfig(top_k=3)
    target = reference.teacher_targets(teacher, images, settings)
    prediction = student.predict(images, mask, masked_only=True)
    scale = None if reduction == "mean" else 24**-0.5
    wanted = reference.regression_loss(prediction, target[mask], beta, scale)
    named = dict(student.named_parameters())
    grads = torch.autograd.grad(wanted, list(named.values()))

    config = config_of(**{"loss.beta": beta, "loss.reduction": reduction})
    objective = data2vec.make(config)
    batch, key = batch_of(images, mask), jax.random.key(0)
    teacher_params = ours(dict(teacher.named_parameters()))

    @jax.jit
    def ours_all(params):
        targets = objective.targets(params, teacher_params, {}, batch, key)
        return jax.value_and_grad(objective.loss, has_aux=True)(params, {}, batch, targets, key)

    (loss, _), got = ours_all(ours(named))
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)

    def close(path, a, b):
        bound = 1e-5 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=bound, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, ours(dict(zip(named, grads, strict=True))))


def test_recording_again_gives_the_stored_numbers(recorder, monkeypatch, tmp_path):
    monkeypatch.setattr(recorder, "FOLDER", tmp_path)
    recorder.main()
    stored = golden.load()
    with np.load(tmp_path / golden.FILE.name, allow_pickle=False) as arrays:
        again = dict(arrays)
    assert again.keys() == stored.keys()
    for name, value in stored.items():
        assert again[name].dtype == value.dtype
        if name == "names":
            assert again[name].tolist() == value.tolist()
        else:
            np.testing.assert_allclose(again[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    name = "init_data2vec_vision.json"
    old, new = (json.loads((d / name).read_text()) for d in (golden.FILE.parent, tmp_path))
    assert old["config"] == new["config"] and old["parameters"].keys() == new["parameters"].keys()
    for key, entry in old["parameters"].items():
        for statistic, value in entry.items():
            np.testing.assert_allclose(new["parameters"][key][statistic], value, rtol=1e-5)
