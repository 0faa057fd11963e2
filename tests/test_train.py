"""The training loop in process: resume, guards, meshes, what a run writes."""

import importlib
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import runs
import sequences
from bivl import evaluate, train
from bivl.core import checkpoint
from bivl.core import config as configs
from bivl.core import state as states
from bivl.core.errors import GuardStop, Terminated, UserError
from bivl.data import pipeline, sources, tokenizers

pytestmark = pytest.mark.usefixtures("quick_compile")

SHALLOW = {"model.depth": "1", "top_k_layers": "1"}
EVERY_2 = {"checkpoint.every": "2"}
RANDOM = {
    "model.depth": "2",
    "batch_size": "16",
    "optimizer.accumulate": "2",
    "model.drop_path": "0.2",
    "model.attention_dropout": "0.1",
}
KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "ema_decay",
    "target_std",
    "prediction_std",
    "step_seconds",
    "data_wait_seconds",
    "examples_per_second",
    "records_replaced",
}


def small(changes=()):
    """The config of a run, with one layer: two where layers differ."""
    return runs.tiny(SHALLOW | dict(changes))


@pytest.fixture(scope="module")
def done(quick_compile, tmp_path_factory):
    """A finished run of 4 updates with checkpoints 2 and 4; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("done") / "run"
    return workdir, train.train(small(EVERY_2), workdir)


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(done[0], tmp_path / "run"))


def cut_to_2(workdir):
    """Makes a finished run one that was killed after the save at step 2."""
    shutil.rmtree(workdir / "checkpoints" / "4")


def tree_of_files(folder):
    """Every file with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_images(folder, count, colour=None):
    """PNG files of noise, or of one colour, in two class folders; returns their paths."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3)) if colour is None else np.full((32, 32, 3), 90)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def test_metrics_have_one_line_an_update_with_the_promised_keys(done):
    lines = runs.lines(done[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line.keys() >= KEYS
        assert all(np.isfinite(value) for value in line.values())
    assert lines[0]["learning_rate"] == 0 < lines[1]["learning_rate"]  # the warm-up's first steps
    assert lines[0]["ema_decay"] == pytest.approx(0.99, abs=1e-4)


def test_resume_gives_the_same_bits(done, copy):
    cut_to_2(copy)
    state = train.train(small(EVERY_2), copy)
    runs.assert_same(state, done[1])
    assert runs.without_times(runs.lines(copy)) == runs.without_times(runs.lines(done[0]))


def test_resume_gives_the_same_bits_with_randomness_and_other_workers(tmp_path):
    straight = train.train(small(EVERY_2 | RANDOM), tmp_path / "run")
    before = runs.lines(tmp_path / "run")
    assert len({line["loss"] for line in before}) == 4
    cut_to_2(tmp_path / "run")
    loader = {"loader.threads": "1", "loader.workers": "2"}
    state = train.train(small(EVERY_2 | RANDOM | loader), tmp_path / "run")
    runs.assert_same(state, straight)
    assert runs.without_times(runs.lines(tmp_path / "run")) == runs.without_times(before)


def test_a_finished_run_is_left_alone(copy, caplog):
    before = tree_of_files(copy)
    with caplog.at_level(logging.INFO, "bivl"):
        state = train.train(small(EVERY_2), copy)
    assert int(state.step) == 4
    assert tree_of_files(copy) == before
    assert "nothing to do" in caplog.text


def test_fewer_steps_than_done_change_no_checkpoint(copy):
    state = train.train(small(EVERY_2 | {"steps": "3"}), copy)
    assert int(state.step) == 4
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]


def test_a_resume_cuts_the_metrics_back(done, copy):
    cut_to_2(copy)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train.train(small(EVERY_2), copy)
    assert runs.losses(copy) == runs.losses(done[0])


def empty(step_dir):
    shutil.rmtree(step_dir)
    step_dir.mkdir()


def truncated(step_dir):
    for file in (step_dir / "state").rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])


def flipped(step_dir):
    """In every file, for of a save's files not all are read."""
    for file in (step_dir / "state").rglob("d/*"):
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 4, len(data) // 2):
            data[i] ^= 0x55
        file.write_bytes(data)


def without_manifest(step_dir):
    (step_dir / "state" / "manifest.ocdbt").unlink()


