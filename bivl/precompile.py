"""Compiles a config's training step for TPUs that are not there, and says what it will cost.

    python -m bivl.precompile --config=FILE --topology=v5e:4x4 [--num_slices=2] [--json]

Compiles the very step that `train` runs, with the TPU's own compiler (libtpu, which needs no TPU),
in a child process: memory of a chip by what it is for, FLOPs, bytes moved, collectives, and how
long a step takes at least. Takes minutes. A step that needs more memory than a chip has ends with
the report, what to try, and exit code 2.
"""

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies as compile_only

from bivl import train
from bivl.core import cli, report, sharding, topologies
from bivl.core.errors import UserError

log = logging.getLogger("bivl")

FLAGS = {
    "--topology": {"required": True, "help": "chip and shape of a slice, v5e:4x4 or v5p:4x4x8"},
    "--num_slices": {
        "type": int,
        "default": 1,
        "help": "slices, joined by the data center network",
    },
    "--json": {"action": "store_true", "help": "one JSON object on standard output"},
    "--timeout": {"type": int, "default": 7200, "help": "seconds that compiling may take"},
    "--hlo": {"help": "file to write the compiled program's text to"},
    "--inside": {"help": argparse.SUPPRESS},  # where the child leaves what it found
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu waits for a metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # else libtpu complains that it finds none
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def devices_of(topology: topologies.Topology) -> list:
    """Devices that can only be compiled for."""
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # as it runs: a chip's two cores as one device
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        found = compile_only.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:  # of several types, none of them documented
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"--topology={name}: libtpu refuses it ({cause}); use another") from None
    return list(found)


def _leaves(tree) -> list[tuple]:
    """Arrays with shardings -> [path, shape, shape of a chip's part, bytes of a value]."""
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            x.shape,
            x.sharding.shard_shape(x.shape),
            x.dtype.itemsize,
        )
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _changed(program: train.Program, lowered) -> list[tuple[str, str]]:
    """Arrays of the state that leave the step with another shape or dtype than they came with."""
    before = jax.tree_util.tree_flatten_with_path(program.abstract)[0]
    after = jax.tree.leaves(lowered.out_info[0])
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), f"{b.dtype}{list(b.shape)}")
        for (path, a), b in zip(before, after, strict=True)
        if (a.shape, a.dtype) != (b.shape, b.dtype)
    ]


def compile_here(config, topology: topologies.Topology, directory: Path) -> None:
    """Compiles, and writes facts.json and step.hlo to `directory`."""
    program = train.build(config, devices_of(topology))
    placed = list(program.mesh.devices.flat)
    batch, mesh = program.example_batch(), dict(program.mesh.shape)
    parts = mesh["data"] * mesh["fsdp"] * config.optimizer.accumulate
    facts = {
        "mesh": mesh,
        "coords": [getattr(d, "coords", ()) for d in placed],
        "slices": [getattr(d, "slice_index", None) or 0 for d in placed],
        "batch_size": config.batch_size,
        "accumulate": config.optimizer.accumulate,
        "rows": [size // parts for size in jax.tree.leaves(program.sizes)],
        "gather": config.mesh.gather,
        "remat": config.model.get("remat", "none") if "model" in config else "none",
        "leaves": _leaves(program.abstract) + _leaves({"batch": batch}),
        "error": None,
        "memory": None,
        "text_error": None,
    }
    begin = time.monotonic()
    with sharding.use(program.mesh):
        facts["flops"] = program.flops()
        lowered = program.step.lower(program.abstract, batch, np.int32(1))
        facts["changed"] = _changed(program, lowered)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if report.out_of_memory(str(error)) is None:
                raise
            facts["error"], compiled = str(error), None
    facts["compile_seconds"] = time.monotonic() - begin
    if compiled is not None:
        m = compiled.memory_analysis()
        facts["memory"] = {
            "argument": m.argument_size_in_bytes,
            "temp": m.temp_size_in_bytes,
            "code": m.generated_code_size_in_bytes,
            "peak": getattr(m, "peak_memory_in_bytes", 0),
        }
        try:
            (directory / "step.hlo").write_text(compiled.as_text())
        except Exception as error:  # seen for v5p: an internal error of the printer
            facts["text_error"] = " ".join(str(error).split())[:300]
    (directory / "facts.json").write_text(json.dumps(facts))


def in_child(argv: list[str], directory: Path, timeout: int) -> None:
    """Runs `compile_here` in a process of its own, which libtpu may take down with it."""
    environment = {**ENVIRONMENT, **os.environ, "JAX_PLATFORMS": "cpu"}
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # of this machine's devices
        environment.pop(name, None)
    command = [sys.executable, "-m", "bivl.precompile", *argv, f"--inside={directory}"]
    term = cli.Termination()  # else SIGTERM would leave the child behind
    with (directory / "log").open("w") as out, term.interruptible():
        try:
            done = subprocess.run(
                command, env=environment, stdout=out, stderr=out, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"compiling took longer than --timeout={timeout} s; raise it, or set "
                "--config.model.scan=True, which compiles one layer for all"
            ) from None
    term.close()
    said = (directory / "log").read_text(errors="replace").strip()
    last = said.splitlines()[-1] if said else "no message"
    if done.returncode == 2:
        raise UserError(last.removeprefix("error: "))
    if done.returncode:
        log.warning("%s", said[-4000:])
        raise RuntimeError(f"the compiling process ended with {done.returncode}: {last}")


def main(argv) -> None:
    """The command line."""
    args, config = cli.parse(argv, __doc__, FLAGS)
    topology = topologies.parse(args.topology, args.num_slices)
    if args.inside:
        return compile_here(config, topology, Path(args.inside))
    if not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise UserError("precompile needs libtpu; pip install 'bivl[precompile]'")
    if not args.json:
        log.info("compiling for %s, which takes minutes", topology.name)
    with tempfile.TemporaryDirectory(prefix="bivl-precompile-") as folder:
        directory = Path(folder)
        in_child(argv, directory, args.timeout)
        facts = json.loads((directory / "facts.json").read_text())
        text = directory / "step.hlo"
        text = text.read_text() if text.exists() else None
    if args.hlo and text:
        Path(args.hlo).write_text(text)
    found = report.analyse(facts, text, topology)
    print(json.dumps(found) if args.json else report.render(found), flush=True)
    if not found["fits"]:
        raise UserError(
            f"the step needs more memory than a chip of {topology.name} has; "
            f"try {found['suggestions'][0]}"
        )


if __name__ == "__main__":
    cli.run(main)
