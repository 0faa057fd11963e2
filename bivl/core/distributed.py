"""Several processes: started by flags, or found from the environment of a cluster.

Nothing here waits for ever: processes meet within BIVL_WAIT_SECONDS, and one that stands still for
BIVL_STALL_SECONDS while the others go on ends the run. Messages name it and its host.
"""

import atexit
import json
import logging
import os
import re
import socket

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from bivl.core import relay, rollcall, watch
from bivl.core.errors import Late, UserError

log = logging.getLogger("bivl")

FLAGS = {
    "--coordinator": {"metavar": "HOST:PORT", "help": "process 0's address, for several processes"},
    "--num_processes": {"type": int, "help": "how many processes there are"},
    "--process_id": {"type": int, "help": "this process, from 0"},
}
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# jax's own default, 8482, is not among the ports that the firewall of a new TPU slice passes
# (jax issue 35905); 8476 is.
TPU_PORT = "8476"
# Seconds that the last process may compile longer than the first. Where their devices meet for the
# first time they do not wait for each other so long (gloo, on CPUs: 30 s), so the processes do.
COMPILING = 3600.0

_watch: watch.Watch | None = None
_met = False


def limit(name: str, default: float) -> float:
    """Seconds that an environment variable sets."""
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise UserError(f"{name}={text} is not a number of seconds; unset it for {default}")
    return value


def _several_tpu_hosts() -> bool:
    """Whether Cloud TPU has given this host others; slow on TPU VMs alone."""
    slices = "MEGASCALE_COORDINATOR_ADDRESS"  # where there are several, of one host each perhaps
    if "TPU_WORKER_HOSTNAMES" in os.environ or slices in os.environ:  # set by GKE
        return slices in os.environ or "," in os.environ["TPU_WORKER_HOSTNAMES"]
    # jax finds a slice by these, and has nothing public.
    from jax._src.clusters import GceTpuCluster
    from jax._src.clusters.cloud_tpu_cluster import get_tpu_env_value

    try:
        if not GceTpuCluster.is_env_present():
            return False
        return len(GceTpuCluster._get_worker_list_in_slice()) > 1 or bool(get_tpu_env_value(slices))
    except Exception:  # chips in a machine that no server tells about its slice, as in notebooks
        return False


def _found(seconds: float) -> tuple | None:
    """What jax finds by itself on Cloud TPU, GKE and SLURM: address, count, number, devices.

    Late where process 0's host has no address within `seconds`.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    slurm = tasks.isdecimal() and int(tasks) > 1
    if not slurm and not _several_tpu_hosts():
        return None
    if not slurm:
        os.environ.setdefault("JAX_COORDINATOR_PORT", TPU_PORT)
    from jax._src.clusters import ClusterEnv

    detect = ClusterEnv.auto_detect_unset_distributed_params
    try:
        found = detect(None, None, None, None, None, int(seconds))
    except RuntimeError as error:  # a pod has an address when it has a node
        raise Late(
            f"process 0 has no address within {seconds:.0f} s ({error}); "
            "start the same command on every host at once"
        ) from error
    if None in found[:3]:
        cure = "start it with srun" if slurm else "install jax[tpu] on every host"
        raise UserError(
            "the environment names several processes, but jax does not find them; "
            f"{cure}, or pass --coordinator, --num_processes and --process_id"
        )
    return found


def _given(args) -> tuple | None:
    """What the flags say, or else the environment; UserError unless it is whole and possible."""
    address, count, process = args.coordinator, args.num_processes, args.process_id
    names = ("--coordinator", "--num_processes", "--process_id")
    if {address, count, process} == {None} and all(os.environ.get(v) for v in VARIABLES):
        names = VARIABLES
        address, *numbers = (os.environ[v] for v in VARIABLES)
        if not all(number.isdecimal() for number in numbers):
            raise UserError(f"{names[1]} and {names[2]} must be whole numbers; unset or set them")
        count, process = map(int, numbers)
    if {address, count, process} == {None}:
        return None
    if address is None or count is None or process is None:
        raise UserError("pass --coordinator, --num_processes and --process_id together, or none")
    if not 0 <= process < count:
        raise UserError(f"{names[2]}={process} must lie in [0, {count})")
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"{names[0]}={address} must be HOST:PORT")
    return address, count, process, None


def start(args, seconds: float | None = None) -> None:
    """Joins the other processes, if the flags or the environment name any.

    Late in all of them that names who did not come within `seconds` (BIVL_WAIT_SECONDS).
    """
    global _watch
    still, apart = limit("BIVL_STALL_SECONDS", 1800), limit("BIVL_WAIT_SECONDS", 300)
    seconds = apart if seconds is None else seconds
    address, count, process, devices = _given(args) or _found(seconds) or (None, 1, 0, None)
    if count > 1:
        if process:
            hosts, links = rollcall.answer(address, process, count, seconds)
        else:
            port, names = int(address.rpartition(":")[2]), _expected(count)
            hosts, links = rollcall.call(port, count, seconds, names)
        _watch = watch.Watch(process, hosts, links, (still, apart))
        _watch.start()
        door = relay.start(address) if process else address
        # The watch tells who is lost; jax, which names nobody, is to notice later.
        beats = int(still or 1e6) + 600
        jax.distributed.initialize(door, count, process, devices, heartbeat_timeout_seconds=beats)
        atexit.register(_watch.leave)  # runs before jax's own, which waits for the others
        _limit_checkpoints()
        log.info("process %d of %d on %s", process, count, hosts[process])


def _expected(count: int) -> list[str]:
    """The names of the hosts where the environment lists them all."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return hosts if len(hosts) == count else []


