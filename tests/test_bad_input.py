"""Bad input ends with one line that names it, exit code 2, and nothing written."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from bivl import benchmark, embed, evaluate, train
from bivl.core import checkpoint, cli, sharding
from bivl.core import config as configs
from bivl.core import workdir as workdirs
from bivl.data import sources
from bivl.data.table import ArrayRows, Column, Table

CONFIG = str(Path(__file__).parents[1] / "configs/pretrain/data2vec_image.py")
TINY = {
    "image_size": "32",
    "model.width": "32",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "batch_size": "8",
    "evaluators": "",
    "steps": "2",
}


def arguments(options="smoke", **changes):
    """--config and the overrides of a tiny run; `a__b` in `changes` means a.b."""
    given = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config={CONFIG}:{options}", *(f"--config.{k}={v}" for k, v in given.items())]


def processes(coordinator, count, index):
    """The flags of one of several processes."""
    flags = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture
def fails(capsys):
    """fails(main, argv): runs a command, checks its manners, returns its one line of stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(main, argv):
        with pytest.raises(SystemExit) as stop:
            cli.run(main, argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2, out + err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in out + err
        return err

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def listing(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}


# words that the line must hold: changes to the tiny run
TRAIN = {
    "typo": (["config.optimizer has no key", "learning_rate?"], {"optimizer.learning_rat": "1"}),
    "group": (["config.optimizer is a group"], {"optimizer": "1"}),
    "below a value": (["config.seed is one value"], {"seed.x": "1"}),
    "text for a number": (
        ["config.optimizer.learning_rate='fast'"],
        {"optimizer.learning_rate": "fast"},
    ),
    "nan": (["config.optimizer.learning_rate=nan"], {"optimizer.learning_rate": "nan"}),
    "negative": (["config.optimizer.learning_rate=-0.1"], {"optimizer.learning_rate": "-0.1"}),
    "fraction for a whole number": (["config.steps='1.5'"], {"steps": "1.5"}),
    "too large": (["config.seed=4294967296"], {"seed": "4294967296"}),
    "no true or false": (["config.model.scan='maybe'"], {"model.scan": "maybe"}),
    "unknown data kind": (["data.kind 'emojis'", "emoji"], {"data.kind": "emojis"}),
    "no data dir": (["data.dir is empty"], {"data.kind": "folder"}),
    "missing data dir": (["data.dir=/no/such"], {"data.kind": "folder", "data.dir": "/no/such"}),
    "unprepared data": (["data.name", "mnist"], {"data.kind": "tfds", "data.name": "mnist"}),
    "unknown split": (["data.split", "'trian'"], {"data.split": "trian"}),
    "split syntax": (["data.split='train[10%'"], {"data.split": "train[10%"}),
    "unknown field": (["data.fields.image", "'pixels'"], {"data.fields.image": "pixels"}),
    "field of another kind": (["data.fields.label='text'"], {"data.fields.label": "text"}),
    "indivisible batch": (["config.batch_size=12", "use 16"], {"batch_size": "12"}),
    "no batch": (["config.batch_size=0", "use 8"], {"batch_size": "0"}),
    "indivisible accumulation": (["optimizer.accumulate"], {"optimizer.accumulate": "3"}),
    "no accumulation": (["config.optimizer.accumulate=0"], {"optimizer.accumulate": "0"}),
    "mesh too large": (["16 devices", "there are 8"], {"mesh.data": "16"}),
    "two open mesh sizes": (["at most one -1"], {"mesh.fsdp": "-1"}),
    "mesh of nothing": (["must be positive"], {"mesh.tensor": "0"}),
    "indivisible heads": (
        ["params/embed/relative_position/table", "'heads' of size 2", "config.mesh.tensor"],
        {"mesh.tensor": "8"},
    ),
    "heads and width": (["config.model.width=32", "num_heads=3"], {"model.num_heads": "3"}),
    "no heads": (["config.model.num_heads=0"], {"model.num_heads": "0"}),
    "no patch": (["model.patch_size=0"], {"model.patch_size": "0"}),
    "image and patch": (["config.image_size=33"], {"image_size": "33"}),
    "nothing masked": (["config.mask_ratio=0"], {"mask_ratio": "0"}),
    "blocks that never fit": (["config.masking", "(4, 4) patches"], {"masking.min_block": "40"}),
    "unknown masking": (["config.masking.kind 'blocks'", "'block'"], {"masking.kind": "blocks"}),
    "settings of other masking": (["config.masking", "min_block"], {"masking.kind": "random"}),
    "too much masked": (["config.mask_ratio=1.5"], {"mask_ratio": "1.5"}),
    "unknown schedule": (["config.optimizer.schedule='cosin'"], {"optimizer.schedule": "cosin"}),
    "phases": (["config.optimizer.phases"], {"optimizer.phases": "0.5,0.5"}),
    "broken regex": (["config.optimizer.no_decay='('"], {"optimizer.no_decay": "("}),
    "beta": (["config.optimizer.beta2=1"], {"optimizer.beta2": "1"}),
    "unknown evaluator": (["config.evaluators='knnn'", "'knn'"], {"evaluators": "knnn"}),
    "evaluator's helper": (["config.evaluators='features'"], {"evaluators": "knn,features"}),
    "evaluator elsewhere": (["config.evaluators='..core.cli'"], {"evaluators": "..core.cli"}),
    "evaluator's key": (["config.eval.knn has no key 'neighbours'"], {"eval.knn.neighbours": "3"}),
    "evaluator's value": (["config.eval.knn.k is 0"], {"eval.knn.k": "0", "evaluators": "knn"}),
    "evaluation data": (
        ["eval_data.test.split", "'exam'"],
        {"eval_data.test.split": "exam", "evaluators": "knn"},
    ),
    "no evaluation data": (
        ["eval_data.train.dir is empty"],
        {"eval_data.train.kind": "folder", "evaluators": "knn"},
    ),
    "too many layers": (["config.top_k_layers=3", "model.depth=2"], {"top_k_layers": "3"}),
    "decay over one": (["config.ema_decay_end=1.5"], {"ema_decay_end": "1.5"}),
    "unknown dtype": (["config.dtype='float31'"], {"dtype": "float31"}),
    "unknown teacher dtype": (["config.teacher_dtype='int8'"], {"teacher_dtype": "int8"}),
    "unknown remat": (["config.model.remat='some'"], {"model.remat": "some"}),
    "unknown norm": (["config.model.norm='rms'"], {"model.norm": "rms"}),
    "unknown biases": (["config.model.qkv_bias='k'"], {"model.qkv_bias": "k"}),
    "unknown positions": (["config.model.positions='rope'"], {"model.positions": "rope"}),
    "drop path": (["config.model.drop_path=1"], {"model.drop_path": "1"}),
    "unknown target": (["config.target.layer='middle'"], {"target.layer": "middle"}),
    "unknown target norm": (["config.target.norms='rms'"], {"target.norms": "layer,rms"}),
    "unknown reduction": (["config.loss.reduction='max'"], {"loss.reduction": "max"}),
    "loss scale": (["config.loss.scale='big'"], {"loss.scale": "big"}),
    "crop": (["config.augment.scale"], {"augment.scale": "0.5"}),
    "no crop": (["config.augment.crop_ratio=0"], {"augment.crop_ratio": "0"}),
    "jitter of texts": (["config.augment.color_jitter"], {"augment.color_jitter": "a,b,c"}),
    "never logged": (["config.log_every=0"], {"log_every": "0"}),
    "unknown objective": (["config.objective='data3vec'", "data2vec"], {"objective": "data3vec"}),
    "objective elsewhere": (["config.objective='..core.cli'"], {"objective": "..core.cli"}),
    "objective's path": (["config.objective='../train'"], {"objective": "../train"}),
    "unknown modality": (["config.modality='smell'"], {"modality": "smell"}),
    "modality's package": (["config.modality='__init__'"], {"modality": "__init__"}),
    "no init": (["checkpoint /no/such does not exist"], {"init": "/no/such"}),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, fails, tmp_path):
    words, changes = TRAIN[case]
    workdir = tmp_path / "run"
    line = fails(train.main, [*arguments(**changes), f"--workdir={workdir}"])
    assert all(word in line for word in words), line
    assert not workdir.exists()


CONFIGS = {
    "missing": ("/no/such.py", None, "does not exist"),
    "folder": ("", None, "does not exist"),
    "not python": ("recipe.yaml", "steps: 3", "not a Python file"),
    "syntax": ("recipe.py", "def get_config(:\n", "SyntaxError"),
    "bytes": ("recipe.py", "\0\0", "correct the file"),
    "raises": ("recipe.py", "def get_config(options):\n    1 / 0\n", "ZeroDivisionError"),
    "exits": ("recipe.py", "raise SystemExit('bye')", "bye"),
    "has no function": ("recipe.py", "x = 1\n", "get_config"),
    "gives a dict": ("recipe.py", "def get_config(options):\n    return {}\n", "ConfigDict"),
    "gives nothing": (
        "recipe.py",
        "import ml_collections\nget_config = ml_collections.ConfigDict\n",
        "has no key 'objective'",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_unusable_config_file(case, fails, tmp_path):
    name, text, words = CONFIGS[case]
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    line = fails(train.main, [f"--config={file}", f"--workdir={tmp_path / 'run'}"])
    assert words in line and str(file) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", [train, benchmark])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("smok", "'smok' is unknown"),
        ("size=enormous", "size=enormous is unknown"),
        ("size", "size"),
    ],
)
def test_unknown_option(program, options, words, fails, tmp_path):
    extra = [f"--workdir={tmp_path / 'run'}"] if program is train else []
    assert words in fails(program.main, [f"--config={CONFIG}:{options}", *extra])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workdri=x"], "--workdir"),
        ([], "required: --workdir"),
        (["--workdir=x", "--wrokdir=x"], "did you mean --workdir?"),
        (["--workdir=x", "stray"], "flag stray is unknown"),
        (["--workdir=x", "--config.steps"], "--config.steps has no value"),
        (["--workdir=x", "--config.init", "--config.seed=1"], "--config.init has no value"),
        (["--workdir=x", "--num_processes=two"], "--num_processes"),
        (["--workdir=x", "--num_processes=2"], "together"),
        (["--workdir=x", *processes("host:80", 2, 2)], "--process_id=2 must lie in [0, 2)"),
        (["--workdir=x", *processes("host", 2, 0)], "--coordinator=host must be HOST:PORT"),
        (["--workdir=", "--config.steps=1"], "--workdir is empty"),
    ],
)
def test_flags(argv, words, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(train.main, [*arguments(), *argv])
    assert not any(tmp_path.iterdir())


def test_config_is_missing(fails, tmp_path):
    assert "--config is missing" in fails(train.main, [f"--workdir={tmp_path / 'run'}"])


def test_wandb_that_is_not_installed(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    argv = [*arguments(wandb="project"), f"--workdir={tmp_path / 'run'}"]
    assert "config.wandb='project' needs wandb" in fails(train.main, argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["file", "file/below/it"])
def test_workdir_in_a_file(name, fails, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "is a file" in fails(train.main, [*arguments(), f"--workdir={tmp_path / name}"])
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("content", ["empty", "corrupt", "damaged tfds"])
def test_unusable_data_folder(content, fails, tmp_path):
    data, changes = tmp_path / "data", {"data.kind": "folder"}
    (data / "train" / "cat").mkdir(parents=True)
    words = "holds no images"
    if content == "corrupt":
        for i in range(3):
            (data / "train" / "cat" / f"{i}.png").write_bytes(b"\x89PNG nothing else")
        words = "none of the 3 records can be decoded"
    if content == "damaged tfds":
        changes, words = {"data.kind": "tfds", "data.name": "cats"}, "data.name"
    argv = arguments(**changes, **{"data.dir": str(data)})
    line = fails(train.main, [*argv, f"--workdir={tmp_path / 'run'}"])
    assert words in line and str(data) in line.replace("data.dir and", str(data))
    assert not (tmp_path / "run").exists()


def test_data_without_images(fails, tmp_path, monkeypatch):
    texts = Table("texts", {"text": Column("text")}, lambda wanted: ArrayRows({"text": ["a", "b"]}))
    monkeypatch.setitem(sources.KINDS, "texts", lambda config: texts)
    argv = [*arguments(**{"data.kind": "texts"}), f"--workdir={tmp_path / 'run'}"]
    assert "set config.data.fields.image" in fails(train.main, argv)
    assert not (tmp_path / "run").exists()


def zeros(leaf):
    """A state needs no compiling where its numbers do not matter."""
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run with one checkpoint, of step 0."""
    config = configs.load(f"{CONFIG}:smoke")
    configs.override(config, list(TINY.items()))
    workdir = tmp_path_factory.mktemp("finished") / "run"
    configs.override(config, [("mesh.data", "1")])  # one device is quicker than eight
    program = train.build(config, jax.devices()[:1])
    configs.override(config, [("mesh.data", "-1")])
    with sharding.use(program.mesh):
        state = jax.tree.map(zeros, program.abstract)
        workdirs.claim(workdir, config)
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 2)
        checkpoints.save(0, state, config, wait=True)
        checkpoints.close()
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished` that a test may damage."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.width": "64"}, "config.model.width is 64 but the run in"),
        ({"seed": "1"}, "config.seed is 1"),
        ({"data.split": "train[:50%]"}, "config.data.split"),
    ],
)
def test_resume_of_another_run(changes, words, fails, finished):
    before = listing(finished)
    assert words in fails(train.main, [*arguments(**changes), f"--workdir={finished}"])
    assert listing(finished) == before


@pytest.mark.parametrize("text", ["{", "[1]", "3", ""])
def test_unreadable_config_of_a_run(text, fails, copied):
    (copied / "config.json").write_text(text)
    before = listing(copied)
    assert "config.json cannot be read" in fails(train.main, [*arguments(), f"--workdir={copied}"])
    assert listing(copied) == before


def test_init_without_a_checkpoint(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    argv = [*arguments(init=str(tmp_path / "empty")), f"--workdir={tmp_path / 'run'}"]
    assert "has no finished checkpoint" in fails(train.main, argv)
    assert not (tmp_path / "run").exists()


def test_init_of_another_architecture(fails, finished, tmp_path):
    """Width, depth, patch and grid differ, so that no parameter fits."""
    other = {"model.width": "48", "model.depth": "3", "model.num_heads": "3"}
    other |= {"model.positions": "none", "init": str(finished)}
    argv = [*arguments(**other), f"--workdir={tmp_path / 'run'}"]
    assert "no parameter of checkpoint" in fails(train.main, argv)
    assert not (tmp_path / "run").exists()


CHECKPOINTS = {
    "missing": "does not exist",
    "empty": "has no finished checkpoint",
    "file": "has no finished checkpoint",
    "no such step": "has no checkpoint of step 7; it has [0]",
    "torn": "has no finished checkpoint",
    "unreadable config": "the config saved in",
    "config of nothing": "has no key 'objective'",
    "config of another kind": "the config saved in",
    "another architecture": "params/embed/",
    "typo": "config.data has no key 'knd'; did you mean config.data.kind?",
    "unknown data": "data.kind 'nothing'",
}


def damage(case, workdir):
    """Makes the checkpoint what `case` says; returns the further arguments."""
    step = workdir / "checkpoints" / "0"
    saved = step / "config" / "metadata"
    if case in ("missing", "empty", "file"):
        shutil.rmtree(workdir)
    if case == "empty":
        workdir.mkdir()
    if case == "file":
        workdir.write_text("")
    if case == "torn":
        (step / "state" / "_METADATA").unlink()
    if case == "unreadable config":
        saved.write_text(saved.read_text()[:-20])
    if case == "config of nothing":
        saved.write_text("{}")
    if case == "config of another kind":
        saved.write_text(json.dumps([1, 2]))
    return {
        "no such step": ["--step=7"],
        "another architecture": arguments(**{"model.width": "48", "model.num_heads": "3"}),
        "typo": ["--config.data.knd=emoji"],
        "unknown data": ["--config.data.kind=nothing", "--config.evaluators=knn"],
    }.get(case, [])


@pytest.mark.parametrize("program", [evaluate, embed])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_unusable_checkpoint(program, case, fails, copied, tmp_path):
    argv = [f"--checkpoint={copied}", *damage(case, copied)]
    before = listing(tmp_path)
    if program is embed:
        argv.append(f"--out={tmp_path / 'vectors.npz'}")
    assert CHECKPOINTS[case] in fails(program.main, argv)
    assert listing(tmp_path) == before


def test_evaluate_names_the_split_that_is_missing(fails, finished, tmp_path):
    """Of class folders without test/; and what it advises works."""
    photos = tmp_path / "photos"
    (photos / "all").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(photos / "all" / "one.png")
    data = ["--config.data.kind=folder", f"--config.data.dir={photos}"]
    argv = [f"--checkpoint={finished}", "--config.evaluators=knn", *data]
    line = fails(evaluate.main, argv)
    assert line.startswith("error: eval_data.test.split='test': ") and "train[:90%]" in line
    config = checkpoint.read_config(checkpoint.find(finished))
    changes = {"data.kind": "folder", "data.dir": str(photos)}
    configs.override(config, list((changes | {"eval_data.test.split": "train[:90%]"}).items()))
    assert len(evaluate.open_split(config, "test")) == 1


@pytest.mark.parametrize(
    ("out", "words"),
    [("vectors.npy", "must end in .npz"), ("none/vectors.npz", "its folder must exist")],
)
def test_embed_needs_a_place(out, words, fails, finished, tmp_path):
    argv = [f"--checkpoint={finished}", f"--out={tmp_path / out}"]
    assert words in fails(embed.main, argv)
    assert not any(tmp_path.iterdir())


def test_evaluate_needs_a_place(fails, finished, tmp_path):
    (tmp_path / "file").write_text("kept")
    argv = [f"--checkpoint={finished}", f"--out={tmp_path / 'file'}", "--config.evaluators=knn"]
    assert "lies in a file" in fails(evaluate.main, argv)
    assert (tmp_path / "file").read_text() == "kept"
