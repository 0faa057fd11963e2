"""launch/tpu.sh and launch/worker.sh from end to end, against a stand-in for gcloud."""

import os
import shutil
import signal
import subprocess
import time

import pytest

POD = ("--name=pod", "--zone=us-east5-b", "--type=v6e-16")
TWO = (*POD, "--slices=2")


def lines(cloud, name):
    """The lines of a file of the cloud's folder."""
    path = cloud.folder / name
    return path.read_text().split() if path.exists() else []


def wait_for(process, condition):
    """Until `condition()` holds."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_help_names_every_command(cloud):
    out, _ = cloud.run("tpu.sh", "help")
    for command in ["create", "queue", "setup", "run", "logs", "status", "stop", "delete"]:
        assert f"\n  {command} " in out
    assert cloud.run("tpu.sh")[0] == cloud.run("tpu.sh", "run", "--help")[0] == out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fly"], "command fly is unknown"),
        (["create"], "--name is missing"),
        (["create", "--name=pod"], "--zone is missing"),
        (["create", *POD[:2]], "--type is missing"),
        (["setup", "--name=Pod", POD[1]], "--name=Pod"),
        (["setup", "--name=pod;ls", POD[1]], "--name=pod;ls"),
        (["setup", POD[0], "--zone=moon"], "--zone=moon"),
        (["create", *POD[:2], "--type=v6e"], "--type=v6e"),
        (["create", *POD, "--slices=0"], "--slices=0"),
        (["create", *POD, "--slices=x"], "--slices=x"),
        (["create", *POD, "--spto"], "--spto"),
        (["create", *POD, "--spot", "--reserved"], "--spot and --reserved"),
        (["create", *TWO, "--preemptible"], "--preemptible"),
        (["setup", *POD, "--bucket=gs://mine"], "--bucket=gs://mine"),
        (["logs", *POD, "--worker=all"], "--worker=all"),
        (["logs", *TWO, "--slice=2"], "--slice=2"),
        (["run", *POD], "nothing to run"),
        (["run", *POD, "python"], "'python' is not expected"),
        (["run", *POD, "--retries=-1", "--", "x"], "--retries=-1"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_called(cloud, arguments, named):
    out, err = cloud.run("tpu.sh", *arguments, code=2)
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert named in err
    assert not cloud.calls("gcloud")


def test_a_missing_gcloud_is_named(cloud):
    for tool in ("bash", "dirname"):  # all that is on the PATH
        (cloud.folder / tool).symlink_to(shutil.which(tool))
    _, err = cloud.run("tpu.sh", "status", *POD, code=2, PATH=str(cloud.folder))
    assert "gcloud is not on PATH" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("tpu-vm create pod", "--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-16")),
        (("--spot", "--project=mine"), ("tpu-vm create pod", "--spot", "--project=mine")),
        (("--type=v4-32",), ("tpu-vm create", "--version=tpu-ubuntu2204-base")),
        (("--type=v5p-32",), ("tpu-vm create", "--version=v2-alpha-tpuv5 ")),
        (("--runtime=other",), ("tpu-vm create", "--version=other")),
        (("--preemptible", "--network=n"), ("tpu-vm create", "--preemptible", "--network=n")),
        (("--queue",), ("queued-resources create pod", "--node-id=pod", "--runtime-version=v2")),
        (("--slices=2", "--spot"), ("queued-resources create", "--node-count=2", "--spot")),
    ],
)
def test_create_asks_for_what_the_flags_say(cloud, flags, words):
    cloud.run("tpu.sh", "create", *POD, *flags)
    (call,) = cloud.calls(" create ")
    assert all(word in f"{call} " for word in words), call
    assert "--zone=us-east5-b" in call


def test_flags_may_be_variables(cloud):
    env = {"NAME": "other", "ZONE": "us-east5-a", "TYPE": "v4-8", "SPOT": "1"}
    cloud.run("tpu.sh", "create", "--zone=us-east5-b", **env)
    assert cloud.calls("create other", "--zone=us-east5-b", "--spot", "v4-8")


def test_a_queue_is_waited_for_and_its_failure_told(cloud):
    out, _ = cloud.run("tpu.sh", "queue", *TWO)
    assert out.index("WAITING_FOR_RESOURCES") < out.index("PROVISIONING") < out.index("ACTIVE")
    assert lines(cloud, "state/pod-0") == lines(cloud, "state/pod-1") == ["READY"]
    cloud.run("tpu.sh", "delete", *TWO, "--yes")
    assert cloud.calls("queued-resources delete pod", "--force", "--quiet")
    assert not list((cloud.folder / "state").iterdir())
    _, err = cloud.run("tpu.sh", "queue", *TWO, code=1, QUEUE_STATES="PROVISIONING FAILED")
    assert err == "error: the request pod is FAILED; launch/tpu.sh status says why\n"


def test_delete_asks(cloud):
    cloud.run("tpu.sh", "create", *POD)
    _, err = cloud.run("tpu.sh", "delete", *POD, code=2, typed="n\n")
    assert "nothing is deleted" in err and lines(cloud, "state/pod") == ["READY"]
    cloud.run("tpu.sh", "delete", *POD, typed="y\n")
    assert not lines(cloud, "state/pod")


def test_a_run_from_nothing_to_its_end(cloud):
    """Created, set up on all four hosts, run on all of them; shown once."""
    program = cloud.program('echo "$HOST $*" >> "$CLOUD/ran"; echo "log of $HOST"')
    cloud.run("tpu.sh", "create", *TWO)
    cloud.run("tpu.sh", "setup", *TWO)
    assert cloud.calls("python -m pip install", "--editable .")  # the four share one environment
    assert len(cloud.calls("python -m pip install", "jax[tpu]")) == 4
    hosts = [cloud.folder / "hosts" / f"pod-{i}" / str(j) for i in (0, 1) for j in (0, 1)]
    assert all((host / "bivl/bivl/train.py").is_file() for host in hosts)
    assert not any((host / "bivl/.git").exists() for host in hosts)
    out, _ = cloud.run("tpu.sh", "run", *TWO, "--", program, "a b", "$HOME", "--x=*")
    names = [f"pod-{i}-w-{j}" for i in (0, 1) for j in (0, 1)]
    ran = (cloud.folder / "ran").read_text().splitlines()
    assert sorted(ran) == [f"{name} a b $HOME --x=*" for name in names]
    assert out.count("log of") == 1 and "log of pod-0-w-0" in out and "== done" in out
    out, _ = cloud.run("tpu.sh", "status", *TWO)
    assert out.count("ended with code 0: log of") == 4 and "pod-1: READY" in out


def test_setup_replaces_the_tree_and_keeps_what_was_written(cloud, tmp_path):
    """A small tree of its own, that changes between the two."""
    root, cloud.tree = cloud.tree, tmp_path / "tree"
    shutil.copytree(root / "launch", cloud.tree / "launch")
    for name in ("requirements.txt", "pyproject.toml", ".gitignore"):
        shutil.copy(root / name, cloud.tree)
    subprocess.run(["git", "init", "--quiet"], cwd=cloud.tree, check=True)
    for name in ("old.py", "a folder/old $HOME.py", "bucket/mounted", "run/log"):
        (cloud.tree / name).parent.mkdir(exist_ok=True)
        (cloud.tree / name).write_text("laptop")
    cloud.run("tpu.sh", "create", *POD)
    cloud.run("tpu.sh", "setup", *POD)
    there = cloud.folder / "hosts/pod/0/bivl"
    assert (there / "old.py").exists() and (there / "a folder/old $HOME.py").exists()
    assert not (there / "bucket").exists() and not (there / "run/log").exists()
    written = ["runs/first/checkpoints/500", "data/a", "launch/x", "run/log", "bucket/a", ".venv/x"]
    for name in written:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("")
    for name in ("old.py", "a folder/old $HOME.py"):
        (cloud.tree / name).unlink()
    (cloud.tree / "new.py").write_text("")
    cloud.run("tpu.sh", "setup", *POD)
    assert (there / "new.py").exists()
    assert not (there / "old.py").exists() and not (there / "a folder/old $HOME.py").exists()
    assert all((there / name).exists() for name in written)


def ready(cloud, text):
    """A pod that is set up, and the path of a program."""
    cloud.run("tpu.sh", "create", *POD)
    cloud.run("tpu.sh", "setup", *POD)
    return cloud.program(text)


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_fail_again_is_not_tried_again(cloud, code):
    program = ready(cloud, f'echo . >> "$CLOUD/tries"; echo "error: cause" >&2; exit {code}')
    _, err = cloud.run("tpu.sh", "run", *POD, "--spot", "--", program, code=code)
    assert len(lines(cloud, "tries")) == 2  # once on either host
    assert "pod-w-1: error: cause" in err


def test_a_failure_is_tried_again_and_three_at_once_end_it(cloud):
    text = 'echo . >> "$CLOUD/tries-$HOST"; (($(wc -l < "$CLOUD/tries-$HOST") > 2))'
    program = ready(cloud, text)
    cloud.run("tpu.sh", "run", *POD, "--", program)
    assert len(lines(cloud, "tries-pod-w-0")) == 3
    program = cloud.program('echo . >> "$CLOUD/again-$HOST"; exit 7')
    out, _ = cloud.run("tpu.sh", "run", *POD, "--spot", "--", program, code=7)
    assert "three times" in out and len(lines(cloud, "again-pod-w-0")) == 3
    program = cloud.program('echo . >> "$CLOUD/never"; exit 7')
    cloud.run("tpu.sh", "run", *POD, "--retries=0", "--", program, code=1)
    assert len(lines(cloud, "never")) == 2


@pytest.mark.parametrize("flags", [(), ("--slices=2",)])
def test_a_slice_that_is_taken_away_is_made_again(cloud, flags):
    """The first time it is preempted, and at first there is no other; the program runs again."""
    first = "pod-0" if flags else "pod"
    text = f"""
    echo . >> "$CLOUD/tries-$HOST"
    (($(wc -l < "$CLOUD/tries-$HOST") < 2)) || exit 0
    echo PREEMPTED > "$CLOUD/state/{first}"; exit 143"""
    cloud.run("tpu.sh", "create", *POD, *flags)
    cloud.run("tpu.sh", "setup", *POD, *flags)
    (cloud.folder / "refuse").touch()
    program = cloud.program(text)
    out, _ = cloud.run("tpu.sh", "run", *POD, *flags, "--spot", "--", program)
    assert "recreating pod" in out and "== done" in out
    assert len(lines(cloud, f"tries-{first}-w-1")) == 2
    assert len(cloud.calls(" delete pod")) == 1
    creations = cloud.calls(" create pod")
    assert len(creations) == (2 if flags else 3)
    assert "--spot" in creations[-1]  # by `run`, as its flags say
    assert (cloud.folder / "hosts" / first / "1/bivl/bivl/train.py").is_file()


def test_a_run_creates_what_is_not_there(cloud):
    program = cloud.program('echo . >> "$CLOUD/ran"')
    cloud.run("tpu.sh", "run", *POD, "--", program)
    assert len(lines(cloud, "ran")) == 2
    cloud.run("tpu.sh", "delete", *POD, "--yes")
    _, err = cloud.run("tpu.sh", "run", *POD[:2], "--", program, code=2)
    assert "pass --type" in err


WAITS = """
trap 'echo "saved $HOST" >> "$CLOUD/saved"; kill $!; exit 143' TERM
echo "begun $HOST" >> "$CLOUD/begun"
sleep 300 & wait"""


def test_stop_lets_it_save_and_ends_the_run(cloud):
    process = cloud.start("tpu.sh", "run", *POD, "--spot", "--", ready(cloud, WAITS))
    wait_for(process, lambda: len(lines(cloud, "begun")) == 4)  # two words a host
    out, _ = cloud.run("tpu.sh", "status", *POD)
    assert out.count(": runs") == 2
    out, _ = cloud.run("tpu.sh", "stop", *POD)
    assert out.count("ended with code 143") == 2
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(lines(cloud, "saved")) == 4 and len(lines(cloud, "begun")) == 4
    out, _ = cloud.run("tpu.sh", "stop", *POD)
    assert out.count("nothing runs") == 2


@pytest.mark.parametrize("notice", ["TRUE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_a_notice_of_the_host_lets_it_save(cloud, notice):
    """Preemption, and maintenance."""
    program = ready(cloud, WAITS + "\n")
    process = cloud.start("tpu.sh", "run", *POD, "--retries=0", "--", program)
    wait_for(process, lambda: len(lines(cloud, "begun")) == 4)
    for host in ("pod-w-0", "pod-w-1"):
        (cloud.folder / "notices" / host).write_text(notice)
    out, _ = process.communicate(timeout=120)
    assert "pod-w-0 is about to be taken away" in out and "ended with code 143" in out
    assert len(lines(cloud, "saved")) == 4


def test_a_program_outlives_the_connection_and_is_followed_again(cloud):
    program = ready(cloud, 'echo . >> "$CLOUD/begun"; until [ -f "$CLOUD/go" ]; do sleep 0.1; done')
    known = len(cloud.calls("hostname pod"))  # a host is asked its name before it is followed
    process = cloud.start("tpu.sh", "run", *POD, "--", program)
    wait_for(process, lambda: len(lines(cloud, "begun")) == 2)
    wait_for(process, lambda: len(cloud.calls("hostname pod")) == known + 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = cloud.start("tpu.sh", "run", *POD, "--", program)
    wait_for(again, lambda: len(cloud.calls("hostname pod")) == known + 4)
    (cloud.folder / "go").touch()
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "== done" in out
    assert len(lines(cloud, "begun")) == 2


GOES_ON = 'echo . >> "$CLOUD/begun"; until [ -f "$CLOUD/go" ]; do sleep 0.1; done'


def test_a_connection_that_breaks_costs_nothing(cloud):
    """A laptop sleeps: gcloud answers nothing, and the slice and its program are as they were."""
    program = ready(cloud, GOES_ON)
    known = len(cloud.calls("hostname pod"))
    process = cloud.start("tpu.sh", "run", *POD, "--spot", "--", program)
    wait_for(process, lambda: len(cloud.calls("hostname pod")) == known + 2)
    asked, copied = len(cloud.calls("describe")), len(cloud.calls(" scp "))
    (cloud.folder / "offline").touch()
    os.kill(int((cloud.folder / "connection-pod").read_text()), signal.SIGKILL)
    wait_for(process, lambda: len(cloud.calls("describe")) > asked + 4)
    _, err = cloud.run("tpu.sh", "recreate", *POD, code=2)
    assert "gcloud does not say what pod is" in err
    (cloud.folder / "offline").unlink()
    wait_for(process, lambda: len(cloud.calls("hostname pod")) == known + 4)
    (cloud.folder / "go").touch()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "pod is UNKNOWN" in out and "== done" in out
    assert "ConnectionError" in err and len(lines(cloud, "begun")) == 2
    assert len(cloud.calls(" create pod")) == 1 and not cloud.calls(" delete pod")
    assert len(cloud.calls(" scp ")) == copied


def test_setup_leaves_the_tree_of_a_program_that_runs(cloud):
    program = ready(cloud, GOES_ON)
    process = cloud.start("tpu.sh", "run", *POD, "--", program)
    wait_for(process, lambda: len(lines(cloud, "begun")) == 2)
    written = cloud.folder / "hosts/pod/0/bivl/README.md"
    written.write_text("as it was")
    _, err = cloud.run("tpu.sh", "setup", *POD, code=2)
    assert "error: a program runs on pod-w-0; end it first" in err
    assert written.read_text() == "as it was"
    (cloud.folder / "go").touch()
    process.communicate(timeout=120)


@pytest.mark.parametrize("runs", [False, True])
def test_a_slice_that_is_repaired_is_waited_for(cloud, runs):
    """It is set up again, as its disk may be new; but not under a program that still runs."""
    program = ready(cloud, GOES_ON)
    known, copied = len(cloud.calls("hostname pod")), len(cloud.calls(" scp "))
    process = cloud.start("tpu.sh", "run", *POD, "--", program)
    wait_for(process, lambda: len(cloud.calls("hostname pod")) == known + 2)
    asked = len(cloud.calls("describe"))
    (cloud.folder / "state/pod").write_text("REPAIRING\n")
    os.kill(int((cloud.folder / "connection-pod").read_text()), signal.SIGKILL)
    wait_for(process, lambda: len(cloud.calls("describe")) > asked + 2)
    if not runs:
        (cloud.folder / "go").touch()
        hosts = [cloud.folder / f"hosts/pod/{i}/bivl/run/code" for i in (0, 1)]
        wait_for(process, lambda: all(host.exists() for host in hosts))
    (cloud.folder / "state/pod").write_text("READY\n")
    wait_for(process, lambda: len(cloud.calls("hostname pod")) >= known + 4)
    (cloud.folder / "go").touch()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "pod is COMING" in out
    assert len(cloud.calls(" scp ")) == copied + (not runs)
    assert len(cloud.calls(" create pod")) == 1 and not cloud.calls(" delete pod")


def test_a_request_keeps_its_place_in_the_queue(cloud):
    """`run` before the slices are there waits for them; one that failed is made again."""
    cloud.run("tpu.sh", "queue", *TWO)
    for name in ("pod-0", "pod-1"):
        (cloud.folder / "state" / name).unlink()
        shutil.rmtree(cloud.folder / "hosts" / name)
    (cloud.folder / "queue-pod").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE\n")
    program = cloud.program('echo . >> "$CLOUD/ran"')
    out, _ = cloud.run("tpu.sh", "run", *TWO, "--", program)
    assert "pod is COMING" in out and len(lines(cloud, "ran")) == 4
    assert len(cloud.calls(" create pod")) == 1 and not cloud.calls(" delete pod")
    for name in ("pod-0", "pod-1"):
        (cloud.folder / "state" / name).write_text("PREEMPTED\n")
    (cloud.folder / "queue-pod").write_text("SUSPENDING SUSPENDED\n")
    cloud.run("tpu.sh", "run", *TWO, "--", program)
    assert len(lines(cloud, "ran")) == 8
    assert len(cloud.calls(" create pod")) == 2 and len(cloud.calls(" delete pod")) == 1
