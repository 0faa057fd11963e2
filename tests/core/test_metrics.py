"""metrics.jsonl, pictures, the progress lines, and the table of chips."""

import json
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from bivl.core import metrics

QUIET = ConfigDict({"wandb": ""})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', [1, 2]),  # lines after step 2
        ('{"step": 1}\n{"step": 2, "lo', [1]),  # torn in the middle
        ('{"step": 1}\n{"step": 2}', [1, 2]),  # whole but for its newline
        ('{"step": 1}\n\n5\n[]\n{}\n{"step": null}\n', [1]),  # no lines of ours
        ("", []),
    ],
)
def test_cut(text, kept, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    metrics.cut(path, 2)
    assert [line["step"] for line in lines(path)] == kept
    assert path.read_text().count("\n") == len(kept)  # what is written next starts a line
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_without_a_file(tmp_path):
    metrics.cut(tmp_path / "metrics.jsonl", 2)
    assert not any(tmp_path.iterdir())


def test_writer(tmp_path):
    writer = metrics.Writer(tmp_path, 0, QUIET)
    writer.scalars(1, {"loss": 0.5, "a/b": float("nan"), "c": float("inf")})
    writer.scalars(2, {"loss": 0.25})
    writer.scalars(2, {"knn/accuracy": 1.0}, "evaluations")
    text = (tmp_path / "metrics.jsonl").read_text()  # on disk before close: a kill loses nothing
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "loss": 0.5, "a/b": None, "c": None},
        {"step": 2, "loss": 0.25},
    ]
    assert "NaN" not in text and "Infinity" not in text
    writer.picture(2, "pictures/masks", np.full((4, 6, 3), 7, np.uint8))
    writer.close()
    assert lines(tmp_path / "evaluations.jsonl") == [{"step": 2, "knn/accuracy": 1.0}]
    with Image.open(tmp_path / "pictures" / "masks.png") as picture:
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (7, 7, 7)
    assert any(p.name.startswith("events.") for p in tmp_path.iterdir())


def test_writer_of_a_resumed_run_appends_after_cutting(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    writer = metrics.Writer(tmp_path, 2, QUIET)
    writer.scalars(3, {"loss": 1.0})
    writer.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_progress_prints_plain_lines_where_there_is_no_terminal(monkeypatch, caplog, capsys):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    progress = metrics.Progress(2, 12)
    with caplog.at_level(logging.INFO, "bivl"):
        for step in range(3, 13):
            clock[0] += 4
            progress.show(step, {"loss": 1 / step, "unknown": 1.0})
    progress.close()
    found = [record.getMessage() for record in caplog.records]
    # At most one line in ten seconds, and always the last.
    assert [line.split()[1] for line in found] == ["3/12", "6/12", "9/12", "12/12"]
    assert found[0] == "step 3/12 loss=0.3333 eta=36s"
    assert found[-1].endswith("eta=0s")
    assert "\r" not in capsys.readouterr().out


def test_progress_is_a_bar_on_a_terminal(monkeypatch, caplog, capsys):
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, "bivl"):
        progress = metrics.Progress(0, 3)
        for step in range(1, 4):
            progress.show(step, {"loss": 0.5})
        progress.close()
    assert not caplog.records
    assert "3/3" in capsys.readouterr().out


def test_timings_are_means():
    timings = metrics.Timings()
    for seconds in (1.0, 2.0, 6.0):
        timings.add(seconds, seconds / 2, 2)
    assert timings.means() == {"step_seconds": 3.0, "data_wait_seconds": 1.5}
    assert timings.replaced == 6


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops_is_that_of_the_longest_name(kind, tera):
    assert metrics.peak_flops(kind) == (tera and tera * 1e12)
