"""What is wrong with this pod, in a minute: run it on every host as training would be.

`python -m bivl.preflight [--config=FILE] [--workdir=DIR] [--devices=N] [--config.a.b=v]`

One line a check, `ok: ...` or `wrong: what: cause; cure`; exit code 0 or 2, or 1 where a process
does not come or a check does not end in time: another time it may. With a config it reads a record
of its data on every host and lays its mesh; with a workdir it writes there and removes what it has
written.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from bivl.core import cli, distributed, pod
from bivl.core.errors import Late, UserError
from bivl.data import mixture

FLAGS = {
    "--workdir": {"help": "where the run will be written"},
    "--devices": {"type": int, "help": "how many devices there must be, of all hosts together"},
    "--seconds": {"type": float, "default": 60.0, "help": "limit of every wait (default 60)"},
}


@contextlib.contextmanager
def limited(what: str, seconds: float):
    """Ends the process when the block takes longer: what waits for a device cannot be stopped."""

    def end():
        why = f"{what}: no end after {seconds:.0f} s on {distributed.name(distributed.process())}"
        distributed.failed(why, 1)
        os.write(2, f"wrong: {why}; look into this host\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_data(config) -> tuple[dict[str, int], str]:
    """Opens all data of a config and reads two records of each -> (records, what is wrong)."""
    if "data" not in config:
        return {}, ""
    try:
        opened = mixture.open_all(config)
        for source in opened.values():
            for index in (0, len(source) - 1):
                source[index]
        return {name: len(source) for name, source in opened.items()}, ""
    except UserError as error:
        return {}, str(error)
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"


def report(config, workdir: Path | None) -> dict:
    """All that a host says about itself before it meets others; JSON."""
    records, problem = read_data(config)
    text = json.dumps(config.to_dict(), default=str)
    return {
        "versions": pod.versions(),
        "settings": pod.settings(),
        "config": hashlib.sha256(text.encode()).hexdigest()[:8],
        "workdir": str(workdir),
        "records": records,
        "data": problem,
        "disk": pod.free_space(workdir),
        "memory": pod.free_memory(),
        "chips": pod.chips(),
        "token": secrets.token_hex(8),
    }


# Done by all together.


def _write(folder: Path, process: int) -> str:
    """Writes as a run does: a file, and a folder that gets its name when it is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(process)).write_text("here")
        whole, part = folder / f"{process}.whole", folder / f"{process}.part"
        part.mkdir()
        (part / "file").write_text("whole")
        part.rename(whole)
        return "" if (whole / "file").read_text() == "whole" else f"{whole} is not what was written"
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def check_workdir(workdir: Path, token: str, seconds: float) -> pod.Checks:
    """Every process can write there, and they all see one folder."""
    process, count = jax.process_index(), jax.process_count()
    missing = [p for p in (workdir, *workdir.parents) if not p.exists()]
    folder = workdir / f".preflight-{token}"
    distributed.barrier("look at workdir", seconds)
    problems = distributed.exchange("write", _write(folder, process), seconds)
    end = time.monotonic() + min(10, seconds)
    while True:
        unseen = [i for i in range(count) if not (folder / str(i)).exists()]
        if not unseen or time.monotonic() > end or any(problems):
            break
        time.sleep(0.5)
    unseen = distributed.exchange("see", unseen, seconds)
    shutil.rmtree(folder, ignore_errors=True)
    for place in missing:
        with contextlib.suppress(OSError):  # others may have removed it, or use it
            place.rmdir()
    name = distributed.name
    wrong = [f"{name(i)} cannot write: {p}" for i, p in enumerate(problems) if p]
    cure = "mount the bucket or disk with the right to write, and to rename folders"
    if not wrong:
        wrong = [
            f"{name(i)} does not see what {name(x[0])} wrote" for i, x in enumerate(unseen) if x
        ]
        cure = "mount one bucket or disk at the same place on every host"
    return {f"workdir {workdir}": f"{'; '.join(wrong[:8])}; {cure}" if wrong else None}


def check_clock(seconds: float) -> pod.Checks:
    """Clocks of all processes against process 0's."""
    begin = time.time()
    distributed.barrier("clock", seconds)
    stamps = distributed.exchange("stamp", time.time(), seconds)
    return pod.judge_clock(stamps, begin, time.time())


def check_links(count: int) -> pod.Checks:
    """Numbers that all devices' processes add up."""
    found = multihost_utils.process_allgather(np.int32(jax.process_index()))
    good = sorted(np.ravel(found).tolist()) == list(range(count))
    return {"devices reach each other": None if good else f"they gathered {found}; recreate them"}


def check(config, args, workdir: Path | None) -> pod.Checks:
    """All checks, in every process; what process 0 finds is what counts."""
    seconds = args.seconds
    with limited("data and versions", seconds):
        own = report(config, workdir)
    try:
        distributed.start(args, seconds)
    except (Late, UserError) as error:
        print(f"wrong: processes: {error}")
        raise
    with limited("devices", 2 * seconds):
        own |= pod.devices()
    reports = distributed.exchange("report", own, seconds)
    count = len(reports)
    names = ", ".join(distributed.host(i) for i in range(min(count, 8)))
    checks: pod.Checks = {f"{count} processes, on {names}{', ...' * (count > 8)}": None}
    checks |= pod.judge_software(reports)
    checks |= pod.judge_devices(reports, config, args.devices)
    with limited("devices reach each other", seconds):
        checks |= check_links(count)
    checks |= pod.judge_hosts(reports, config)
    if workdir:
        with limited("workdir", 3 * seconds):
            checks |= check_workdir(workdir, reports[0]["token"], seconds)
    checks |= check_clock(seconds)
    return distributed.exchange("verdict", checks, seconds)[0]


def main(argv) -> None:
    """The command line."""
    args, config = cli.parse(argv, __doc__, FLAGS | distributed.FLAGS, lambda *_: ConfigDict())
    if args.workdir and "://" in args.workdir:
        raise UserError(f"--workdir={args.workdir}: mount the bucket and pass its folder")
    if not 0 < args.seconds < 1e5:
        raise UserError(f"--seconds={args.seconds} must be a positive number of seconds")
    workdir = Path(args.workdir).expanduser().resolve() if args.workdir else None
    checks = check(config, args, workdir)
    wrong = {name.split(":")[0]: why for name, why in checks.items() if why}
    if jax.process_index() == 0:
        for name, why in checks.items():
            print(f"wrong: {name.split(':')[0]}: {why}" if why else f"ok: {name}")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(checks)} checks found something wrong: {', '.join(wrong)}; "
            "process 0 says what"
        )


if __name__ == "__main__":
    cli.run(main)
