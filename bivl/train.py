"""The training loop: `python -m bivl.train --config=FILE[:options] --workdir=DIR [--config.a.b=v]`.

Running the same command again resumes: batch n is a pure function of (config, seed, n) and all else
is in the state, so a run that was killed anywhere goes on as if it had not been.
"""

import contextlib
import dataclasses
import importlib.util
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
from bivl.core import state as states
from bivl.core import step as steps
from bivl.core import workdir as workdirs
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
    if config.log_every < 1:
        raise UserError(f"config.log_every={config.log_every} must be at least 1")
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
    """One example through the pipeline: a wrong field or shape shows before anything is written."""
    source = sources.open_source(config.data)
    options = {"seed": config.seed, "batch_size": 1, "rows": range(1), "start": 0, "threads": 0}
    batch, _ = next(iter(pipeline.train_batches(source, program.objective.train_ops, **options)))
    for name, spec in program.objective.spec.items():
        got = np.shape(batch[name]) if name in batch else ()
        if name not in batch or got[1:] != spec.shape[1:]:
            raise UserError(f"data gives {name!r} of shape {got[1:]}, wanted {spec.shape[1:]}")
    log.info("data: %s", source.describe())


def find_init(config, program: Program, workdir: Path) -> Path | None:
    """The checkpoint that a fresh run starts from, checked to fit; a resumed run needs none."""
    if not config.init or checkpoint.numbered(workdir / "checkpoints"):
        return None
    step_dir = checkpoint.find(config.init)
    checkpoint.matching(step_dir, program.abstract.params)
    return step_dir


def start_state(config, program: Program, checkpoints, init: Path | None):
    """-> (state, whether it was restored): from the newest whole checkpoint, else created."""
    state = checkpoints.restore_newest(program.abstract)
    if state is not None:
        log.info("resumed at step %d", int(state.step))
        return state, True
    state = states.create(program.objective, program.tx, program.mesh, config.seed)
    return (checkpoint.load_matching(init, state) if init else state), False


@dataclasses.dataclass(frozen=True)
class Update:
    """An update that was started: `values` are its metrics, still on the devices."""

    step: int
    values: dict[str, jax.Array]
    begin: float
    wait: float
    replaced: int


