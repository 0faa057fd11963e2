"""Vectors to a file: `python -m bivl.embed --checkpoint=DIR --config.data....=... --out=FILE.npz`.

Writes `features` float32 [N, E], `ids` int [N] and, where the set has them, `labels` int [N].
"""

import logging
import tempfile
from pathlib import Path

import jax
import numpy as np

from bivl import evaluate, model
from bivl.core import checkpoint, cli, distributed, sharding
from bivl.core.errors import UserError
from bivl.evaluators.features import Splits, extract

log = logging.getLogger("bivl")

FLAGS = {
    "--checkpoint": {"required": True, "help": "a workdir, its checkpoints/, or one step's folder"},
    "--step": {"type": int, "help": "which step (default: the newest)"},
    "--out": {"required": True, "help": "the .npz file to write"},
}


def main(argv) -> None:
    """The command line."""
    flags = FLAGS | distributed.FLAGS
    args, config = cli.parse(argv, __doc__, flags, base=evaluate.saved_config)
    distributed.start(args)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={out} cannot be written; its folder must exist")
    step_dir = checkpoint.find(args.checkpoint, args.step)
    objective, mesh, params, extras = model.restore(step_dir, config)
    size = config.eval.batch_size or config.batch_size
    sharding.check_batch(size, 1, mesh)
    data = config.data.to_dict()

    def batches(split):
        return evaluate.split_batches(config, objective, mesh, data, size)

    predict = evaluate.make_predict(objective, mesh)
    found = extract(predict, Splits(batches, None), "data", params, extras)
    arrays = {"features": found.features, "ids": found.ids}
    if found.labels is not None:
        arrays["labels"] = found.labels
    if jax.process_index() == 0:
        with tempfile.NamedTemporaryFile(dir=out.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **arrays)
        Path(file.name).replace(out)
        log.info("%d vectors of width %d written to %s", *found.features.shape, out)


if __name__ == "__main__":
    cli.run(main)