def _limit_checkpoints() -> None:
    """Orbax waits for all processes by collectives, without limit, unless this flag is set."""
    import orbax.checkpoint  # noqa: F401 (defines the flag)

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True


def process() -> int:
    """This process's number, without starting the devices."""
    return _watch.process if _watch else 0


def host(process: int) -> str:
    """The host that a process is on."""
    return _watch.hosts[process] if _watch else socket.gethostname()


def name(process: int) -> str:
    """How messages name a process: by number and host."""
    return rollcall.label(process, _watch.hosts if _watch else [socket.gethostname()])


def tick() -> None:
    """Tells the watch that this process has come to a place where all processes meet."""
    if _watch:
        _watch.tick()


def failed(why: str, code: int = 2, ask: bool = False) -> None:
    """Tells the other processes why this one ends; they stop with the same words and exit code.

    Called when it has said so itself. Or before, with `ask`: then it does not return where another
    process is known to be what this one failed of.
    """
    if _watch:
        _watch.leave(why, code, ask)


def _client():
    from jax._src.distributed import global_state  # orbax and others use it too; jax has no other

    return global_state.client


def barrier(what: str, seconds: float | None = None) -> None:
    """Waits for all processes; Late, naming the others, after `seconds` (BIVL_WAIT_SECONDS).

    Who waits here has not gone on: the watch lets the others come within this limit, not its own.
    """
    if jax.process_count() == 1:
        return
    seconds = limit("BIVL_WAIT_SECONDS", 300) if seconds is None else seconds
    try:
        _client().wait_at_barrier(f"bivl: {what}", int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        found = re.search(r"timed out task names:\s*((?:\d+\s+)+)", text)
        if not found:
            raise Late(f"{what}: {' '.join(text.split())[:300]}") from error
        late = ", ".join(name(int(number)) for number in found[1].split()[:8])
        raise Late(f"{what}: {late} did not come within {seconds:.0f} s; look at it") from error
    tick()


def exchange(what: str, value, seconds: float | None = None) -> list:
    """Anything that JSON holds from every process -> the list of all, in every process.

    Each `what` may be used once. Late as for `barrier`. No device takes part.
    """
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    client, folder = _client(), f"bivl/{what}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(value))
    barrier(what, seconds)
    found = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}
    return [json.loads(found[process]) for process in range(jax.process_count())]


def preempted(step: int) -> bool:
    """Whether all processes are to save and stop at `step`, since one had SIGTERM or a notice.

    Every process must ask at every step, and steps must not go back.
    """
    tick()
    return multihost_utils.reached_preemption_sync_point(step)


def to_host(tree):
    """Global arrays in any pytree -> numpy, whole, the same in every process."""
    global _met
    if jax.process_count() > 1:
        if not _met:
            barrier("gather", COMPILING)
            _met = True
        tick()
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def total(what: str, value: int) -> int:
    """Sum of a local number over all processes, see `exchange`."""
    tick()
    return sum(exchange(what, value, COMPILING))
