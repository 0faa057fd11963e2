"""What the docstrings of configs say in numbers, against the configs."""

import ast
import re
from pathlib import Path

import pytest

from bivl.core import config as configs

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "configs").glob("*/*.py"))
DOCS = {str(p.relative_to(ROOT)): ast.get_docstring(ast.parse(p.read_text())) or "" for p in PATHS}
UPDATES = re.compile(r"^size=(\w+) .*?(\d[\d,]+) updates", re.MULTILINE)
STATED = [(path, *found) for path, text in DOCS.items() for found in UPDATES.findall(text)]


@pytest.mark.parametrize(("path", "size", "count"), STATED)
def test_numbers_of_updates(path, size, count):
    assert configs.load(f"{path}:size={size}").steps == int(count.replace(",", ""))


def test_numbers_of_updates_are_found():
    assert len(STATED) > 10


def test_warm_up_of_the_second_stage():
    """40 epochs of data2vec 1.0's large model, where the first stage has 80."""
    path = "configs/pretrain/data2vec_image.py"
    stated = re.search(r"warmup_steps=(\d+)", DOCS[path])
    first = configs.load(f"{path}:size=large").optimizer.warmup_steps
    assert int(stated[1]) == first // 2


@pytest.mark.parametrize("path", [*PATHS, *sorted((ROOT / "configs").glob("*.py"))])
def test_commands_of_several_lines_can_be_pasted(path):
    """As they stand in the file: what the docstring itself holds are joined lines."""
    lines = path.read_text().splitlines()
    for line, following in zip(lines, lines[1:], strict=False):
        if re.match(r"\s+(python -m|--)", line) and re.match(r"\s+--", following):
            assert line.endswith(" \\"), line
