"""metrics.jsonl, pictures, the progress lines, and the table of chips."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

import runs
from bivl import train
from bivl.core import checkpoint, metrics

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


def test_events_are_the_files_that_tensorboard_reads(tmp_path):
    """Byte for byte what tensorboardX writes for the same events."""
    events = metrics.Events(tmp_path, 3)
    events.scalars(4, {"loss": 0.5, "a/b": 2.0})
    events.picture(4, "pictures/masks", np.full((4, 6, 3), 7, np.uint8))
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data, found = path.read_bytes(), []
    theirs = RecordWriter(str(tmp_path / "theirs"))
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        theirs.write(data[12 : 12 + size])
        data = data[16 + size :]
    theirs.close()
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert found[0].file_version == "brain.Event:2"
    assert found[1].session_log.status == event_pb2.SessionLog.START
    tags = [(event.step, value.tag) for event in found for value in event.summary.value]
    assert tags == [(4, "loss"), (4, "a/b"), (4, "pictures/masks")]


@pytest.fixture
def bucket(monkeypatch):
    """Name -> what a bucket has of the files of a run: as they were when they were closed."""
    kept = {}

    class Held:
        def __init__(self, path, mode):
            self.path, self.file = Path(path), open(path, mode)  # noqa: SIM115

        def __getattr__(self, name):
            return getattr(self.file, name)

        def close(self):
            self.file.close()
            kept[self.path.name.split(".")[0]] = self.path.read_bytes()

    monkeypatch.setattr(metrics, "open", Held, raising=False)
    return kept


def test_what_is_kept_is_in_the_bucket_and_no_line_is_waited_for(bucket, tmp_path):
    writer = metrics.Writer(tmp_path, 0, QUIET)
    writer.scalars(1, {"loss": 0.5})
    assert not bucket
    writer.keep()
    assert bucket["metrics"] == b'{"step": 1, "loss": 0.5}\n' and b"loss" in bucket["events"]
    assert "evaluations" not in bucket  # it has nothing new
    writer.scalars(2, {"loss": 0.25})
    assert bucket["metrics"].count(b"\n") == 1
    writer.close()
    assert bucket["metrics"].count(b"\n") == 2


def test_no_checkpoint_is_ahead_of_its_line_in_the_bucket(bucket, tmp_path, monkeypatch):
    saves, old = [], checkpoint.Checkpoints.save

    def save(self, step, *args, **options):
        saves.append((step, bucket.get("metrics", b"").count(b"\n")))
        old(self, step, *args, **options)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    changes = {"steps": "3", "checkpoint.every": "1", "evaluate_every": "2", "evaluators": "knn"}
    train.train(runs.tiny(runs.SHALLOW | changes), tmp_path)
    assert [pair for pair in saves if pair[0] != pair[1]] == [] and len(saves) >= 3
    assert bucket["evaluations"].count(b"\n") == 2


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
