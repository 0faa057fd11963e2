"""Trained models in use: bivl.load, evaluate, embed and benchmark, in process."""

import argparse
import json

import jax
import numpy as np
import pytest
from PIL import Image

import bivl
import runs
from bivl import benchmark, embed, evaluate, train
from bivl import model as models
from bivl.core import checkpoint, sharding
from bivl.core.errors import UserError
from bivl.data import sources

pytestmark = pytest.mark.usefixtures("quick_compile")

CHANGES = {"steps": "2", "checkpoint.every": "1", "data.num_examples": "44"}
TOKENS, WIDTH, DEPTH = 1 + 16, 32, 2


@pytest.fixture(scope="module")
def trained(quick_compile, tmp_path_factory):
    """A run of 2 updates on eight devices: (its folder, its final state)."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, train.train(runs.tiny(CHANGES), workdir)


@pytest.fixture(scope="module")
def model(trained):
    """The trained model, loaded."""
    return bivl.load(trained[0])


@pytest.fixture(scope="module")
def images():
    """The records of the training set."""
    source = sources.open_source(runs.tiny(CHANGES).data)
    return [source[i]["image"] for i in range(len(source))]


def test_any_folder_of_a_run_loads_on_one_device(trained, model):
    workdir, state = trained
    runs.assert_same(model.params, state.params)
    assert len(state.step.sharding.device_set) == 8
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(model.params))
    for folder in (workdir / "checkpoints", workdir / "checkpoints" / "2", str(workdir)):
        runs.assert_same(bivl.load(folder).params, state.params)
    assert model.config.objective == "data2vec"


def test_a_step_is_chosen_by_its_number(trained):
    workdir, state = trained
    for folder, step in ((workdir, 1), (workdir / "checkpoints", 1), (workdir, 2)):
        loaded = bivl.load(folder, step)
        same = np.array_equal(
            loaded.params["head"]["projection"]["kernel"],
            np.asarray(state.params["head"]["projection"]["kernel"]),
        )
        assert same == (step == 2)
    first = bivl.load(workdir / "checkpoints" / "1")
    runs.assert_same(first.params, bivl.load(workdir, 1).params)
    with pytest.raises(UserError, match=r"no checkpoint of step 9; it has \[1, 2\]"):
        bivl.load(workdir, 9)


def test_preprocess_takes_arrays_pictures_and_paths(model, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    forms = [
        images[0],
        Image.fromarray(images[0]),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
    ]
    batch = model.preprocess(image=forms)
    assert set(batch) == {"image"}
    assert batch["image"].dtype == np.float32 and batch["image"].shape == (4, 32, 32, 3)
    for row in batch["image"][1:]:
        np.testing.assert_array_equal(row, batch["image"][0])
    mean, std = np.array(model.config.image_mean), np.array(model.config.image_std)
    expected = (images[0] / 255 - mean) / std
    np.testing.assert_allclose(batch["image"][0], expected, atol=1e-5)
    with pytest.raises(UserError, match="no image"):
        model.preprocess(image=[])


def test_preprocess_names_the_input_that_is_wrong(model, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    array, typo, broken = images[0], "typo.jpg", tmp_path / "broken.jpg"
    cases = [
        ({"image": [array, typo]}, r"image\[1\] \(typo.jpg\) cannot be read: FileNotFound"),
        ({"image": [array, array, broken]}, r"image\[2\] \(.*broken.jpg\) cannot be read"),
        ({"image": [array.astype(float)]}, r"image\[0\] \(ndarray\) cannot be read"),
        ({"image": [None]}, r"image\[0\] \(NoneType\) cannot be read"),
        ({"image": "cat.png"}, r"a single image; pass a list, image=\[...\]"),
        ({"image": Image.fromarray(array)}, "a single image; pass a list"),
        ({"text": ["words"]}, r"got text, but this model takes image=\[...\]"),
        ({"image": [array], "text": ["words"]}, "got text, but this model takes image"),
        ({}, "argument: 'image'; this model takes image"),
    ]
    for given, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            model.preprocess(**given)
        assert "\n" not in str(caught.value)


def test_encode_wants_as_many_texts_as_images(model):
    """Of models of both; pairs of other models say so too."""
    batch = {"image": np.zeros((1, 32, 32, 3)), "tokens": np.zeros((2, 4), int)}
    with pytest.raises(UserError, match="got 1 images and 2 texts; pass as many of each, or"):
        model.encode(batch)


def test_encode_gives_tokens_pooled_and_layers(trained, model, images):
    batch = model.preprocess(image=images[:3])
    out = model.encode(batch, layers=True)
    assert set(out) == {"tokens", "pooled", "layers"}
    assert out["tokens"].shape == (3, TOKENS, WIDTH) and out["pooled"].shape == (3, WIDTH)
    assert [x.shape for x in out["layers"]] == [(3, TOKENS, WIDTH)] * (DEPTH + 1)
    assert set(model.encode(batch)) == {"tokens", "pooled"}
    objective = models.make_objective(runs.tiny(CHANGES))
    params = jax.device_get(trained[1].params)
    expected = jax.jit(objective.predict["encode"])(params, {}, batch)
    runs.assert_same(out, dict(expected))
    np.testing.assert_array_equal(out["pooled"], out["tokens"][:, 0])
    # uint8 images are normalised on the device: the same up to rounding.
    raw = model.encode({"image": np.stack(images[:3])})
    np.testing.assert_allclose(raw["tokens"], out["tokens"], atol=1e-5)


def test_embed_gives_unit_vectors(model, images):
    batch = model.preprocess(image=images[:3])
    vectors, pooled = model.embed(batch), model.encode(batch)["pooled"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        vectors * np.linalg.norm(pooled, axis=-1, keepdims=True), pooled, atol=1e-5
    )


def test_a_model_can_compute_in_another_dtype(trained, model, images):
    batch = model.preprocess(image=images[:3])
    half = bivl.load(trained[0], dtype="bfloat16").encode(batch)["tokens"]
    assert half.dtype == jax.numpy.bfloat16
    full = model.encode(batch)["tokens"]
    assert full.dtype == np.float32
    assert 0 < np.abs(np.float32(half) - full).max() < 0.1


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        bivl.load(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"unfinished ones: \[3\]"):
        bivl.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        bivl.load(tmp_path / "nowhere")


def test_evaluate_writes_finite_numbers(trained, tmp_path, capsys):
    flags = [f"--checkpoint={trained[0]}", f"--out={tmp_path / 'out'}"]
    evaluate.main([*flags, "--config.evaluators=knn,pictures", "--step=2"])
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert numbers.keys() >= {"knn/accuracy", "knn/pixels", "knn/chance"}
    assert all(np.isfinite(value) for value in numbers.values())
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "data2vec, step 2" in page
    shown = capsys.readouterr().out
    for name, value in numbers.items():
        assert f"| {name} | {value:.4f} |" in page
        assert name in shown
    pictures = sorted((tmp_path / "out" / "pictures").glob("*.png"))
    assert pictures and all(np.asarray(Image.open(path)).std() > 1 for path in pictures)


def test_evaluate_and_the_training_loop_agree(trained, tmp_path):
    """Without --out the numbers lie beside the checkpoint."""
    changes = CHANGES | {"evaluators": "knn"}
    train.train(runs.tiny(changes), tmp_path)
    evaluate.main([f"--checkpoint={tmp_path}"])
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"step": 2} | numbers == runs.lines(tmp_path, "evaluations")[-1]


def test_embed_writes_features_ids_and_labels(trained, model, images, tmp_path):
    out = tmp_path / "vectors.npz"
    embed.main([f"--checkpoint={trained[0]}", f"--out={out}"])
    with np.load(out) as found:
        arrays = dict(found)
    assert set(arrays) == {"features", "ids", "labels"}
    assert arrays["features"].dtype == np.float32 and arrays["features"].shape == (44, WIDTH)
    np.testing.assert_array_equal(arrays["ids"], np.arange(44))
    source = sources.open_source(runs.tiny(CHANGES).data)
    assert [source[i]["label"] for i in range(44)] == arrays["labels"].tolist()
    expected = model.predict["features"](model.preprocess(image=images))
    np.testing.assert_allclose(arrays["features"], expected, atol=2e-5)
    assert out.stat().st_mode & 0o044 == 0o044  # others may read it, as the umask allows
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npz"]


def test_embed_reads_other_data(trained, tmp_path):
    """Images without class folders have one class; --config.data replaces what was trained on."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "all").mkdir(parents=True)
    for i in range(5):
        pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "all" / f"{i}.png")
    data = ["--config.data.kind=folder", f"--config.data.dir={tmp_path / 'images'}"]
    embed.main([f"--checkpoint={trained[0]}", f"--out={tmp_path / 'x.npz'}", *data])
    with np.load(tmp_path / "x.npz") as found:
        assert found["features"].shape == (5, WIDTH) and np.isfinite(found["features"]).all()
        assert len(np.unique(found["features"], axis=0)) == 5


