"""Training: `python -m bivl.train --config=FILE[:options] --workdir=DIR [--config.a.b=v]`.

Running the same command again resumes: batch n is a pure function of (config, seed, n) and all else
is in the state, so a run that was killed anywhere goes on as if it had not been.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from flax import linen as nn
from ml_collections import ConfigDict

from bivl import evaluate, model
from bivl.core import checkpoint, cli, distributed, flops, memory, metrics, optimizer, sharding
from bivl.core import config as configs
from bivl.core import state as states
from bivl.core import step as steps
from bivl.core import workdir as workdirs
from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.loop import Loop
from bivl.core.objective import Objective
from bivl.data import mixture

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
    sizes: Any
    """Rows of the global batch, in a mixture of each part."""
    counted: Any
    """The step of which FLOPs are counted, see `countable`."""

    def example_batch(self):
        """The global batch as ShapeDtypeStructs with shardings."""
        place = sharding.batch_sharding(self.mesh)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), self.objective.spec
        )

    def compile(self):
        """The compiled step, a function of (state, batch, n)."""
        compiled = self.step.lower(self.abstract, self.example_batch(), np.int32(1)).compile()
        memory.settle()
        return compiled

    def flops(self) -> float:
        """Matmul and convolution FLOPs of one update, what remat computes again left out."""
        return flops.count(self.counted, self.abstract, self.example_batch(), np.int32(1))


def build(config, devices=None) -> Program:
    """Config -> program; nothing is allocated yet, and every mistake in sizes is found here.

    Completes `config.teacher` from the checkpoint that it names."""
    if config.log_every < 1:
        raise UserError(f"config.log_every={config.log_every} must be at least 1")
    model.read_teacher(config)
    objective = model.make_objective(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    o = config.optimizer
    sizes = mixture.sizes(config)
    for size in jax.tree.leaves(sizes):
        sharding.check_batch(size, o.accumulate, mesh)
    schedule = optimizer.make_schedule(o, config.steps)
    tx = optimizer.make_optimizer(o, schedule)
    abstract = states.abstract(objective, tx, mesh, config.seed)
    gather = choice("mesh.gather", config.mesh.gather, sharding.GATHER)
    options = {"seed": config.seed, "accumulate": o.accumulate, "gather": gather}

    def compile_step(objective):
        return steps.compile_step(objective, tx, schedule, abstract, **options)

    step = counted = compile_step(objective)
    if (plain := countable(config)) != config:
        counted = compile_step(model.make_objective(plain))
    return Program(objective, mesh, tx, abstract, step, sizes, counted)


def countable(config):
    """A copy of a config whose step shows all FLOPs of the method and no others: its attention is
    by XLA, as kernels hide theirs, and nothing is computed twice."""
    config = configs.from_dict(config.to_dict())
    tower: Any = config.get("model", ConfigDict())
    for encoder in (tower, tower.get("text", ConfigDict())):
        for name, plain in (("attention", "xla"), ("remat", "none")):
            if name in encoder:
                encoder[name] = plain
    return config


def open_batches(config, program: Program, start: int):
    """The stream of (batch, records replaced) from batch number `start` on."""

    def rows(size):
        return sharding.local_rows(size, program.mesh)

    return mixture.train_batches(config, program.objective, rows, start)


def check_example(config, program: Program) -> None:
    """One example through the pipeline: a wrong field or shape shows before anything is written."""
    opened = mixture.open_all(config)
    options = {"start": 0, "wanted": 1, "threads": 0, "opened": opened}
    with contextlib.closing(
        mixture.train_batches(config, program.objective, lambda size: range(1), **options)
    ) as batches:
        batch, _ = next(batches)
    wanted = jax.tree_util.tree_flatten_with_path(program.objective.spec)[0]
    got = {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.shape(x)[1:]
        for p, x in jax.tree_util.tree_flatten_with_path(batch)[0]
    }
    for path, spec in wanted:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if got.get(name) != spec.shape[1:]:
            raise UserError(
                f"data gives {name!r} of shape {got.get(name)}, wanted {spec.shape[1:]}"
            )
    for source in opened.values():
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
    state = load_frozen(program, state)
    return (checkpoint.load_matching(init, state) if init else state), False


def load_frozen(program: Program, state: states.State) -> states.State:
    """Puts the checkpoints that the objective names as frozen into `state.teacher`."""
    for name, directory in program.objective.frozen.items():
        step_dir, wanted = checkpoint.find(directory), program.abstract.teacher[name]
        checkpoint.check_shapes(step_dir, wanted, "")
        wanted = {part: tree for part, tree in wanted.items() if jax.tree.leaves(tree)}
        found = state.teacher[name] | checkpoint.restore_part(step_dir, wanted)
        state = state.replace(teacher=state.teacher | {name: found})
        log.info("%s: %s", name, step_dir)
    return state


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
        batches = functools.partial(open_batches, config, program)
        loop = Loop(config, program, workdir, checkpoints, state, evaluators, batches)
        stack.callback(loop.close)
        term = cli.Termination(jax.process_count() == 1)
        stack.callback(term.close)
        loop.run(term)
        if loop.writer and config.evaluators and config.steps:
            from bivl.evaluators.curves import curves  # matplotlib, only where it is asked for

            loop.writer.picture(config.steps, "pictures/curves", curves(workdir / "metrics.jsonl"))
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
    memory.keep()
    distributed.start(args)
    train(config, args.workdir)


if __name__ == "__main__":
    cli.run(main)
