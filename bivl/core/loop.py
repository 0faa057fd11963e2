"""The training loop: what happens around a step, in which order, and what a stop leaves behind."""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path

import jax
import numpy as np

from bivl.core import cli, collapse, distributed, metrics, sharding
from bivl.core.errors import GuardStop, Terminated

log = logging.getLogger("bivl")


@dataclasses.dataclass(frozen=True)
class Update:
    """An update that was started: `values` are its metrics, still on the devices."""

    step: int
    values: dict[str, jax.Array]
    begin: float
    wait: float
    replaced: int


class Loop:
    """The loop's running parts, in the order of a step: save, evaluate, draw, update, read.

    The metrics of an update are read while the next one runs, but always before a stop, an
    evaluation or a save, so that no checkpoint is ahead of its line in metrics.jsonl; and these
    lines outlast a loss of the host as the checkpoint does.
    """

    def __init__(self, config, program, workdir: Path, checkpoints, state, evaluators, batches):
        """`evaluators(params, extras)` gives numbers and pictures; `batches(n)` is the stream of
        (batch, records replaced) from batch number n on."""
        self.config, self.program = config, program
        self.checkpoints, self.state = checkpoints, state
        self.evaluators, self.batches = evaluators, batches
        self.first = int(state.step)
        self.evaluated = metrics.last_step(workdir / "evaluations.jsonl", self.first)
        self.guard = collapse.Guard(**config.guard)
        main = jax.process_index() == 0
        self.writer = metrics.Writer(workdir, self.first, config) if main else None
        self.progress = metrics.Progress(self.first, config.steps) if main else None
        self.peak = metrics.peak_flops(jax.devices()[0].device_kind)
        self.timings = metrics.Timings()
        self.pending: Update | None = None
        self.last_read = 0.0

    def compile(self):
        """The compiled step."""
        self.flops = self.program.flops() / jax.device_count()
        begin = time.monotonic()
        step = self.program.compile()
        log.info("compiled in %.1f s, %.3g FLOPs an update", time.monotonic() - begin, self.flops)
        distributed.barrier(f"compiled the step after {self.first}", distributed.COMPILING)
        return step

    def record(self, update: Update) -> dict[str, float]:
        """Reads the metrics of an update (this waits for it) and logs them when due."""
        values = {name: float(value) for name, value in jax.device_get(update.values).items()}
        now = time.monotonic()
        seconds, self.last_read = now - max(update.begin, self.last_read), now
        self.timings.add(seconds, update.wait, update.replaced)
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
        values |= self.timings.means()
        values["examples_per_second"] = self.config.batch_size / values["step_seconds"]
        if self.peak:
            values["mfu"] = self.flops / values["step_seconds"] / self.peak
        replaced = f"records replaced up to {step}"
        values["records_replaced"] = distributed.total(replaced, self.timings.replaced)
        self.timings = metrics.Timings()
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
        self.writer.keep()
        log.info("evaluation at step %d: %s", step, metrics.summary(scalars))

    def stop_requested(self, step: int, term: cli.Termination) -> bool:
        """SIGTERM or preemption, seen at the same step by every process.

        `step` must not fall behind what Orbax asks the same service when it saves.
        """
        if jax.process_count() == 1:
            return term.requested
        return distributed.preempted(step)

    def between(self, done: int, term: cli.Termination) -> None:
        """What is due after `done` updates: stop, save, evaluate (which may be cut off)."""
        c = self.config
        stop = self.stop_requested(done, term)
        evaluate = done and c.evaluate_every and done % c.evaluate_every == 0
        save = done and c.checkpoint.every and done % c.checkpoint.every == 0
        if stop or evaluate or save:
            self.settle()
        if stop:
            raise Terminated
        if save:
            self.start_save(done)
        if evaluate:
            self.evaluate(done, term)

    def updates(self, term: cli.Termination) -> None:
        """All updates from the restored step to `config.steps`."""
        c, compiled = self.config, self.compile()
        with contextlib.closing(self.batches(self.first)) as batches:
            for n in range(self.first + 1, c.steps + 1):
                self.between(n - 1, term)
                begin = time.monotonic()
                batch, replaced = next(batches)
                wait = time.monotonic() - begin
                batch = sharding.to_global(batch, self.program.mesh, self.program.sizes)
                if n == self.first + 1:  # its workers take each process their time to start
                    distributed.barrier(f"ready for update {n}", distributed.COMPILING)
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
        self.start_save(step, wait=True)
        return step

    def start_save(self, step: int, wait: bool = False) -> None:
        """Saves the state of `step`, after its line of metrics."""
        if self.writer:
            self.writer.keep()
        self.checkpoints.save(step, self.state, self.config, wait=wait)

    def close(self) -> None:
        """Closes files."""
        if self.writer:
            self.writer.close()
            self.progress.close()
