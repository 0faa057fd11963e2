"""Several processes that train as one: they begin and end together, and resume in any number.

What kills, stops or ends one happens in that process itself, at a place of the program and not at a
moment that a clock chooses.
"""

import contextlib
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

import bivl
import programs
import runs
from bivl import evaluate, train
from bivl.core import checkpoint
from programs import arguments, finish

STEPS = list(range(1, 7))
PAIR = runs.SHALLOW | {
    "steps": "6",
    "checkpoint.every": "2",
    "checkpoint.keep": "9",
    "mesh.data": "1",
    "mesh.fsdp": "8",
    "evaluators": "knn",
    "data.num_examples": "44",
}
ALONE = PAIR | {"evaluators": ""}
CLOSE = 4e-6  # float32, summed in another order

UPDATE = """
import os, signal
from bivl.core.loop import Loop
def record(self, update, old=Loop.record):
    if update.step == {step}:
        os.kill(os.getpid(), {signal})
    return old(self, update)
Loop.record = record
"""
COMPILATION = """
import os
from bivl.train import Program
Program.compile = lambda self: os.kill(os.getpid(), 9)
"""
WRITE = """
import os
from bivl.core.checkpoint import Checkpoints
def save(self, step, *args, old=Checkpoints.save, **options):
    old(self, step, *args, **options)
    if step == 4:
        os.kill(os.getpid(), 9)
Checkpoints.save = save
"""
FAILURE = """
from bivl.core.loop import Loop
def log(self, step, *args, old=Loop.log):
    if step == 3:
        raise OSError("no space left")
    old(self, step, *args)
Loop.log = log
"""

# As on a TPU slice, where a host's chips are a square of the torus and no line of the mesh.
SCATTERED = """
from bivl.core import sharding
def arrange(shape, devices, old=sharding.arrange):
    half = len(devices) // 2
    return old(shape, [d for both in zip(devices[:half], devices[half:]) for d in both])
sharding.arrange = arrange
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts programs, see `programs.starter`."""
    yield from programs.starter(tmp_path_factory)


