"""Several processes: started by flags, or found from the environment of a cluster."""

import logging
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from bivl.core.errors import UserError

log = logging.getLogger("bivl")

FLAGS = {
    "--coordinator": {"metavar": "HOST:PORT", "help": "process 0's address, for several processes"},
    "--num_processes": {"type": int, "help": "how many processes there are"},
    "--process_id": {"type": int, "help": "this process, from 0"},
}


def _cluster() -> bool:
    """Whether the environment names more than one host (Cloud TPU, GKE or SLURM)."""
    return (
        "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or int(os.environ.get("SLURM_NTASKS", 1)) > 1
    )


def start(args) -> None:
    """Joins the other processes, if the flags or the environment name any."""
    given = [args.coordinator, args.num_processes, args.process_id]
    if all(value is None for value in given):
        if _cluster():
            jax.distributed.initialize()
    elif any(value is None for value in given):
        raise UserError("pass --coordinator, --num_processes and --process_id together, or none")
    elif not 0 <= args.process_id < args.num_processes:
        raise UserError(f"--process_id={args.process_id} must lie in [0, {args.num_processes})")
    elif not args.coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={args.coordinator} must be HOST:PORT")
    elif args.num_processes > 1:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    if jax.process_count() > 1:
        log.info("process %d of %d", jax.process_index(), jax.process_count())


def to_host(tree):
    """Global arrays in any pytree -> numpy, whole, the same in every process."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def total(value: int) -> int:
    """Sum of a local number over all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int64(value)).sum())