@pytest.mark.parametrize("damage", [empty, truncated, flipped, without_manifest])
def test_a_torn_newest_checkpoint_is_passed_over(done, copy, caplog, damage):
    damage(copy / "checkpoints" / "4")
    state = train.train(small(EVERY_2), copy)
    assert str(copy / "checkpoints" / "4") in caplog.text
    runs.assert_same(state, done[1])
    assert runs.losses(copy) == runs.losses(done[0])
    again = checkpoint.Checkpoints(copy / "checkpoints", 2)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    runs.assert_same(again.restore_newest(abstract), done[1])
    again.close()


def test_nothing_is_trained_where_every_checkpoint_is_torn(copy):
    for step in ("2", "4"):
        truncated(copy / "checkpoints" / step)
    before = tree_of_files(copy)
    with pytest.raises(UserError, match="can be read"):
        train.train(small(EVERY_2), copy)
    assert tree_of_files(copy) == before


# Other meshes, accumulation, scan and remat: the same losses.


@pytest.fixture(scope="module")
def one_device(quick_compile):
    """The first losses of one device, without and with dropout."""
    cases = {"still": ROWS, "dropout": ROWS | DROPOUT}
    return {name: runs.few_losses(1, changes)[0] for name, changes in cases.items()}


ROWS = {"batch_size": "16"}
SCAN = {"model.scan": "True"}
DROPOUT = {"model.drop_path": "0.2", "model.attention_dropout": "0.1"}


@pytest.mark.parametrize(
    "num_devices, changes",
    [
        (8, runs.mesh(8, 1, 1)),
        (8, runs.mesh(1, 8, 1) | DROPOUT),
        (8, runs.mesh(2, 2, 2) | DROPOUT),
        (8, runs.mesh(4, 2, 1) | {"optimizer.accumulate": "2", "model.remat": "dots"}),
        (1, SCAN | {"optimizer.accumulate": "4", "model.remat": "full"}),
    ],
    ids=["data", "fsdp", "all", "accumulate", "scan"],
)
def test_the_losses_are_those_of_one_device(one_device, num_devices, changes):
    """Measured: at most 5e-7 apart, a few float32 roundings."""
    expected = one_device["dropout" if "model.drop_path" in changes else "still"]
    assert len(set(expected[:, 0])) == 5
    found, _ = runs.few_losses(num_devices, ROWS | changes)
    np.testing.assert_allclose(found, expected, rtol=4e-6)


# Guards.


@pytest.mark.parametrize("rate", ["1e30", "1e15"])
def test_a_diverged_run_stops_with_a_finite_state(tmp_path, rate):
    config = small({"optimizer.learning_rate": rate, "steps": "20"})
    with pytest.raises(GuardStop, match="not|is (inf|nan)") as first:
        train.train(config, tmp_path)
    assert "learning_rate" in str(first.value)
    step = checkpoint.numbered(tmp_path / "checkpoints")[0]
    lines = runs.lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, step + 2))  # the last was refused
    with pytest.raises(GuardStop) as second:
        train.train(config, tmp_path)
    assert str(second.value) == str(first.value)
    assert checkpoint.numbered(tmp_path / "checkpoints")[0] == step
    assert runs.without_times(runs.lines(tmp_path)) == runs.without_times(lines)
    program = train.build(config)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    state = checkpoints.restore_newest(program.abstract)
    checkpoints.close()
    assert int(state.step) == step
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_constant_targets_stop_the_run_after_patience(tmp_path):
    """Images of one colour and no positions: every token has the same target."""
    write_images(tmp_path / "images", 4, colour=90)
    changes = {
        "data.kind": "folder",
        "data.dir": str(tmp_path / "images"),
        "augment.color_jitter": "0,0,0",
        "model.positions": "none",
        "guard.after": "1",
        "guard.patience": "3",
        "steps": "20",
    }
    with pytest.raises(GuardStop, match="target_std .* until step 4.*learning_rate"):
        train.train(small(changes), tmp_path / "run")
    # Update 5 ran while the metrics of update 4 were read, so it is saved and has its line.
    assert checkpoint.numbered(tmp_path / "run" / "checkpoints") == [5]
    assert list(runs.losses(tmp_path / "run")) == [1, 2, 3, 4, 5]
    with pytest.raises(GuardStop, match="until step 8"):
        train.train(small(changes), tmp_path / "run")
    assert list(runs.losses(tmp_path / "run")) == list(range(1, 10))


