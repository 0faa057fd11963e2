"""Programs that tests start as processes of their own, and how these wait for them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import runs
from bivl.core import checkpoint

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds that no single process may exceed
COMMON = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONFAULTHANDLER": "1",
}
# Devices of one process abort it where one of them waits 40 s for another, as they may on a machine
# that has much else to do.
FLAGS = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def starter(tmp_path_factory):
    """What a fixture `start` yields: a function that starts `python -m bivl.PROGRAM` with arguments
    on some CPU devices, after some Python `code`.

    All of them share a compilation cache; what still runs when the tests are over is killed.
    """
    logs = tmp_path_factory.mktemp("logs")
    common = COMMON | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    started = []

    def run(program, *args, devices=1, limit=None, code="", env=()):
        flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", f"bivl.{program}", *args]
        if code:
            start = f"from bivl import {program}\nfrom bivl.core import cli\n{code}\n"
            command[1:] = ["-c", f"{start}cli.run({program}.main, {list(args)})"]
        if limit:
            command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
        log = logs / str(len(started))
        with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
            whole = os.environ | common | {"XLA_FLAGS": flags} | dict(env)
            if limit:  # which would count for the logs as well
                out = err = subprocess.PIPE
            process = subprocess.Popen(command, cwd=ROOT, env=whole, stdout=out, stderr=err)
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
    try:
        pipes = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER: it says where each thread is
        pipes = process.communicate()
    for kind, piped in zip(("out", "err"), pipes, strict=True):
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
