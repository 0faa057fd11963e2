"""The training loop: `python -m bivl.train --config=FILE[:options] --workdir=DIR [--config.a.b=v]`.

Running the same command again resumes: batch n is a pure function of (config, seed, n) and all else
is in the state, so a run that was killed anywhere goes on as if it had not been.
"""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from flax import linen as nn
from jax.experimental import multihost_utils

from bivl import evaluate, model
from bivl.core import checkpoint, cli, collapse, distributed, flops, metrics, optimizer, sharding
from bivl.core import config as configs
from bivl.core import state as states
from bivl.core import step as steps
from bivl.core.errors import GuardStop, Terminated, UserError
from bivl.core.objective import Objective
from bivl.data import pipeline, sources

log = logging.getLogger("bivl")

FLAGS = {"--workdir": {"required": True, "help": "where the run is written, and resumed from"}}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config compiles to: shared by training, benchmark and ahead-of-time compilation."""

    objective: Objective
    mesh: jax.sharding.Mesh
    tx: Any
    abstract: states.State
    step: Any

    def example_batch(self):
        """The global batch as ShapeDtypeStructs with shardings."""
        place = sharding.batch_sharding(self.mesh)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), self.objective.spec
        )

    def compile(self):
        """The compiled step, a function of (state, batch, n)."""
        return self.step.lower(self.abstract, self.example_batch(), np.int32(1)).compile()

    def flops(self) -> float:
        """Matmul and convolution FLOPs of one update (recomputation by remat included)."""
        return flops.count(self.step, self.abstract, self.example_batch(), np.int32(1))


def build(config, devices=None) -> Program:
    """Config -> program; nothing is allocated yet, and every mistake in sizes is found here."""
    objective = model.make_objective(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    o = config.optimizer
    sharding.check_batch(config.batch_size, o.accumulate, mesh)
    schedule = optimizer.make_schedule(o, config.steps)
    tx = optimizer.make_optimizer(o, schedule)
    abstract = states.abstract(objective, tx, mesh, config.seed)
    options = {"seed": config.seed, "accumulate": o.accumulate}
    step = steps.compile_step(objective, tx, schedule, abstract, **options)
    return Program(objective, mesh, tx, abstract, step)


def open_batches(config, program: Program, start: int):
    """The stream of (batch, records replaced) from batch number `start` on."""
    return pipeline.train_batches(
        sources.open_source(config.data),
        program.objective.train_ops,
        seed=config.seed,
        batch_size=config.batch_size,
        rows=sharding.local_rows(config.batch_size, program.mesh),
        start=start,
        threads=config.loader.threads,
        workers=config.loader.workers,
    )


def check_example(config, program: Program) -> None:
    """One example through the pipeline: a wrong field or shape is found before anything is written."""
    source = sources.open_source(config.data)
    options = {"seed": config.seed, "batch_size": 1, "rows": range(1), "start": 0, "threads": 0}
    batch, _ = next(iter(pipeline.train_batches(source, program.objective.train_ops, **options)))
    for name, spec in program.objective.spec.items():
        got = np.shape(batch.get(name))
        if name not in batch or got[1:] != spec.shape[1:]:
            raise UserError(f"data gives {name!r} of shape {got[1:]}, wanted {spec.shape[1:]}")
    log.info("data: %s", source.describe())


def open_workdir(workdir: Path, config) -> None:
    """Creates the folder with its config.json, or checks that it holds the same run."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder")
    saved = workdir / "config.json"
    if saved.is_file():
        try:
            old = configs.from_dict(json.loads(saved.read_text()))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{saved} cannot be read ({error}); use another --workdir") from error
        configs.check_resume(old, config, workdir)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            temporary = workdir / "config.json.tmp"
            temporary.write_text(configs.to_json(config))
            temporary.replace(saved)
        except OSError as error:
            raise UserError(f"--workdir={workdir} cannot be written: {error}") from error


def start_state(config, program: Program, checkpoints) -> states.State:
    """Restored from the newest whole checkpoint; else created, from `config.init` if that is set."""
    state = checkpoints.restore_newest(program.abstract)
    if state is not None:
        log.info("resumed at step %d", int(state.step))
        return state
    state = states.create(program.objective, program.tx, program.mesh, config.seed)
    if config.init:
        state = checkpoint.load_matching(checkpoint.find(config.init), state)
    return state