# Starts.


def test_no_steps_write_the_untrained_model(done, tmp_path, caplog):
    state = train.train(small({"steps": "0"}), tmp_path)
    assert checkpoint.numbered(tmp_path / "checkpoints") == [0]
    program = train.build(small())
    fresh = states.create(program.objective, program.tx, program.mesh, 0)
    runs.assert_same(state, fresh)
    assert runs.lines(tmp_path) == []
    with caplog.at_level(logging.INFO, "bivl"):
        train.train(small({"steps": "0"}), tmp_path)
    assert "nothing to do" in caplog.text
    runs.assert_same(train.train(small(EVERY_2), tmp_path), done[1])  # and it trains on


def test_init_takes_the_parameters_of_a_checkpoint(done, tmp_path):
    changes = {"init": str(done[0]), "steps": "0", "seed": "7"}
    state = train.train(small(changes), tmp_path)
    assert int(state.step) == 0
    runs.assert_same(state.params, done[1].params)
    runs.assert_same(state.teacher, done[1].params)  # its own first teacher
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_a_run_stands_without_the_checkpoint_it_came_from(copy, tmp_path):
    changes = {"init": str(copy), "steps": "0"}
    train.train(small(changes), tmp_path / "fine")
    shutil.rmtree(copy)
    train.train(small(changes), tmp_path / "fine")


