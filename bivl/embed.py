"""Vectors to a file: `python -m bivl.embed --checkpoint=DIR --config.data....=... --out=FILE.npz`.

Writes `features` float32 [N, E], `ids` int [N] and, where the set has them, `labels` int [N].
"""

import logging
from pathlib import Path

import jax
import numpy as np

from bivl import evaluate, model
from bivl.core import checkpoint, cli, distributed, memory
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.data import mixture, sources
from bivl.evaluators.features import Splits, extract

log = logging.getLogger("bivl")

FLAGS = {
    "--checkpoint": {"required": True, "help": "a workdir, its checkpoints/, or one step's folder"},
    "--step": {"type": int, "help": "which step (default: the newest)"},
    "--out": {"required": True, "help": "the .npz file to write"},
}


def saved_config(args, keys):
    """As `evaluate.saved_config`; one `data` key given replaces all that names the saved data."""
    config = evaluate.saved_config(args, keys)
    given = any(key.startswith("data.") for key in keys)
    parts = mixture.parts(config)
    if parts is not None:
        with config.unlocked():  # what is given replaces all of any part, which need not be there
            any_part = next(iter(parts.values()))
            config.data = any_part if given else mixture.first_with_images(config)
    if given:
        texts = {k for k, v in configs.flatten(config.data).items() if isinstance(v, str)}
        config.data.update_from_flattened_dict(dict.fromkeys(texts, "") | {"split": "train"})
    return config


def main(argv) -> None:
    """The command line."""
    args, config = cli.parse(argv, __doc__, FLAGS | distributed.FLAGS, base=saved_config)
    memory.keep()
    distributed.start(args)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={out} cannot be written; its folder must exist")
    step_dir = checkpoint.find(args.checkpoint, args.step)
    trained = configs.from_dict(config.to_dict())
    with (
        trained.unlocked()
    ):  # an objective of several streams must know them, not what is read here
        trained.data = checkpoint.read_config(step_dir).data
    objective, mesh, params, extras = model.restore(step_dir, trained)
    size, source = evaluate.batch_size(config, mesh), sources.open_source(config.data)

    def batches(split):
        return evaluate.split_batches(config, objective, mesh, source, size)

    predict = evaluate.make_predict(objective, mesh)
    found = extract(predict, Splits(batches, None), "data", params, extras)
    arrays = {"features": found.features, "ids": found.ids}
    if found.labels is not None:
        arrays["labels"] = found.labels
    if jax.process_index() == 0:
        temporary = out.with_name(f"{out.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
        log.info("%d vectors of width %d written to %s", *found.features.shape, out)


if __name__ == "__main__":
    cli.run(main)