class Loop:
    """The loop's running parts, in the order of a step: evaluate, save, draw, update, read.

    The metrics of an update are read while the next one runs, but always before a stop, an
    evaluation or a save, so that no checkpoint is ahead of its line in metrics.jsonl.
    """

    def __init__(self, config, program: Program, workdir: Path, checkpoints, state, evaluators):
        self.config, self.program, self.workdir = config, program, workdir
        self.checkpoints, self.state, self.evaluators = checkpoints, state, evaluators
        self.first = int(state.step)
        self.evaluated = metrics.last_step(workdir / "evaluations.jsonl", self.first)
        self.guard = collapse.Guard(**config.guard)
        main = jax.process_index() == 0
        self.writer = metrics.Writer(workdir, self.first, config) if main else None
        self.progress = metrics.Progress(self.first, config.steps) if main else None
        self.peak = metrics.peak_flops(jax.devices()[0].device_kind)
        self.timings, self.replaced = metrics.Timings.empty(), 0
        self.pending: Update | None = None
        self.last_read = 0.0

    def compile(self):
        """The compiled step."""
        self.flops = self.program.flops() / jax.device_count()
        begin = time.monotonic()
        step = self.program.compile()
        log.info("compiled in %.1f s, %.3g FLOPs an update", time.monotonic() - begin, self.flops)
        return step

    def record(self, update: Update) -> dict[str, float]:
        """Reads the metrics of an update (this waits for it) and logs them when due."""
        values = {name: float(value) for name, value in jax.device_get(update.values).items()}
        now = time.monotonic()
        seconds, self.last_read = now - max(update.begin, self.last_read), now
        self.timings = self.timings.merge(
            metrics.Timings.single_from_model_output(
                step_seconds=seconds, data_wait_seconds=update.wait
            )
        )
        self.replaced += update.replaced
        if update.step % self.config.log_every == 0 or update.step == self.config.steps:
            self.log(update.step, dict(values))
        return values

    def read(self, update: Update | None) -> None:
        """Records an update, if there is one, and asks the guard."""
        if update:
            self.guard.check(update.step, self.record(update))

    def settle(self) -> None:
        """Reads the update that has not been read yet."""
        update, self.pending = self.pending, None
        self.read(update)

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

    def evaluate(self, step: int, term: cli.Termination) -> None:
        """Runs the evaluators; floats become scalars, arrays pictures. Once for each step."""
        if step <= self.evaluated:
            return
        with term.interruptible():
            results = self.evaluators(self.state.params, self.state.extras)
        self.evaluated = step
        if not self.writer or not results:
            return
        scalars = {k: v for k, v in results.items() if not isinstance(v, np.ndarray)}
        for name in results.keys() - scalars.keys():
            self.writer.picture(step, name, results[name])
        self.writer.scalars(step, scalars, "evaluations")
        log.info("evaluation at step %d: %s", step, evaluate.summary(scalars))

    def stop_requested(self, step: int, term: cli.Termination) -> bool:
        """SIGTERM or preemption, seen at the same step by every process."""
        if jax.process_count() == 1:
            return term.requested
        return multihost_utils.reached_preemption_sync_point(step)

    def between(self, done: int, term: cli.Termination) -> None:
        """What is due after `done` updates: stop, evaluate, save."""
        c = self.config
        stop = self.stop_requested(done + 1, term)
        evaluate = done and c.evaluate_every and done % c.evaluate_every == 0
        save = done and c.checkpoint.every and done % c.checkpoint.every == 0
        if stop or evaluate or save:
            self.settle()
        if stop:
            raise Terminated
        if evaluate:
            self.evaluate(done, term)
        if save:
            self.checkpoints.save(done, self.state, c)

    def updates(self, term: cli.Termination) -> None:
        """All updates from the restored step to `config.steps`."""
        c, compiled = self.config, self.compile()
        with contextlib.closing(open_batches(c, self.program, self.first)) as batches:
            for n in range(self.first + 1, c.steps + 1):
                self.between(n - 1, term)
                begin = time.monotonic()
                batch, replaced = next(batches)
                wait = time.monotonic() - begin
                batch = sharding.to_global(batch, self.program.mesh, c.batch_size)
                self.state, values = compiled(self.state, batch, np.int32(n))
                update, self.pending = self.pending, Update(n, values, begin, wait, replaced)
                self.read(update)
            self.settle()

    def run(self, term: cli.Termination) -> None:
        """Trains, saves and evaluates; saves too before GuardStop or Terminated leave it."""
        try:
            if self.first < self.config.steps:
                self.updates(term)
            step = self.save()
            self.evaluate(step, term)
        except GuardStop:
            self.save()
            raise
        except Terminated:
            step = self.save()
            message = f"SIGTERM: saved at step {step}; the same command resumes"
            raise Terminated(message) from None

    def save(self) -> int:
        """Waits for the state, with its line of metrics, to be on disk; returns its step."""
        step, update = int(self.state.step), self.pending
        if update and update.step <= step:  # not one that was refused
            self.pending = None
            self.record(update)
        self.checkpoints.save(step, self.state, self.config, wait=True)
        return step

    def close(self) -> None:
        """Closes files."""
        if self.writer:
            self.writer.close()
            self.progress.close()


def train(config, workdir) -> states.State:
    """Trains as `config` says, in `workdir`; returns the final state.

    Raises UserError before anything is written, GuardStop or Terminated after saving.
    """
    workdir = workdirs.find(workdir)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"config.wandb={config.wandb!r} needs wandb: install it, or leave it empty")
    program = build(config)
    with sharding.use(program.mesh), contextlib.ExitStack() as stack:
        check_example(config, program)
        evaluators = evaluate.build(config, program.objective, program.mesh)
        init = find_init(config, program, workdir)
        workdirs.claim(workdir, config)
        log.info("mesh %s\n%s", dict(program.mesh.shape), table(program))
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        stack.callback(checkpoints.close)
        state, restored = start_state(config, program, checkpoints, init)
        step = int(state.step)
        evaluated = metrics.last_step(workdir / "evaluations.jsonl", step)
        if restored and step >= config.steps and (evaluated == step or not config.evaluators):
            log.info("nothing to do: %s is at step %d of %d", workdir, step, config.steps)
            return state
        loop = Loop(config, program, workdir, checkpoints, state, evaluators)
        stack.callback(loop.close)
        term = cli.Termination(jax.process_count() == 1)
        stack.callback(term.close)
        loop.run(term)
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