def test_an_init_of_another_patch_is_refused_with_both_shapes(done, tmp_path):
    changes = {"init": str(done[0]), "model.patch_size": "4"}
    words = r"embed/patch/projection/kernel has shape .*, this config wants \(4, 4"
    with pytest.raises(UserError, match=words):
        train.train(small(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_init_that_does_not_fit_is_refused_before_anything_is_written(done, tmp_path):
    """Neither the width nor the bias table, which depends on heads and patches, is the same."""
    changes = {"init": str(done[0]), "model.width": "64", "model.num_heads": "4"}
    changes |= {"model.mlp_dim": "128", "model.depth": "4"}
    with pytest.raises(UserError, match="no parameter of checkpoint"):
        train.train(small(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Data.


def test_corrupt_images_are_replaced_counted_and_named_once(tmp_path, caplog):
    paths = write_images(tmp_path / "images", 12)
    bad = paths[2:5]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    changes = {"data.kind": "folder", "data.dir": str(tmp_path / "images")}
    config = small(changes)
    train.train(config, tmp_path / "run")
    named = re.findall(r"cannot decode (\S+)", caplog.text)
    assert set(named) == {str(path) for path in bad}
    assert len(named) <= len(bad) + 1  # the check of one example before the run may meet one too
    counted = [line["records_replaced"] for line in runs.lines(tmp_path / "run")]
    ops = train.build(config).objective.train_ops
    options = {"seed": 0, "batch_size": 8, "rows": range(8), "start": 0}
    batches = pipeline.train_batches(sources.open_source(config.data), ops, **options)
    assert counted == [next(batches)[1] for _ in counted]
    batches.close()
    assert 6 <= sum(counted) <= 9  # 32 examples are 2 epochs of 12 records and 8 more
    assert runs.lines(tmp_path / "run")[-1]["loss"] > 0


def test_counts_gather_between_lines(tmp_path, caplog):
    paths = write_images(tmp_path / "images", 8)
    paths[0].write_bytes(b"no image")
    changes = {"data.kind": "folder", "data.dir": str(tmp_path / "images"), "log_every": "2"}
    train.train(small(changes), tmp_path / "run")
    lines = runs.lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["records_replaced"] for line in lines] == [2, 2]  # one in every epoch of 8


# Evaluations and whole configs.


def test_the_smoke_run_trains_and_evaluates(tmp_path):
    changes = {"steps": "20", "evaluators": "knn", "evaluate_every": "10", "batch_size": "16"}
    changes |= {"data.num_examples": "64", "checkpoint.every": "10"}
    state = train.train(small(changes), tmp_path)
    assert int(state.step) == 20
    losses = list(runs.losses(tmp_path).values())
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    evaluations = runs.lines(tmp_path, "evaluations")
    assert [line["step"] for line in evaluations] == [10, 20]
    assert all(0 <= line["knn/accuracy"] <= 1 for line in evaluations)
    # An evaluation that was killed, in the middle or at the end, is made up for, once.
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    (tmp_path / "evaluations.jsonl").write_text("")
    train.train(small(changes), tmp_path)
    assert runs.lines(tmp_path, "evaluations") == evaluations
    (tmp_path / "evaluations.jsonl").write_text('{"step": 10}\n{"st')
    train.train(small(changes), tmp_path)
    assert runs.lines(tmp_path, "evaluations") == [{"step": 10}, evaluations[1]]


def test_sigterm_ends_an_evaluation_which_is_made_up_for(done, copy, monkeypatch):
    """Killed while it evaluates after the last update."""
    changes = EVERY_2 | {"evaluators": "knn"}

    def killed(params, extras):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(evaluate, "build", lambda *args: killed)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="saved at step 4"):
        train.train(small(changes), copy)
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setattr(evaluate, "build", lambda *args: lambda params, extras: {"made/up": 1.0})
    train.train(small(changes), copy)
    assert runs.lines(copy, "evaluations") == [{"step": 4, "made/up": 1.0}]
    assert runs.lines(copy) == runs.lines(done[0])


def shipped():
    """Every `FILE.py:size=...` under configs/."""
    for file in sorted(Path("configs").rglob("*.py")):
        name = ".".join(file.with_suffix("").parts)
        module = importlib.import_module(name)
        if hasattr(module, "get_config"):
            for size in getattr(module, "SIZES", [None]):
                yield f"{file}:size={size}" if size else str(file)
            yield f"{file}:smoke"


def lend_teacher(config):
    """Gives a config without a frozen teacher one that has learned nothing, on the same patches."""
    if not config.get("teacher") or config.teacher.random:
        return
    size = "size=tiny" if config.image_size <= 64 else "size=base"
    names = ("data2vec_image",) if config.objective == "vqkd" else ("data2vec_image", "vqkd")
    found = None
    for name in names:
        made = configs.load(f"configs/pretrain/{name}.py:{size}")
        with made.unlocked():
            made.image_size = config.image_size // config.model.patch_size * made.model.patch_size
            if found:
                made.teacher.random, made.teacher.config = True, found.to_dict()
        found = made
    with config.unlocked():
        config.teacher.random, config.teacher.config = True, found.to_dict()


@pytest.mark.parametrize("spec", list(shipped()))
def test_every_config_initialises_abstractly(spec, monkeypatch):
    """On the two axes that divide parameters."""
    shape = (1, 4, 2)
    lent = {  # RoBERTa's, BEiT-3's, CLIP's and BERT's, the files of which nobody ships
        "bpe": sequences.Tokenizer(size=50_265, mask=50_264),
        "xlmr": sequences.Tokenizer(size=64_002, mask=64_001),
        "clip": sequences.Tokenizer(size=49_408, mask=49_407, bos=49_406, eos=49_407),
        "wordpiece": sequences.Tokenizer(size=30_522, mask=103, bos=101, pad=0, eos=102),
    }
    real = tokenizers.load
    monkeypatch.setattr(tokenizers, "load", lambda c: lent.get(c.kind) or real(c))
    config = configs.load(spec)
    lend_teacher(config)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    program = train.build(config)
    whole = divided = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(program.abstract.params)[0]:
        name = jax.tree_util.keystr(path)
        if "image_trunk" in name and config.model.get("trunk") == "efficientnet":
            continue  # is whole everywhere: its channels divide by nothing
        # Vocabularies divide by nothing, widths by FSDP.
        if "words" in name or max(leaf.shape, default=0) >= 8192:
            parts = leaf.size / np.prod(leaf.sharding.shard_shape(leaf.shape))
            assert parts == (shape[1] if leaf.ndim > 1 else 1)
            continue
        whole += leaf.size
        divided += np.prod(leaf.sharding.shard_shape(leaf.shape))
    assert divided < whole / (shape[1] * shape[2]) * 1.5  # FSDP and tensor axes really divide
    assert set(program.objective.spec) == set(program.example_batch())
