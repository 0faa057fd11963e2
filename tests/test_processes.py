"""Training in a process of its own: killed, terminated, on a full disk."""

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import programs
import runs
from bivl import train
from bivl.core import checkpoint
from programs import TIMEOUT, arguments, finish, newest_step, wait, wait_for_updates


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts programs, see `programs.starter`."""
    yield from programs.starter(tmp_path_factory)


def newest_state(workdir, changes=()):
    """The newest checkpoint of a run, on this process's eight devices."""
    program = train.build(runs.tiny(changes))
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 2)
    state = checkpoints.restore_newest(program.abstract)
    checkpoints.close()
    return state


KILLED = runs.SHALLOW | {"steps": "40", "checkpoint.every": "1", "model.dropout": "0.1"}


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The folder of a run of `KILLED` that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("straight")
    finish(start("train", *arguments(workdir, KILLED)))
    assert list(runs.losses(workdir)) == list(range(1, 41))
    return workdir


def test_kill_9_at_any_moment_changes_nothing(start, straight, tmp_path):
    """Six kills: while it starts, between updates, while it saves (every step does)."""
    rng, workdir = random.Random(0), tmp_path / "run"
    for kill in range(6):
        process = start("train", *arguments(workdir, KILLED))
        if kill == 2:
            time.sleep(rng.uniform(0, 4))
        else:
            wait_for_updates(process, workdir, 0)
            goal = newest_step(workdir) + rng.randint(0, 3)
            wait(process, lambda goal=goal: newest_step(workdir) >= goal)
            time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
    finish(start("train", *arguments(workdir, KILLED)))
    assert runs.losses(workdir) == runs.losses(straight)
    runs.assert_same(newest_state(workdir, KILLED), newest_state(straight, KILLED))


def test_sigterm_saves_and_the_same_command_resumes(start, straight, tmp_path):
    changes = KILLED | {"checkpoint.every": "1000"}
    process = start("train", *arguments(tmp_path, changes))
    wait_for_updates(process, tmp_path, 2)
    process.terminate()
    last = finish(process, 143)
    step = checkpoint.numbered(tmp_path / "checkpoints")[0]
    assert f"saved at step {step}" in last
    assert 2 <= step < 40
    assert list(runs.losses(tmp_path)) == list(range(1, step + 1))
    finish(start("train", *arguments(tmp_path, changes)))
    assert runs.losses(tmp_path) == runs.losses(straight)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_with_the_run(start, straight, tmp_path):
    """The line of a SIGTERM stays the last one, and a killed run leaves no worker behind."""
    changes = KILLED | {"loader.workers": "2", "steps": "100000", "checkpoint.every": "0"}
    for code in (143, -9):
        process = start("train", *arguments(tmp_path, changes))
        wait_for_updates(process, tmp_path, 1)
        workers = [pid for pid, (_, parent) in stats().items() if parent == str(process.pid)]
        assert len(workers) >= 2
        process.send_signal(-code if code < 0 else signal.SIGTERM)
        last = finish(process, code)
        assert code < 0 or last.startswith("SIGTERM: saved at step")
        end = time.monotonic() + TIMEOUT
        while any(stats().get(pid, "Z")[0] != "Z" for pid in workers):
            assert time.monotonic() < end, "a worker is left"
            time.sleep(0.05)


def stats():
    """Every process of this machine: its number -> (state, Z when it has ended, its parent)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[path.parent.name] = path.read_text().rpartition(")")[2].split()[:2]
    return found


def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints_whole(start, straight, tmp_path):
    """Files that may not grow beyond 40 KiB stand for the disk: too few for a checkpoint."""
    workdir = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "40")
    before = newest_state(workdir, KILLED)
    last = finish(start("train", *arguments(workdir, KILLED), limit=40), 1)
    assert last.startswith("failed:") and "File too large" in last
    assert checkpoint.find(workdir).name == "39"
    runs.assert_same(newest_state(workdir, KILLED), before)
    finish(start("train", *arguments(workdir, KILLED)))
    assert runs.losses(workdir) == runs.losses(straight)


def test_a_disk_that_fills_with_metrics_ends_the_run(start, straight, tmp_path):
    """Room for config.json, but not for the numbers of 40 updates."""
    changes = KILLED | {"checkpoint.every": "0"}
    last = finish(start("train", *arguments(tmp_path, changes), limit=16), 1)
    assert last.startswith("failed:") and "File too large" in last
    finish(start("train", *arguments(tmp_path, changes)))
    assert runs.losses(tmp_path) == runs.losses(straight)
