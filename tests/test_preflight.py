"""preflight: what it finds in reports, in one process, and in several that really meet."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import runs
from bivl import preflight
from bivl.core import distributed, pod
from bivl.core.errors import Late, UserError

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds that no process may exceed


@pytest.fixture
def own():
    """What two healthy hosts report."""
    report = preflight.report(ConfigDict(), None) | pod.devices()
    report["settings"] = dict.fromkeys(report["settings"], "")
    report |= {"chips": 4, "platform": "tpu", "kind": "TPU v6 lite", "local": 4, "all": 8}
    return [json.loads(json.dumps(report)) for _ in range(2)]


def wrong(checks):
    """The texts of what is wrong."""
    return " | ".join(text for text in checks.values() if text)


def test_nothing_is_wrong_with_two_equal_hosts(own):
    assert not wrong(pod.judge_software(own))
    assert not wrong(pod.judge_devices(own, ConfigDict(), 8))
    assert not wrong(pod.judge_hosts(own, ConfigDict({"data": {}})))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"versions": {"jaxlib": "0.1"}}, ("jaxlib is", "but 0.1 on process 1", "tpu.sh setup")),
        ({"versions": {"libtpu": "9"}}, ("libtpu", "process 1")),
        ({"settings": {"XLA_FLAGS": "--x"}}, ("XLA_FLAGS is absent, but --x on process 1",)),
        ({"config": "other"}, ("config is", "process 1", "same command")),
        ({"workdir": "/other"}, ("workdir is None, but /other on process 1",)),
        ({"platform": "cpu"}, ("process 1 has 4 chips but jax uses the CPU", "jax[tpu]")),
        ({"local": 3}, ("process 1 has 4 chips, jax sees 3", "hosts have 7 devices, jax sees 8")),
        ({"kind": "TPU v4"}, ("jax's kind is TPU v6 lite, but TPU v4 on process 1",)),
        ({"data": "no such folder; pass one"}, ("process 1: no such folder; pass one",)),
        ({"records": {"": 7}}, ("number of records", "process 1")),
        ({"disk": [["/full", 1e8, 5e9]]}, ("process 1 has 0.1 GB free in /full",)),
        ({"memory": 1e8}, ("process 1 has 0.1 GB of memory free",)),
    ],
)
def test_a_difference_is_named_with_its_process_and_cure(own, change, named):
    for key, value in change.items():
        own[1][key] = own[1][key] | value if key in ("versions", "settings") else value
    config = ConfigDict({"data": {}})
    checks = pod.judge_software(own) | pod.judge_hosts(own, config)
    text = wrong(checks | pod.judge_devices(own, config, None))
    assert all(part in text for part in named), text
    assert "process 0 " not in text and "\n" not in text


def test_devices_are_compared_with_what_is_wanted(own):
    assert "--devices=16" in wrong(pod.judge_devices(own, ConfigDict(), 16))
    mesh = ConfigDict({"mesh": {"data": 3, "fsdp": 1, "tensor": 1}})
    assert "needs 3 devices" in wrong(pod.judge_devices(own, mesh, None))


@pytest.mark.parametrize(
    ("stamps", "named"),
    [((100.0, 130.0), None), ((94.9, 130.0), "process 0"), ((110.0, 195.1), "process 1 by 65 s")],
)
def test_clocks_are_wrong_beyond_doubt_only(stamps, named):
    """All stamps were taken while process 0's clock went from 100 to 130."""
    (text,) = pod.judge_clock(list(stamps), 100.0, 130.0).values()
    assert (named in text) if named else text is None


def test_one_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pod, "DISK", 1.0)
    monkeypatch.setattr(pod, "MEMORY", 1.0)
    workdir = tmp_path / "deep" / "run"
    preflight.main([*runs.arguments(), f"--workdir={workdir}", "--devices=8"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.startswith("ok: ") for line in lines)
    assert not list(tmp_path.iterdir())  # nothing is left


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices=9"], "devices: there are 8 devices, --devices=9"),
        (["--workdir=FILE/run"], "workdir FILE/run: process 0"),
        (["--config.data.kind=folder", "--config.data.dir=GONE"], "data: process 0"),
    ],
)
def test_what_is_wrong_is_a_line_and_exit_code_2(tmp_path, capsys, arguments, named):
    (tmp_path / "file").write_text("")
    arguments = [x.replace("FILE", str(tmp_path / "file")) for x in arguments]
    with pytest.raises(UserError, match="found something wrong"):
        preflight.main([*runs.arguments(), *arguments])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("wrong: ")]
    assert named.replace("FILE", str(tmp_path / "file")) in " ".join(lines)


@pytest.mark.parametrize("arguments", [["--workdir=gs://bucket/run"], ["--seconds=0"], ["--x"]])
def test_mistakes(arguments):
    with pytest.raises(UserError, match=arguments[0].partition("=")[0]):
        preflight.main(arguments)


# Several processes.


@pytest.fixture
def start(tmp_path):
    """A function that starts process `i` of `count` in Python, after some `code`."""
    started = []
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def run(i, count, *arguments, code="", program="preflight"):
        flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
        text = f"import socket; socket.gethostname = lambda: 'host-{i}'\n"
        text += f"from bivl import {program} as program\nfrom bivl.core import cli\n{code}\n"
        text += f"cli.run(program.main, {[*arguments, *flags]})"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with open(tmp_path / f"out{i}", "w") as out, open(tmp_path / f"err{i}", "w") as err:
            command = [sys.executable, "-c", text]
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()


