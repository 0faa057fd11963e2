"""Training in processes of their own: killed, terminated, several at once, on a full disk."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import bivl
import runs
from bivl import evaluate, train
from bivl.core import checkpoint

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds that no single process may exceed


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts `python -m bivl.PROGRAM` with arguments on some CPU devices.

    All of them share a compilation cache; what still runs when the tests are over is killed.
    """
    logs = tmp_path_factory.mktemp("logs")
    started = []
    common = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def run(program, *args, devices=1, limit=None):
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", f"bivl.{program}", *args]
        if limit:
            command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
        log = logs / str(len(started))
        with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
            env = os.environ | common | {"XLA_FLAGS": flags}
            if limit:  # which would count for the logs as well
                out = err = subprocess.PIPE
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
        process.log = log
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def arguments(workdir, changes=(), name="data2vec_image"):
    """The command line of a small training run."""
    return [*runs.arguments(changes, name), f"--workdir={workdir}"]


def finish(process, code=0):
    """Waits for a process and checks its exit code; returns the last line of its stderr."""
    for kind, piped in zip(("out", "err"), process.communicate(timeout=TIMEOUT), strict=True):
        if piped is not None:
            Path(f"{process.log}.{kind}").write_bytes(piped)
    errors = Path(f"{process.log}.err").read_text()
    output = Path(f"{process.log}.out").read_text()
    assert process.returncode == code, f"{output[-2000:]}\n{errors[-4000:]}"
    return (errors.strip().splitlines() or [""])[-1]


def count_lines(workdir):
    """Whole lines of metrics.jsonl so far."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(process, condition):
    """Until `condition()` holds or the process has ended."""
    end = time.monotonic() + TIMEOUT
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "no progress"
        time.sleep(0.002)


def wait_for_updates(process, workdir, count):
    """Until a process is past its compilation and has added `count` lines of metrics."""
    wait(process, lambda: "compiled in" in Path(f"{process.log}.out").read_text())
    first = count_lines(workdir)
    wait(process, lambda: count_lines(workdir) >= first + count)


def newest_step(workdir):
    """The number of the newest checkpoint, 0 where there is none."""
    return max(checkpoint.numbered(workdir / "checkpoints"), default=0)


def newest_state(workdir, changes=()):
    """The newest checkpoint of a run, on this process's eight devices."""
    program = train.build(runs.tiny(changes))
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 2)
    state = checkpoints.restore_newest(program.abstract)
    checkpoints.close()
    return state


SHALLOW = {"model.depth": "1", "top_k_layers": "1"}  # every process traces and compiles
KILLED = SHALLOW | {"steps": "40", "checkpoint.every": "1", "model.dropout": "0.1"}


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
        workers = [pid for pid in stats() if stats()[pid][1] == str(process.pid)]
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


# Several processes.

PAIR = SHALLOW | {
    "checkpoint.every": "2",
    "mesh.data": "1",
    "mesh.fsdp": "8",
    "evaluators": "knn",
    "data.num_examples": "44",
}


def free_port():
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_pair(start, program, args):
    """Two processes of four devices each that work together."""
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [start(program, *args, *flags, f"--process_id={i}", devices=4) for i in range(2)]


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """The folder of a run in two processes."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    for process in start_pair(start, "train", arguments(workdir, PAIR)):
        finish(process)
    return workdir


@pytest.fixture(scope="module")
def single(quick_compile, tmp_path_factory):
    """The folder of the same run in this process, with its eight devices."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    train.train(runs.tiny(PAIR), workdir)
    return workdir


def test_two_processes_train_as_one(pair, single):
    assert list(runs.losses(pair)) == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "target_std"):
        ours, others = ([line[name] for line in runs.lines(w)] for w in (pair, single))
        np.testing.assert_allclose(ours, others, rtol=4e-6)
    assert runs.lines(pair, "evaluations") == runs.lines(single, "evaluations")


@pytest.mark.parametrize("name", ["data2vec_text", "data2vec2_speech"])
def test_two_processes_train_other_objectives_as_one(start, quick_compile, tmp_path, name):
    changes = PAIR | {"evaluators": "", "steps": "3"}
    for process in start_pair(start, "train", arguments(tmp_path / "pair", changes, name)):
        finish(process)
    train.train(runs.tiny(changes, name), tmp_path / "single")
    ours, others = (list(runs.losses(tmp_path / run).values()) for run in ("pair", "single"))
    np.testing.assert_allclose(ours, others, rtol=4e-6)


def test_one_process_resumes_what_two_saved(pair, single, tmp_path):
    workdir = Path(shutil.copytree(pair, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    train.train(runs.tiny(PAIR | {"mesh.data": "4", "mesh.fsdp": "2"}), workdir)
    expected = list(runs.losses(single).values())
    np.testing.assert_allclose(list(runs.losses(workdir).values()), expected, rtol=4e-6)
    model = bivl.load(pair)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model.params))


def test_evaluation_in_two_processes_gives_the_same_numbers(start, pair, tmp_path):
    args = [f"--checkpoint={pair}", f"--out={tmp_path / 'pair'}"]
    for process in start_pair(start, "evaluate", args):
        finish(process)
    evaluate.main([f"--checkpoint={pair}", f"--out={tmp_path / 'single'}"])
    ours, others = (
        (tmp_path / name / "evaluation.json").read_text() for name in ("pair", "single")
    )
    assert ours == others


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(start, tmp_path):
    changes = PAIR | {"steps": "100000", "checkpoint.every": "1", "evaluators": ""}
    processes = start_pair(start, "train", arguments(tmp_path, changes))
    wait_for_updates(processes[0], tmp_path, 2)
    processes[1].terminate()
    last = {finish(process, 143) for process in processes}
    step = checkpoint.numbered(tmp_path / "checkpoints")[0]
    assert all(f"saved at step {step}" in line for line in last)
    assert list(runs.losses(tmp_path)) == list(range(1, step + 1))