def free_port():
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_all(start, program, args, count=2, devices=8, codes=None, env=()):
    """`count` processes with `devices` together, on hosts that call themselves host-0, host-1, ...

    codes: process -> the Python that it runs first.
    """
    flags = [*args, f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    found = []
    for i in range(count):
        code = f"import socket; socket.gethostname = lambda: 'host-{i}'\n{(codes or {}).get(i, '')}"
        options = {"devices": devices // count, "code": code, "env": env}
        found.append(start(program, *flags, f"--process_id={i}", **options))
    return found


def finish_all(processes):
    """Waits for all to end well."""
    for process in processes:
        finish(process)


def assert_stopped(processes, victim, what):
    """All but the victim have ended with exit code 1 and a last line that names it and its host."""
    for i, process in enumerate(processes):
        if i != victim:
            last = finish(process, 1)
            assert last.startswith(f"failed: process {victim} (host host-{victim}) {what}"), last


def copy(workdir, target, step):
    """A copy of a run as it was when it had saved `step`."""
    workdir = Path(shutil.copytree(workdir, target))
    for later in checkpoint.numbered(workdir / "checkpoints"):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    return workdir


def assert_close(workdir, expected):
    """The same steps and, but for rounding, the same losses."""
    ours, others = runs.losses(workdir), runs.losses(expected)
    assert list(ours) == list(others) == STEPS
    np.testing.assert_allclose(list(ours.values()), list(others.values()), rtol=CLOSE)


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """The folder of a run in two processes."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    finish_all(start_all(start, "train", arguments(workdir, PAIR)))
    return workdir


@pytest.fixture(scope="module")
def single(quick_compile, tmp_path_factory):
    """The folder of the same run in this process, with its eight devices."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    train.train(runs.tiny(PAIR), workdir)
    return workdir


def test_two_processes_train_as_one(pair, single):
    assert list(runs.losses(pair)) == STEPS
    for name in ("loss", "grad_norm", "target_std"):
        ours, others = ([line[name] for line in runs.lines(w)] for w in (pair, single))
        np.testing.assert_allclose(ours, others, rtol=CLOSE)
    assert runs.lines(pair, "evaluations") == runs.lines(single, "evaluations")


def test_killed_terminated_and_resumed_in_two_four_and_one(start, pair, quick_compile, tmp_path):
    """Two, of which one is killed; four, of which one is terminated; and one on another mesh."""
    args = arguments(tmp_path, ALONE)
    killed = {1: UPDATE.format(step=3, signal=int(signal.SIGKILL))}
    processes = start_all(start, "train", args, codes=killed)
    assert_stopped(processes, 1, "is gone, killed or cut off")
    assert checkpoint.find(tmp_path).name == "2"

    terminated = {2: UPDATE.format(step=3, signal=int(signal.SIGTERM))}
    processes = start_all(start, "train", args, 4, codes=terminated)
    last = {finish(process, 143) for process in processes}
    step = max(checkpoint.numbered(tmp_path / "checkpoints"))
    assert last == {f"SIGTERM: saved at step {step}; the same command resumes"}
    assert 3 <= step < 6
    losses = runs.losses(tmp_path)
    assert losses == dict(list(runs.losses(pair).items())[:step])  # devices have not changed

    train.train(runs.tiny(ALONE | {"mesh.data": "4", "mesh.fsdp": "2"}), tmp_path)
    assert_close(tmp_path, pair)
    model = bivl.load(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model.params))


def test_killed_while_it_compiles(start, tmp_path):
    processes = start_all(start, "train", arguments(tmp_path, ALONE), codes={0: COMPILATION})
    assert_stopped(processes, 0, "is gone, killed or cut off")


def test_one_that_is_frozen_is_named(start, tmp_path):
    """In the middle of an update, where all wait and nobody is ahead."""
    frozen = {1: UPDATE.format(step=3, signal=int(signal.SIGSTOP))}
    env = {"BIVL_STALL_SECONDS": "20"}
    processes = start_all(start, "train", arguments(tmp_path, ALONE), codes=frozen, env=env)
    assert_stopped(processes, 1, "stood still for 20 s")


def test_evaluation_in_two_processes_gives_the_same_numbers(start, pair, tmp_path):
    args = [f"--checkpoint={pair}", f"--out={tmp_path / 'pair'}"]
    finish_all(start_all(start, "evaluate", args))
    evaluate.main([f"--checkpoint={pair}", f"--out={tmp_path / 'single'}"])
    ours, others = (
        (tmp_path / name / "evaluation.json").read_text() for name in ("pair", "single")
    )
    assert ours == others


# More of the same, and more processes.


@pytest.mark.meshes
def test_chips_of_one_process_need_not_be_neighbours(start, single, tmp_path):
    args = arguments(tmp_path, ALONE)
    finish_all(start_all(start, "train", args, codes=dict.fromkeys(range(2), SCATTERED)))
    assert_close(tmp_path, single)


@pytest.mark.meshes
@pytest.mark.parametrize("name", ["data2vec_text", "data2vec2_speech"])
def test_two_processes_train_other_objectives_as_one(start, quick_compile, tmp_path, name):
    changes = ALONE | {"steps": "3"}
    finish_all(start_all(start, "train", arguments(tmp_path / "pair", changes, name)))
    train.train(runs.tiny(changes, name), tmp_path / "single")
    ours, others = (list(runs.losses(tmp_path / run).values()) for run in ("pair", "single"))
    np.testing.assert_allclose(ours, others, rtol=CLOSE)


@pytest.mark.meshes
def test_killed_while_it_saves_and_resumed(start, pair, tmp_path):
    """Process 0, which jax cannot do without; what it was writing is whole or does not count."""
    processes = start_all(start, "train", arguments(tmp_path, ALONE), codes={0: WRITE})
    assert_stopped(processes, 0, "is gone, killed or cut off")
    finish_all(start_all(start, "train", arguments(tmp_path, ALONE)))
    assert runs.losses(tmp_path) == runs.losses(pair)


@pytest.mark.meshes
def test_two_processes_resume_what_one_saved(start, single, tmp_path):
    """On half the devices."""
    workdir = copy(single, tmp_path / "run", 4)
    args = arguments(workdir, PAIR | {"mesh.fsdp": "4"})
    finish_all(start_all(start, "train", args, devices=4))
    assert_close(workdir, single)


@pytest.mark.meshes
@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_four_is_named_by_all_others_and_others_resume(start, pair, tmp_path, victim, kill):
    """Four processes, then eight devices in two, on another mesh."""
    codes = {victim: UPDATE.format(step=4, signal=int(kill))}
    stopped = kill is signal.SIGSTOP
    env = {"BIVL_STALL_SECONDS": "60"} if stopped else {}
    processes = start_all(start, "train", arguments(tmp_path, ALONE), 4, codes=codes, env=env)
    assert_stopped(processes, victim, "stood still for 60 s" if stopped else "is gone")
    with contextlib.suppress(OSError):
        processes[victim].kill()
    changes = ALONE | {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"}
    finish_all(start_all(start, "train", arguments(tmp_path, changes)))
    assert_close(tmp_path, pair)


@pytest.mark.meshes
@pytest.mark.parametrize("code", [COMPILATION, WRITE], ids=["compilation", "write"])
@pytest.mark.parametrize("victim", [0, 2])
def test_one_of_four_killed_while_it_compiles_or_saves(start, pair, tmp_path, victim, code):
    processes = start_all(start, "train", arguments(tmp_path, ALONE), 4, codes={victim: code})
    assert_stopped(processes, victim, "is gone, killed or cut off")
    finish_all(start_all(start, "train", arguments(tmp_path, ALONE), 1))
    assert_close(tmp_path, pair)


@pytest.mark.meshes
@pytest.mark.parametrize("victim", [0, 2])
def test_why_one_of_four_failed_is_what_all_say(start, tmp_path, victim):
    processes = start_all(start, "train", arguments(tmp_path, ALONE), 4, codes={victim: FAILURE})
    assert_stopped(processes, victim, "has ended: OSError: no space left")
    assert finish(processes[victim], 1) == "failed: OSError: no space left"
