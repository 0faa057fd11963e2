"""The notebooks of colab/: their form, and every cell run from top to bottom on small settings."""

import ast
import functools
import importlib.util
import json
import logging
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import runs
from bivl import train
from bivl.core import config as configs
from bivl.data import mixture, sources

FOLDER = Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|work|Users)\b")
SMALL = {
    "model.width": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_dim": 64,
    "image_size": 32,
    "batch_size": 24,
    "steps": 3,
    "log_every": 1,
    "optimizer.warmup_steps": 1,
}
PAIRS = SMALL | {"model.depth": 1, "pair.length": 16, "model.text_rows": 34, "contrast.width": 16}
STREAMS = PAIRS | {"text.length": 32, "top_k_layers": 1, "evaluators": "pictures"}


def read(name):
    """A notebook as JSON."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name):
    """{id: source} of the code cells, in order."""
    cells = read(name)["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "code"}


def flags(settings):
    """Dotted keys with values -> the flags of a command line."""
    return [f"--config.{key}={value}" for key, value in settings.items()]


class Notebook:
    """Runs cells as Jupyter does: in one namespace, a last expression shown, figures shown and
    closed behind each cell."""

    def __init__(self, name, settings):
        """`settings` are assigned at the end of the cell tagged `parameters`."""
        self.cells, self.pictures, self.running = code_cells(name), {}, ""
        (parameters,) = (c["id"] for c in read(name)["cells"] if "parameters" in tags(c))
        known = {}
        exec(self.cells[parameters], known)
        for key, value in settings.items():
            assert type(known[key]) is type(value), f"{name} has no such setting {key}"
            self.cells[parameters] += f"\n{key} = {value!r}"
        self.space = {"__name__": "__main__", "display": self.show}

    def show(self, value):
        """Keeps what is a picture, as uint8 [H, W, 3], under the id of its cell."""
        if isinstance(value, Image.Image):
            self.pictures.setdefault(self.running, []).append(np.asarray(value.convert("RGB")))

    def run(self, name):
        """One cell."""
        self.running, tree = name, ast.parse(self.cells[name])
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"<{name}>", "exec"), self.space)
        if last:
            code = compile(ast.Expression(last.value), f"<{name}>", "eval")
            self.show(eval(code, self.space))
        for number in plt.get_fignums():
            figure = plt.figure(number)
            figure.set_dpi(40)
            figure.canvas.draw()
            self.show(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())))
        plt.close("all")

    def drawn(self):
        """{cell: how many pictures}, all of which must have something on them."""
        for name, pictures in self.pictures.items():
            assert all(len(np.unique(x.reshape(-1, 3), axis=0)) > 20 for x in pictures), name
        return {name: len(pictures) for name, pictures in self.pictures.items()}


def tags(cell):
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


@pytest.fixture
def desk(quick_compile, monkeypatch, tmp_path):
    """An empty folder to work in, one device, no screen; afterwards logs are as they were."""
    monkeypatch.setattr(train, "build", functools.partial(train.build, devices=jax.devices()[:1]))
    monkeypatch.chdir(tmp_path)
    loggers = logging.getLogger(), logging.getLogger("bivl")
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    plt.switch_backend("agg")
    yield tmp_path
    plt.close("all")
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_there_are_notebooks():
    assert NOTEBOOKS == ["masks_and_targets", "quickstart"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_bare(name):
    book = read(name)
    assert book["nbformat"] == 4 and book["nbformat_minor"] >= 5
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,63}", x) for x in ids), "ids are names that stay"
    common = {"cell_type", "id", "metadata", "source"}
    for cell in book["cells"]:
        code = cell["cell_type"] == "code"
        assert code or cell["cell_type"] == "markdown"
        assert cell.keys() == common | ({"outputs", "execution_count"} if code else set())
        assert not code or (cell["outputs"] == [] and cell["execution_count"] is None)
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not MACHINE_PATH.search("".join(cell["source"]))
    assert [cell["id"] for cell in book["cells"] if tags(cell) == ["parameters"]] == ["settings"]
    settings = ast.parse(code_cells(name)["settings"]).body
    assert all(isinstance(line, ast.Assign) and ast.literal_eval(line.value) is not None
               for line in settings)  # fmt: skip
    if importlib.util.find_spec("nbformat"):
        import nbformat

        nbformat.validate(book)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_written_so_that_differences_can_be_read(name):
    text = json.dumps(read(name), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == text


def test_quickstart_runs_and_finds_emoji_by_words_and_by_pictures(desk, capsys):
    emoji = sources.open_source({"kind": "emoji", "split": "test"})
    (desk / "mine").mkdir()
    (desk / "mine" / "notes.txt").write_text("no picture")
    chosen = [3, 250]
    for place in chosen:
        (desk / "mine" / f"{place:03}.png").write_bytes(emoji[place]["image"])
    settings = {"PRETRAINING_CHANGES": flags(STREAMS), "IMAGES": "mine", "RUNS": "here"}
    settings["TUNING_CHANGES"] = flags(PAIRS | {"evaluators": "retrieval"})
    notebook = Notebook("quickstart", settings)
    for name in notebook.cells:
        notebook.run(name)
    drawn = notebook.drawn()
    assert drawn.keys() == {"curves", "pictures", "tuned-pictures", "search", "own"}
    assert drawn["pictures"] >= 2 and drawn["tuned-pictures"] == 1

    here = desk / "here"
    for run in ("pretrained", "tuned"):
        assert [line["step"] for line in runs.lines(here / run)] == [1, 2, 3]
    assert json.loads((here / "tuned" / "config.json").read_text())["init"] == "here/pretrained"
    space = notebook.space
    assert space["gallery"].shape == (399, 16)
    np.testing.assert_allclose(np.linalg.norm(space["gallery"], axis=1), 1, rtol=1e-5)
    answers, near = space["answers"], np.asarray(space["vectors"]) @ space["gallery"].T
    assert answers.shape == (len(space["QUESTIONS"]), 8)
    expected = -np.sort(-near, axis=1)[:, :8]
    np.testing.assert_allclose(np.take_along_axis(near, answers, 1), expected, rtol=1e-5)
    assert space["likes"][:, 0].tolist() == chosen, "a picture is most like itself"

    before = (here / "pretrained" / "metrics.jsonl").read_text()
    capsys.readouterr()
    notebook.run("pretrain")
    assert "nothing to do" in capsys.readouterr().out
    assert (here / "pretrained" / "metrics.jsonl").read_text() == before


def test_own_images_and_texts_are_read_as_quickstart_says(tmp_path):
    """The flags that its last cell names, in the config that it trains."""
    last = "".join(read("quickstart")["cells"][-1]["source"])
    flags = re.findall(r'"--config\.(data\.[\w.]+)=(\w+)"', last)
    for name in ("PHOTOS/all", "TEXTS"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "PHOTOS" / "all" / "one.png")
    (tmp_path / "TEXTS" / "one.txt").write_text("A text.\n")
    config = configs.load("configs/quickstart.py")
    place = {name: str(tmp_path / name) for name in ("PHOTOS", "TEXTS")}
    configs.override(config, [(key, place.get(value, value)) for key, value in flags])
    opened = mixture.open_all(config)
    assert {name: len(opened[name]) for name in ("images", "texts")} == {"images": 1, "texts": 1}
    assert len(flags) == 4 and len(opened["pairs"]) == 1507


def test_masks_and_targets_shows_what_it_says(desk):
    small = SMALL | {"top_k_layers": 2, "batch_size": 8}
    settings = {"EMOJI": 3, "DRAWS": 20, "CHANGES": flags(small), "RUN": "here"}
    notebook = Notebook("masks_and_targets", settings)
    for name in notebook.cells:
        notebook.run(name)
    wanted = ("images", "clones", "share", "speech", "layers", "targets")
    assert notebook.drawn() == dict.fromkeys(wanted, 1)

    space = notebook.space
    shares = [share.mean() for share in space["often"].values()]
    np.testing.assert_allclose(shares, (119.5 / 196, 75 / 196, 157 / 196, 147 / 196), atol=0.006)
    for name, share in zip(space["masked"], shares, strict=True):
        grey = np.mean([np.all(x == 160, axis=-1).mean() for x in space["masked"][name]])
        assert abs(grey - share) < 0.05, name
    assert len({x.tobytes() for x in space["clones"]}) == 16
    plain = space["TEXT"]
    for name, texts in space["masked_texts"].items():
        for text in texts:
            assert len(text) == len(plain) and "░" in text, name
            assert all(a == b or a in "░?" for a, b in zip(text, plain, strict=True))
    assert len({len(texts) for texts in space["masked_texts"].values()}) == 2  # clones, or not
    assert len(space["by_layer"]) == 3 and len(space["targets"]) == 2 + 3
    assert all(y.shape == (3, 16, 32) for y in space["targets"].values())
    for std, rank, position in space["numbers"].values():
        assert std > 0 and 1 <= rank <= 32 and 0 <= position <= 1


@pytest.fixture
def install():
    """colab/install.py as a module."""
    spec = importlib.util.spec_from_file_location("colab_install", FOLDER / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_install_pins_what_is_there_and_asks_for_what_is_not(install):
    here = {"jax": "0.7.2", "jaxlib": "0.7.2", "array-record": "0.8.3"}
    lines = ["# why", "", "array-record>=0.8.6,<0.9", "clu>=0.0.12,<0.1 # timings", "jax>=0.10.2"]
    wanted = ["array-record==0.8.3", "clu>=0.0.12,<0.1", "jax==0.7.2", "jaxlib==0.7.2"]
    assert install.plan(lines, here.get) == wanted
    assert install.plan(["jax>=1"], {}.get) == ["jax>=1"]


@pytest.mark.parametrize(
    ("protobuf", "metadata", "asked"),
    [("5.29.6", "1.21.0", True), ("5.29.6", "1.17.3", False), ("7.35.1", "1.21.0", False)],
)
def test_install_exchanges_what_cannot_be_imported(install, protobuf, metadata, asked):
    found = install.plan([], {"protobuf": protobuf, "tensorflow-metadata": metadata}.get)
    assert found == ["tensorflow-metadata<1.18"] * asked


def test_install_calls_pip_only_for_what_is_missing(install, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    install.main()
    assert not calls and f"jax=={jax.__version__}" in capsys.readouterr().out
    version = install.installed
    monkeypatch.setattr(install, "installed", lambda x: None if x == "jiwer" else version(x))
    install.main()
    (command,) = calls
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert f"jax=={jax.__version__}" in command and f"jaxlib=={version('jaxlib')}" in command
    assert [word for word in command if word.startswith("jiwer")] == ["jiwer>=4.0.0,<5"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_install_cell_in_colab(name, monkeypatch, tmp_path):
    """Clones where nothing is there yet, runs colab/install.py and makes bivl importable."""
    source, calls = code_cells(name)["install"], []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    there = {"REPOSITORY": "", "CHECKOUT": str(FOLDER.parent)}
    exec(source, there)
    assert calls == [[sys.executable, str(FOLDER / "install.py")]]
    assert sys.path[0] == str(FOLDER.parent)
    nowhere = {"REPOSITORY": "", "CHECKOUT": str(tmp_path / "bivl")}
    with pytest.raises(FileNotFoundError, match="REPOSITORY"):
        exec(source, nowhere)
    exec(source, nowhere | {"REPOSITORY": "https://host.example/bivl"})
    assert calls[1][:2] == ["git", "clone"] and calls[1][-1] == str(tmp_path / "bivl")
    assert calls[2] == [sys.executable, str(tmp_path / "bivl" / "colab" / "install.py")]
