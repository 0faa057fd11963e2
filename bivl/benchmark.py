"""Speed of a config: `python -m bivl.benchmark --config=FILE [--steps=N] [--json] [--config.a=v]`.

Runs the very step and input pipeline that training runs and prints step time, wait for data,
examples/s, FLOPs per step, memory and, where the chip's peak is known, MFU. `--input` times the
pipeline alone; `--trace=DIR` writes a profile of the timed steps, for TensorBoard or Perfetto.
"""

import contextlib
import json
import logging
import resource
import time

import jax
import numpy as np

from bivl import train
from bivl.core import cli, distributed, memory, metrics, sharding
from bivl.core import state as states

FLAGS = {
    "--steps": {"type": int, "default": 20, "help": "updates to time, after 2 to warm up"},
    "--input": {"action": "store_true", "help": "the input pipeline alone, without a step"},
    "--trace": {"metavar": "DIR", "help": "profile the last of the timed steps into DIR"},
    "--json": {"action": "store_true", "help": "one JSON object on standard output"},
}


TRACED = 3  # steps in a profile: more only make it larger


def measure_input(config, num_steps: int) -> dict:
    """Numbers of the pipeline alone: batches of this process, after 2 to warm up.

    CPU seconds are those of all threads, so that examples / cpu_seconds are those of one core.
    """
    program = train.build(config)
    with contextlib.closing(train.open_batches(config, program, 0)) as batches:
        for _ in range(2):
            next(batches)
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            next(batches)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    examples = num_steps * config.batch_size / jax.process_count()
    return {
        "batch_size": config.batch_size,
        "batches": num_steps,
        "threads": config.loader.threads,
        "workers": config.loader.workers,
        "batch_seconds": seconds / num_steps,
        "examples_per_second": examples / seconds,
        # The CPU time of workers is not this process's.
        "examples_per_core_second": 0.0 if config.loader.workers else examples / cpu,
    }


def measure(config, num_steps: int, trace: str | None = None) -> dict:
    """Numbers of one config on this machine's devices: seconds, examples, FLOPs, bytes.

    trace: a folder for a profile of the last few steps, whose times are then not typical.
    """
    program = train.build(config)
    with sharding.use(program.mesh):
        state = states.create(program.objective, program.tx, program.mesh, config.seed)
        begin = time.perf_counter()
        compiled = program.compile()
        compile_seconds = time.perf_counter() - begin
        batches = iter(train.open_batches(config, program, 0))
        times, waits, cpu = [], [], 0.0
        for n in range(1, num_steps + 3):
            if trace and n == max(num_steps + 3 - TRACED, 3):
                jax.profiler.start_trace(trace)
            start, cpu_start = time.perf_counter(), time.process_time()
            batch, _ = next(batches)
            waits.append(time.perf_counter() - start)
            batch = sharding.to_global(batch, program.mesh, program.sizes)
            state, values = compiled(state, batch, np.int32(n))
            jax.block_until_ready(values)
            times.append(time.perf_counter() - start)
            cpu += (time.process_time() - cpu_start) if n > 2 else 0
        if trace:
            jax.profiler.stop_trace()
        return _report(config, program, compiled, times[2:], waits[2:], cpu, compile_seconds)


def _report(config, program, compiled, times, waits, cpu, compile_seconds) -> dict:
    memory, device = compiled.memory_analysis(), jax.devices()[0]
    seconds, work = float(np.median(times)), program.flops()
    report = {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "batch_size": config.batch_size,
        "steps": len(times),
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "step_seconds_min": float(min(times)),
        "step_seconds_max": float(max(times)),
        "cpu_seconds": cpu / len(times),
        "data_wait_seconds": float(np.mean(waits)),
        "examples_per_second": config.batch_size / seconds,
        "flops_per_step": work,
        "flops_per_second": work / seconds,
    }
    if memory is not None:
        report["step_bytes_per_device"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    report["peak_bytes"] = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    top = metrics.peak_flops(device.device_kind)
    if top:
        report["mfu"] = work / seconds / top / jax.device_count()
    return report


def main(argv) -> None:
    """The command line."""
    args, config = cli.parse(argv, __doc__, FLAGS | distributed.FLAGS)
    memory.keep()
    distributed.start(args)
    if args.json:
        logging.getLogger("bivl").setLevel(logging.WARNING)
    steps = max(args.steps, 1)
    report = measure_input(config, steps) if args.input else measure(config, steps, args.trace)
    if jax.process_index() == 0:
        if args.json:
            print(json.dumps(report))
        else:
            for name, value in report.items():
                print(f"{name:24} {value if isinstance(value, str | int) else f'{value:,.4g}'}")


if __name__ == "__main__":
    cli.run(main)