def finish(tmp_path, processes, code):
    """Waits for processes -> what each wrote, standard output and error."""
    found = []
    for process in processes:
        process.wait(TIMEOUT)
    for i, process in enumerate(processes):
        out, err = ((tmp_path / f"{kind}{i}").read_text() for kind in ("out", "err"))
        assert process.returncode == code, f"{i}: {process.returncode}\n{out}\n{err}"
        found.append((out, err))
    return found


ENOUGH = "from bivl.core import pod\npod.DISK = pod.MEMORY = 1.0"
OTHER = f"{ENOUGH}\nold = pod.versions\npod.versions = lambda: old() | {{'jax': '0.0.1'}}"


def test_two_processes_and_one_of_another_version(start, tmp_path):
    """All else is well: they share a workdir, read the data and reach each other."""
    arguments = [*runs.arguments({"mesh.data": "2"}), f"--workdir={tmp_path / 'run'}"]
    codes = (ENOUGH, OTHER)
    (out, err), (other_out, other_err) = finish(
        tmp_path, [start(i, 2, *arguments, "--seconds=300", code=codes[i]) for i in range(2)], 2
    )
    lines = [line for line in out.splitlines() if line.startswith(("ok: ", "wrong: "))]
    bad = [line for line in lines if line.startswith("wrong: ")]
    assert len(lines) == 10 and len(bad) == 1
    assert bad[0].startswith("wrong: versions: jax is ") and "process 1 (host host-1)" in bad[0]
    assert err.splitlines()[-1] == other_err.splitlines()[-1]
    assert "wrong: " not in other_out and not (tmp_path / "run").exists()


def test_one_of_three_absent_is_named_by_the_others(start, tmp_path):
    processes = [start(i, 3, "--seconds=20") for i in (0, 1)]
    for out, err in finish(tmp_path, processes, 1):
        assert "wrong: processes: process 2 of 3 did not call process 0 (host host-0)" in out
        assert err.splitlines()[-1].startswith("failed: process 2 of 3") and "Traceback" not in err


@pytest.mark.parametrize("program", ["preflight", "train"])
def test_process_0_absent_is_named(start, tmp_path, program):
    arguments = ["--seconds=3"]
    if program == "train":
        arguments = [*runs.arguments(), f"--workdir={tmp_path / 'run'}"]
    short = "import os; os.environ['BIVL_WAIT_SECONDS'] = '3'"
    process = start(1, 2, *arguments, program=program, code=short)
    assert process.wait(TIMEOUT) == 1
    (line,) = (tmp_path / "err1").read_text().splitlines()
    assert line.startswith("failed: process 1 (host host-1) cannot reach process 0 at 127.0.0.1")
    assert "let the firewall pass that port" in line


LATE = "import time\nold = program.check_clock\nprogram.check_clock = lambda s: time.sleep(s + 30)"


@pytest.mark.meshes
def test_one_that_does_not_come_to_a_barrier_is_named(start, tmp_path):
    processes = [start(i, 2, "--seconds=25", code=("", LATE)[i]) for i in range(2)]
    assert processes[0].wait(TIMEOUT) == 1
    assert "process 1 (host host-1) did not come within 25 s" in (tmp_path / "err0").read_text()


def test_environment_names_processes(monkeypatch):
    """The three variables of jax, whole and sound, or a UserError that names them."""
    args = ConfigDict({"coordinator": None, "num_processes": None, "process_id": None})
    for name, value in zip(distributed.VARIABLES, ("h:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert distributed._given(args) == ("h:1", 4, 3, None)
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=4"):
        distributed._given(args)
    monkeypatch.setenv("BIVL_WAIT_SECONDS", "soon")
    with pytest.raises(UserError, match="BIVL_WAIT_SECONDS=soon"):
        distributed.limit("BIVL_WAIT_SECONDS", 1)


@pytest.fixture
def tpu_vm(monkeypatch):
    """A function: this is a host of a TPU slice whose metadata server gives these answers."""
    from jax._src.clusters import cloud_tpu_cluster

    for name in [*distributed.VARIABLES, "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"]:
        monkeypatch.delenv(name, raising=False)
    for name in [x for x in os.environ if x.startswith(("MEGASCALE_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8476")

    def give(answers):
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))

    return give


SLICES = """ACCELERATOR_TYPE: 'v6e-8'
MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2'
MEGASCALE_NUM_SLICES: '2'
MEGASCALE_SLICE_ID: '1'"""


@pytest.mark.parametrize(
    ("hosts", "slices", "number", "found"),
    [
        ("10.0.0.2", "ACCELERATOR_TYPE: 'v6e-8'", "0", None),
        ("10.0.0.2,10.0.0.3", "", "1", ("10.0.0.2:8476", 2, 1)),
        ("10.0.0.5", SLICES, "0", ("10.0.0.2:8476", 2, 1)),
        ("10.0.0.5,10.0.0.6", SLICES, "1", ("10.0.0.2:8476", 4, 3)),
    ],
)
def test_the_hosts_of_slices_find_each_other(tpu_vm, hosts, slices, number, found):
    answers = {"worker-network-endpoints": hosts, "tpu-env": slices, "agent-worker-number": number}
    tpu_vm(answers)
    ours = distributed._found(3)
    assert found is None if ours is None else ours[:3] == found


def test_a_process_0_without_an_address_is_late(tpu_vm):
    """As while its pod waits for a node."""
    tpu_vm(
        {
            "worker-network-endpoints": "gone.invalid,10.0.0.3",
            "tpu-env": "",
            "agent-worker-number": "1",
        }
    )
    with pytest.raises(Late, match=r"process 0 has no address within 1 s .*gone.invalid.*; start"):
        distributed._found(1)