class Loop:
    """The loop's running parts, in the order of a step: evaluate, save, draw, update, read."""

    def __init__(self, config, program: Program, workdir: Path, checkpoints, evaluators):
        self.config, self.program, self.workdir = config, program, workdir
        self.checkpoints, self.evaluators = checkpoints, evaluators
        self.state = start_state(config, program, checkpoints)
        self.first = int(self.state.step)
        self.guard = collapse.Guard(**config.guard)
        main = jax.process_index() == 0
        self.writer = metrics.Writer(workdir, self.first, config) if main else None
        self.progress = metrics.Progress(self.first, config.steps) if main else None
        self.peak = metrics.peak_flops(jax.devices()[0].device_kind)
        self.flops = program.flops() / jax.device_count()
        self.timings, self.replaced = metrics.Timings.empty(), 0
        begin = time.monotonic()
        self.step = program.compile()
        log.info("compiled in %.1f s, %.3g FLOPs an update", time.monotonic() - begin, self.flops)

    def read(self, step: int, values, seconds: float, wait: float) -> None:
        """Reads the metrics of update `step` (this waits for it), logs them, asks the guard."""
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        self.timings = self.timings.merge(
            metrics.Timings.single_from_model_output(step_seconds=seconds, data_wait_seconds=wait)
        )
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.log(step, values)
        self.guard.check(step, values)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics."""
        values |= {name: float(value) for name, value in self.timings.compute().items()}
        values["examples_per_second"] = self.config.batch_size / values["step_seconds"]
        if self.peak:
            values["mfu"] = self.flops / values["step_seconds"] / self.peak
        values["records_replaced"] = distributed.total(self.replaced)
        self.timings, self.replaced = metrics.Timings.empty(), 0
        if self.writer:
            self.writer.scalars(step, values)
            self.progress.show(step, values)

    def evaluate(self, step: int) -> None:
        """Runs the evaluators; floats become scalars, arrays pictures."""
        results = self.evaluators(self.state.params, self.state.extras)
        if not self.writer or not results:
            return
        scalars = {k: v for k, v in results.items() if not isinstance(v, np.ndarray)}
        self.writer.scalars(step, scalars, "evaluations")
        for name in results.keys() - scalars.keys():
            self.writer.picture(step, name, results[name])
        log.info("evaluation at step %d: %s", step, evaluate.summary(scalars))

    def stop_requested(self, step: int, term: cli.Termination) -> bool:
        """SIGTERM or preemption, seen at the same step by every process."""
        if jax.process_count() == 1:
            return term.requested
        return multihost_utils.reached_preemption_sync_point(step)

    def run(self, term: cli.Termination) -> None:
        """All updates from the restored step to `config.steps`."""
        c, pending = self.config, None
        batches = open_batches(c, self.program, self.first)
        for n in range(self.first + 1, c.steps + 1):
            done = n - 1
            if self.stop_requested(n, term):
                raise Terminated(f"SIGTERM: saved at step {done}; the same command resumes")
            if done > self.first and c.evaluate_every and done % c.evaluate_every == 0:
                with term.interruptible():
                    self.evaluate(done)
            if done > self.first and c.checkpoint.every and done % c.checkpoint.every == 0:
                self.checkpoints.save(done, self.state, c)
            begin = time.monotonic()
            batch, replaced = next(batches)
            wait = time.monotonic() - begin
            self.replaced += replaced
            batch = sharding.to_global(batch, self.program.mesh, c.batch_size)
            self.state, values = self.step(self.state, batch, np.int32(n))
            if pending:
                self.read(*pending)
            pending = (n, values, time.monotonic() - begin, wait)
        if pending:
            begin = time.monotonic()
            n, values, seconds, wait = jax.block_until_ready(pending)
            self.read(n, values, seconds + time.monotonic() - begin, wait)

    def close(self) -> None:
        """Waits for saves and closes files."""
        self.checkpoints.close()
        if self.writer:
            self.writer.close()
            self.progress.close()


def train(config, workdir) -> states.State:
    """Trains as `config` says, in `workdir`; returns the final state.

    Raises UserError before anything is written, GuardStop or Terminated after saving.
    """
    workdir = Path(workdir).expanduser().resolve()
    program = build(config)
    with sharding.use(program.mesh):
        check_example(config, program)
        evaluators = evaluate.build(config, program.objective, program.mesh)
        init = checkpoint.find(config.init) if config.init else None
        if init:
            checkpoint.read_config(init)
        open_workdir(workdir, config)
        log.info("mesh %s\n%s", dict(program.mesh.shape), table(program))
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        loop = Loop(config, program, workdir, checkpoints, evaluators)
        if loop.first >= config.steps and loop.first:
            log.info("nothing to do: %s is at step %d of %d", workdir, loop.first, config.steps)
        term = cli.Termination(jax.process_count() == 1)
        try:
            loop.run(term)
            checkpoints.save(config.steps, loop.state, config, wait=True)
            with term.interruptible():
                if loop.first < config.steps or not config.steps:
                    loop.evaluate(config.steps)
        except (GuardStop, Terminated):
            checkpoints.save(int(loop.state.step), loop.state, config, wait=True)
            raise
        finally:
            term.close()
            loop.close()
    return loop.state


def table(program: Program) -> str:
    """Parameters and shardings, as printed at the start."""
    shardings = states.shardings_of(program.abstract)
    overview = parameter_overview.get_parameter_overview(
        nn.unbox(program.abstract.params), include_stats=False
    )
    return f"{overview}\n{sharding.table(shardings, program.abstract)}"


def main(argv) -> None:
    """The command line."""
    args, config = cli.parse(argv, __doc__, FLAGS | distributed.FLAGS)
    distributed.start(args)
    train(config, args.workdir)


if __name__ == "__main__":
    cli.run(main)
