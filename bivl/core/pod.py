"""What a host says about itself, and what is wrong where several hosts say different things.

Checks are a mapping from what was checked to what is wrong with it, None where nothing is.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

import jax

import bivl
from bivl.core import distributed, sharding
from bivl.core.errors import UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")
DISK = (
    5e9  # bytes that must be free where the run is written, and a fifth of it for temporary files
)
MEMORY = 2e9  # bytes of the host's memory that must be free
CLOCK = 5.0  # seconds by which clocks may differ
SAME = "install the same on every host (launch/tpu.sh setup, or pip install -e . there)"


Checks = dict[str, str | None]


def versions() -> dict[str, str]:
    """Name -> version of all that must be the same on every host; of bivl also a digest of it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    root, digest = Path(bivl.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found | {"bivl": f"{bivl.__version__} ({digest.hexdigest()[:8]})"}


def free_space(workdir: Path | None) -> list[tuple[str, int, float]]:
    """(folder, bytes that are free, bytes that must be) where a run writes."""
    found = [(tempfile.gettempdir(), DISK / 5)]
    if workdir:
        there = next(p for p in (workdir, *workdir.parents) if p.exists())
        found.append((str(there), DISK))
    return [(folder, shutil.disk_usage(folder).free, least) for folder, least in found]


def free_memory() -> int | None:
    """Bytes of memory that programs can have; None where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    return None


def chips() -> int:
    """TPU chips and NVIDIA GPUs that this host has, whether jax uses them or not."""
    from jax._src import hardware_utils  # what jax itself asks before it loads libtpu

    tpus, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    gpus = Path("/proc/driver/nvidia/gpus")
    return tpus + (len(list(gpus.iterdir())) if gpus.is_dir() else 0)


def settings() -> dict[str, str]:
    """The environment variables that must be the same on every host."""
    return {name: os.environ.get(name, "") for name in SETTINGS}


def devices() -> dict:
    """What jax has on this host; waits for all hosts of a TPU slice."""
    first = jax.local_devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "local": jax.local_device_count(),
        "all": jax.device_count(),
    }


def differing(values: list, what: str) -> str | None:
    """Names the processes whose value is not that of most."""
    keys = [json.dumps(value) for value in values]
    usual = collections.Counter(keys).most_common(1)[0][0]
    odd = [i for i, key in enumerate(keys) if key != usual]
    if not odd:
        return None
    show = lambda key: json.loads(key) or "absent"  # noqa: E731
    named = ", ".join(f"{show(keys[i])} on {distributed.name(i)}" for i in odd[:8])
    return f"{what} is {show(usual)}, but {named}"


def judge_software(reports: list[dict]) -> Checks:
    """Versions, settings and configs are the same everywhere."""
    names = {name for r in reports for name in r["versions"]}
    found = (differing([r["versions"].get(n) for r in reports], n) for n in sorted(names))
    wrong = [text for text in found if text]
    own = ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items())
    checks: Checks = {f"versions: {own}": f"{'; '.join(wrong)}; {SAME}" if wrong else None}
    wrong = [differing([r["settings"][n] for r in reports], n) for n in SETTINGS]
    wrong += [differing([r[key] for r in reports], key) for key in ("config", "workdir")]
    wrong = [text for text in wrong if text]
    cure = "start every host with the same command and environment"
    return checks | {"command and environment": f"{'; '.join(wrong)}; {cure}" if wrong else None}


def judge_devices(reports: list[dict], config, wanted: int | None) -> Checks:
    """Every host has its chips, jax uses them, and the mesh fits them."""
    name, wrong = distributed.name, []
    for i, r in enumerate(reports):
        if r["chips"] and r["platform"] == "cpu":
            wrong.append(f"{name(i)} has {r['chips']} chips but jax uses the CPU; install jax[tpu]")
        elif r["local"] < r["chips"]:
            wrong.append(f"{name(i)} has {r['chips']} chips, jax sees {r['local']}; restart it")
    for key in ("platform", "kind", "local"):
        text = differing([r[key] for r in reports], f"jax's {key}")
        wrong += [f"{text}; restart or recreate these hosts"] if text else []
    total = sum(r["local"] for r in reports)
    if total != reports[0]["all"]:
        wrong.append(f"hosts have {total} devices, jax sees {reports[0]['all']}; restart all hosts")
    if wanted and total != wanted:
        wrong.append(f"there are {total} devices, --devices={wanted}; another slice, or the flag")
    if "mesh" in config:
        try:
            sharding.make_mesh(config.mesh)
        except UserError as error:
            wrong.append(str(error))
    kind = reports[0]["kind"]
    title = f"devices: {total} x {kind}, {reports[0]['local']} a process"
    return {title: "; ".join(wrong) or None}


def judge_hosts(reports: list[dict], config) -> Checks:
    """Data, disk and memory of every host."""
    name, checks = distributed.name, {}
    if "data" in config:
        wrong = [f"{name(i)}: {r['data']}" for i, r in enumerate(reports) if r["data"]]
        if not wrong and (text := differing([r["records"] for r in reports], "number of records")):
            wrong = [f"{text}; copy the data set again there"]
        counts = ", ".join(f"{k} {n}".strip() for k, n in reports[0]["records"].items())
        checks[f"data: {counts} records, read on every host"] = "; ".join(wrong) or None
    wrong = [
        f"{name(i)} has {free / 1e9:.1f} GB free in {folder}, less than {least / 1e9:.0f}"
        for i, r in enumerate(reports)
        for folder, free, least in r["disk"]
        if free < least
    ]
    checks["disk"] = f"{'; '.join(wrong)}; make room" if wrong else None
    wrong = [
        f"{name(i)} has {r['memory'] / 1e9:.1f} GB of memory free"
        for i, r in enumerate(reports)
        if r["memory"] is not None and r["memory"] < MEMORY
    ]
    return checks | {"memory": f"{'; '.join(wrong)}; end other programs" if wrong else None}


def judge_clock(stamps: list[float], begin: float, end: float) -> Checks:
    """`stamps` were all taken while process 0's clock went from `begin` to `end`."""
    off = [max(begin - s, s - end, 0.0) for s in stamps]
    odd = [f"{distributed.name(i)} by {x:.0f} s" for i, x in enumerate(off) if x > CLOCK]
    cure = "turn on NTP there (timedatectl set-ntp true)"
    return {"clock": f"differs from process 0's: {', '.join(odd)}; {cure}" if odd else None}
