"""Ahead-of-time compilation: what is reported, and how it ends when it cannot be done.

CPU devices stand in for a TPU slice, but for one test that runs where libtpu is installed.
"""

import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

from bivl import precompile
from bivl.core import config as configs
from bivl.core import report, topologies
from bivl.core.errors import UserError
from bivl.data import mixture

TOPOLOGY = topologies.parse("v5e:2x4")
SHORT = """RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO \
temporaries (16.71G) exceeds available HBM (15.75G)."""
LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 33.57G of 30.75G hbm. Exceeded hbm capacity by 2.82G."""


@pytest.fixture
def on_cpu(monkeypatch):
    """What the child would find, compiled here for eight CPU devices."""

    def in_child(argv, directory, timeout):
        precompile.main([*argv, f"--inside={directory}"])

    monkeypatch.setattr(precompile, "devices_of", lambda topology: jax.devices()[: topology.count])
    monkeypatch.setattr(precompile, "in_child", in_child)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


ARGUMENTS = ["--config=configs/pretrain/data2vec_image.py:smoke", "--topology=v5e:2x4"]
ARGUMENTS += ["--config.model.depth=1", "--config.top_k_layers=1", "--config.batch_size=16"]


def test_the_step_of_a_config(on_cpu, capsys, tmp_path):
    precompile.main([*ARGUMENTS, "--json", f"--hlo={tmp_path / 'step.hlo'}"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["chips"] == 8 and found["mesh"]["data"] == 8
    memory = found["memory"]
    assert 0 < memory["params"] < memory["teacher"] + memory["params"] < memory["arguments"]
    assert memory["opt_state"] == pytest.approx(2 * memory["params"], rel=1e-3)
    assert memory["batch"] == 2 * (64 * 64 * 3 + 64)  # two examples of bytes, and their masks
    # What is compiled is what is counted, each chip doing its eighth.
    assert found["compiled_flops_per_chip"] == pytest.approx(found["flops_per_chip"], rel=0.05)
    assert found["hbm_bytes_per_chip"] > memory["arguments"]
    kinds = {(c["kind"], c["axes"]) for c in found["collectives"]}
    assert ("all-reduce", "data") in kinds and {axes for _, axes in kinds} == {"data"}
    reduced = sum(c["bytes"] for c in found["collectives"] if c["kind"] == "all-reduce")
    assert reduced >= memory["params"]
    seconds = found["seconds"]
    assert seconds["step"] == seconds[found["bound"]] < seconds["serial"]
    assert not [line for line in found["warnings"] if "compiles twice" in line]
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule jit_step")


FACTS = {
    "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
    "coords": [],
    "slices": [],
    "batch_size": 64,
    "accumulate": 1,
    "rows": [8],
    "remat": "none",
    "gather": "update",
    "leaves": [
        ["params/w", [1000, 1000], [1000, 1000], 4],
        ["step", [], [], 4],
        ["batch/image", [64, 10], [8, 10], 1],
    ],
    "changed": [],
    "flops": 8e12,
    "compile_seconds": 1.0,
    "memory": None,
    "text_error": None,
}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [(SHORT, 16.71 * 2**30), (LONG, 33.57 * 2**30), ("INTERNAL: no idea", None)],
)
def test_messages_of_the_compiler(message, wanted):
    assert report.out_of_memory(message) == wanted


def test_complaints_of_a_third_form_are_still_of_memory():
    assert math.isnan(report.out_of_memory("RESOURCE_EXHAUSTED: who knows"))
    found = report.analyse(FACTS | {"error": "RESOURCE_EXHAUSTED"}, None, TOPOLOGY)
    assert found["suggestions"] and "does not fit" in report.render(found)


def test_a_step_that_does_not_fit(on_cpu, monkeypatch, capsys):
    def in_child(argv, directory, timeout):
        (directory / "facts.json").write_text(json.dumps(FACTS | {"error": SHORT}))

    monkeypatch.setattr(precompile, "in_child", in_child)
    with pytest.raises(UserError, match="chip of v5e:2x4 has; try --config.optimizer.accumulate=2"):
        precompile.main(ARGUMENTS)
    text = capsys.readouterr().out
    assert "temporaries" in text and "17.942" in text and "--config.model.remat=full" in text


def test_a_program_without_text():
    facts = FACTS | {"error": None, "text_error": "INTERNAL: printer"}
    facts["memory"] = {"argument": 4_100_000, "temp": 5, "code": 6, "peak": 7}
    facts["changed"] = [["params/w", "bfloat16[1000, 1000]"]]
    found = report.analyse(facts, None, TOPOLOGY)
    assert found["memory"]["padding"] == 4_100_000 - 4_000_000 - 4 - 80
    assert found["memory"]["peak"] == 7 and found["memory"]["temporaries"] == 5
    text = report.render(found)
    assert "INTERNAL: printer" in text and "bfloat16[1000, 1000]: every run compiles twice" in text


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"needs libtpu; pip install 'bivl\[precompile\]'"):
        precompile.main(ARGUMENTS)


def test_a_mistake_that_the_child_finds(tmp_path):
    with pytest.raises(UserError, match="^config.optimizer has no key 'acumulate'"):
        precompile.in_child([*ARGUMENTS, "--config.optimizer.acumulate=2"], tmp_path, 600)


def test_a_child_that_takes_too_long(tmp_path):
    with pytest.raises(UserError, match="longer than --timeout=0 s; raise it"):
        precompile.in_child(ARGUMENTS, tmp_path, 0)


def table():
    """launch/precompile_table.py as a module."""
    path = Path(__file__).parents[1] / "launch" / "precompile_table.py"
    spec = importlib.util.spec_from_file_location("precompile_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = table().recipes()


def test_every_pretraining_objective_names_slices():
    named = {name for name, *_ in RECIPES}
    shipped = {path.stem for path in Path("configs/pretrain").glob("[!_]*.py")}
    assert shipped - named == {"data2vec_emoji"}  # which two CPU cores train


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r[0]}-{r[1]}")
def test_batches_divide_over_the_slices_that_recipes_name(recipe):
    name, option, slices, topology, overrides = recipe
    config = configs.load(f"configs/pretrain/{name}.py:{option}")
    settings = [x.removeprefix("--config.").split("=", 1) for x in overrides]
    configs.override(config, [tuple(pair) for pair in settings])
    chips = topologies.parse(topology, slices).count // config.mesh.tensor
    for size in jax.tree.leaves(mixture.sizes(config)):
        assert size % (chips * config.optimizer.accumulate) == 0


def test_rows_of_the_table():
    module = table()
    recipe = ("beit3", "size=base", 2, "v5e:2x4", ["--config.optimizer.accumulate=2"])
    found = report.analyse(FACTS | {"error": SHORT}, None, TOPOLOGY)
    columns = module.HEAD.count("|")
    for given in (None, found, found | {"fits": True, "memory": found["memory"] | {"peak": 1e9}}):
        line = module.row(recipe, given)
        assert line.count("|") == columns
        assert line.startswith("| `beit3` base | 2 x v5e:2x4 | optimizer.accumulate=2 |")


def test_the_table_is_not_written_in_part(tmp_path, monkeypatch, capsys):
    module, readme = table(), tmp_path / "README.md"
    readme.write_text("\n".join(module.MARKS))
    monkeypatch.setattr(module, "README", readme)
    with pytest.raises(SystemExit):
        module.main(["--only=beit3", "--write", "--made", f"--keep={tmp_path}"])
    assert "leave --only out" in capsys.readouterr().err
    assert readme.read_text() == "\n".join(module.MARKS)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_real_slice(capsys):
    precompile.main([*ARGUMENTS[:1], *ARGUMENTS[2:], "--topology=v5e:2x2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["memory"]["capacity"] > found["memory"]["arguments"] > 0
    assert found["compiled_flops_per_chip"] == pytest.approx(found["flops_per_chip"], rel=0.1)
    assert any(c["kind"] == "all-reduce" and c["axes"] == "data" for c in found["collectives"])
