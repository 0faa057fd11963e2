"""The design's floors, read from the imports: they go only downwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bivl"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "core": 0,
    "models": 1,
    "data": 1,
    "modalities": 2,
    "objectives": 3,
    "evaluators": 3,
    "weights": 3,
}
TOP = 4  # the entry points: modules directly in bivl/
DEVICE_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore")
GRAIN = ("grain", "bivl.data.pipeline")
LONGEST = 350


def package(file):
    """`core`, `models`, ... of a file under bivl/, "" for an entry point."""
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def parse(file):
    return ast.parse(file.read_text("utf-8"), str(file))


def dynamic(tree):
    """The starts of the texts that import_module and its kin are given."""
    names = ("import_module", "find_spec", "__import__")
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and (
            getattr(node.func, "attr", None) in names or getattr(node.func, "id", None) in names
        )
        for argument in node.args[:1] if called else ():
            if isinstance(argument, ast.JoinedStr):
                argument = argument.values[0]
            yield argument.value if isinstance(argument, ast.Constant) else ""


def imported(tree, file):
    """Dotted names of everything a module imports, wherever in it; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ("bivl", *file.relative_to(PACKAGE).parts)[: -node.level]
                base = ".".join((*parts, base)).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def target(name):
    """The package under bivl that a dotted name lies in, "" for an entry point, None outside."""
    parts = name.split(".")
    if parts[0] != "bivl" or len(parts) == 1:
        return None
    return parts[1] if (PACKAGE / parts[1]).is_dir() else ""


def offence(source, name):
    """What is wrong with a file of package `source` importing `name`; None if nothing is."""
    to = target(name)
    if to is None or to == source or source == "":
        return None
    if to == "core":
        if source == "data" and not name.startswith("bivl.core.errors"):
            return "data/ may import only bivl.core.errors of core/"
        return None
    if to == "":
        return "a package imports an entry point"
    if FLOORS[to] > FLOORS[source]:
        return "an import goes up"
    return "packages of one floor import each other" if FLOORS[to] == FLOORS[source] else None


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file):
    tree, source = parse(file), package(file)
    assert source in FLOORS or source == "", f"{source}/ has no floor"
    names = list(imported(tree, file))
    found = {name: offence(source, name) for name in names}
    assert not {name: why for name, why in found.items() if why}
    if source == "data":
        assert not [name for name in names if name.split(".")[0] in DEVICE_LIBRARIES]
    if source and source != "objectives":  # there a config names a modality
        assert not [text for text in dynamic(tree) if text.startswith("bivl")]


def test_core_knows_no_method():
    """Not even by name: core is the same for every model, modality and objective."""
    words = [
        f"bivl.{folder}" for folder in ("models", "data", "modalities", "objectives", "evaluators")
    ]
    for file in (PACKAGE / "core").glob("*.py"):
        strings = (
            node.value
            for node in ast.walk(parse(file))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        code = [text for text in strings if text in words or text.startswith(tuple(words))]
        assert not code, file


@pytest.mark.parametrize(
    ("source", "name", "bad"),
    [
        ("core", "bivl.core.errors.UserError", False),
        ("core", "bivl.models.layers", True),
        ("core", "bivl.model.load", True),
        ("models", "bivl.core.config", False),
        ("models", "bivl.data.masking", True),
        ("data", "bivl.core.errors.UserError", False),
        ("data", "bivl.core.config", True),
        ("modalities", "bivl.data.masking", False),
        ("modalities", "bivl.objectives.data2vec", True),
        ("objectives", "bivl.evaluators.knn", True),
        ("objectives", "bivl.models.layers", False),
        ("evaluators", "bivl.data.masking", False),
        ("weights", "bivl.objectives.data2vec", True),
        ("", "bivl.evaluators.knn", False),
        ("evaluators", "numpy", False),
    ],
)
def test_the_rule_itself(source, name, bad):
    assert bool(offence(source, name)) == bad


def test_the_readers_of_imports_see_everything():
    text = (
        "import importlib\nimport a.b as c\nfrom bivl.core import errors\nfrom . import x\n"
        "def f(name):\n    from ..data import masking\n"
        '    importlib.import_module(f"bivl.{name}")\n    importlib.import_module("bivl.x")\n'
    )
    tree = ast.parse(text)
    names = list(imported(tree, PACKAGE / "models" / "layers.py"))
    assert names == [
        "importlib",
        "a.b",
        "bivl.core.errors",
        "bivl.models.x",
        "bivl.data.masking",
    ]
    assert sorted(dynamic(tree)) == ["bivl.", "bivl.x"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_hold(file):
    assert file.name not in ("utils.py", "base.py")
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST
    if file.name != "__init__.py":
        assert ast.get_docstring(parse(file))


def test_data_is_read_without_jax():
    """In a fresh interpreter; left out is what imports grain, by itself or by the pipeline of
    batches, for grain imports jax."""
    files = [file for file in (PACKAGE / "data").glob("*.py") if file.name != "__init__.py"]
    modules = [
        f"bivl.data.{file.stem}"
        for file in files
        if not any(name.startswith(GRAIN) for name in imported(parse(file), file))
    ]
    assert "bivl.data.sources" in modules
    code = f"import sys, {', '.join(modules)}; print('jax' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