FIELDS = {
    "device",
    "batch_size",
    "steps",
    "compile_seconds",
    "step_seconds",
    "data_wait_seconds",
    "examples_per_second",
    "flops_per_step",
    "flops_per_second",
    "peak_bytes",
}


def test_benchmark_reports_in_text_and_json(capsys):
    config = "--config=configs/pretrain/data2vec_image.py:smoke"
    flags = [config, "--steps=3", *(f"--config.{k}={v}" for k, v in runs.SMALL.items())]
    benchmark.main(flags)
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown.keys() >= FIELDS
    benchmark.main([*flags, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == shown.keys()
    assert report["steps"] == 3 and report["batch_size"] == 8
    numbers = {name: report[name] for name in FIELDS - {"device", "data_wait_seconds"}}
    assert all(value > 0 for value in numbers.values())
    rate = report["batch_size"] / report["step_seconds"]
    assert report["examples_per_second"] == pytest.approx(rate)
    program = train.build(runs.tiny())
    assert report["flops_per_step"] == program.flops()


def test_what_remat_computes_again_does_not_count():
    found = [train.build(runs.tiny({"model.remat": kind})).flops() for kind in ("none", "full")]
    assert found[0] == found[1] > 0


def test_benchmark_of_the_input_alone_and_a_profile(capsys, tmp_path):
    config = "--config=configs/pretrain/data2vec_image.py:smoke"
    flags = [config, "--steps=2", *(f"--config.{k}={v}" for k, v in runs.SMALL.items()), "--json"]
    benchmark.main([*flags, "--input"])
    report = json.loads(capsys.readouterr().out)
    assert report["batches"] == 2 and "step_seconds" not in report
    rate = report["batch_size"] / report["batch_seconds"]
    assert report["examples_per_second"] == pytest.approx(rate) and rate > 0
    assert report["examples_per_core_second"] > 0
    benchmark.main([*flags, f"--trace={tmp_path}"])
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_numbered_folders_are_found_newest_first(trained):
    assert checkpoint.numbered(trained[0] / "checkpoints") == [2, 1]


def test_the_evaluation_batch_is_rounded_up_to_the_devices():
    config = runs.tiny({"eval.batch_size": "12"})
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    assert evaluate.batch_size(config, mesh) == 16


def test_embed_replaces_the_saved_data_whole(trained):
    args = argparse.Namespace(checkpoint=str(trained[0]), step=None)
    kept = embed.saved_config(args, ["loader.threads"]).data
    assert kept.kind == "synthetic"
    blank = embed.saved_config(args, ["data.dir"]).data
    assert (blank.kind, blank.name, blank.split, blank.fields.image) == ("", "", "train", "")
