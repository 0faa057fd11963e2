"""`python -m bivl.evaluate --checkpoint=DIR [--config=FILE] [--config.a.b=v] [--out=DIR]`.

Writes `evaluation.json` (flat name -> number), `evaluation.md` and `pictures/` to --out, by default
the checkpoint's own folder. The same evaluators run inside training and in notebooks.
"""

import contextlib
import json
import logging
from pathlib import Path

import jax
import numpy as np

from bivl import model
from bivl.core import checkpoint, cli, distributed, memory, metrics, sharding
from bivl.core.errors import UserError
from bivl.data import mixture, pipeline, sources
from bivl.evaluators.features import HOST_KEYS, Splits

log = logging.getLogger("bivl")

FLAGS = {
    "--checkpoint": {"required": True, "help": "a workdir, its checkpoints/, or one step's folder"},
    "--step": {"type": int, "help": "which step (default: the newest)"},
    "--out": {"help": "where to write (default: the checkpoint's folder)"},
}


def data_of(config, split: str):
    """The data mapping of "train" or "test": eval_data.SPLIT where it names a kind, else `data`
    (of a mixture the first part with images) with the split that eval_data.SPLIT names."""
    chosen = config.eval_data[split].to_dict()
    if chosen["kind"]:
        return chosen
    return mixture.first_with_images(config).to_dict() | {"split": chosen["split"]}


def open_split(config, split: str) -> sources.Source:
    """Opens `data_of(config, split)`; mistakes are named by the keys that it is read from."""
    own = config.eval_data[split]["kind"]
    with sources.keys_of(f"eval_data.{split}", sources.KEYS if own else ("split",)):
        return sources.open_source(data_of(config, split))


def split_batches(config, objective, mesh, source, size: int):
    """One pass over a source: global device arrays for the model, numpy label, id, mask."""
    rows = sharding.local_rows(size, mesh)
    threads = config.loader.threads
    for batch in pipeline.eval_batches(
        source, objective.eval_ops, batch_size=size, rows=rows, threads=threads
    ):
        placed = sharding.to_global(batch, mesh, size)
        yield placed | {k: distributed.to_host(placed[k]) for k in HOST_KEYS if k in placed}


def text_batches(objective, mesh, texts, size: int):
    """One pass over strings in batches like `split_batches`, all of one length of tokens."""
    count, rows = len(texts), sharding.local_rows(size, mesh)
    whole = objective.preprocess(text=list(texts))
    for start in range(0, count, size):
        index = np.arange(start, start + size)
        chosen = np.minimum(index, count - 1)  # the last batch is filled up with the last text
        local = {name: x[chosen[rows]] for name, x in whole.items()}
        yield sharding.to_global(local, mesh, size) | {"id": index, "mask": index < count}


def batch_size(config, mesh) -> int:
    """eval.batch_size, else batch_size, rounded up to what divides over the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-(config.eval.batch_size or config.batch_size) // devices) * devices


def make_splits(config, objective, mesh, needs) -> Splits:
    """The train and test data of the evaluators, which need the fields `needs`.

    Opened once here, so that mistakes show before anything runs.
    """
    opened = {split: open_split(config, split) for split in ("train", "test")}
    for split, source in opened.items():
        for field in sorted(needs - {ours for ours, *_ in source.fields}):
            raise UserError(
                f"the evaluators need a {field} but eval_data.{split} has none ({source.title}); "
                f"set fields.{field} to the feature that holds it, or change config.evaluators"
            )
    size = batch_size(config, mesh)

    def batches(split):
        return split_batches(config, objective, mesh, opened[split], size)

    def examples(count):
        options = {"start": 0, "wanted": count, "threads": config.loader.threads}
        with contextlib.closing(
            mixture.train_batches(config, objective, lambda size: range(size), **options)
        ) as stream:
            return next(stream)[0]

    def masked(split):
        options = {"seed": config.seed, "batch_size": size, "start": 0}
        rows, source = sharding.local_rows(size, mesh), objective.examples(opened[split])
        for batch, _ in pipeline.train_batches(source, objective.train_ops, rows=rows, **options):
            yield sharding.to_global(batch, mesh, size)

    def texts(given):
        return text_batches(objective, mesh, given, size)

    def record(split, row):
        found = opened[split][row]
        return found | objective.eval_ops(found)

    mixed = mixture.parts(config) is not None  # whose masks are those of several streams
    options = {"texts": texts, "record": record, "masked": None if mixed else masked}
    if "image_mean" in config:
        options["normalization"] = config.image_mean, config.image_std
    return Splits(batches, opened["train"].classes, examples, **options)


def make_predict(objective, mesh) -> dict:
    """The objective's predict functions, jitted to run on `mesh`."""

    def jitted(function):
        compiled = jax.jit(function)

        def call(params, extras, batch):
            with sharding.use(mesh):
                return compiled(params, extras, batch)

        return call

    return {name: jitted(function) for name, function in objective.predict.items()}


def build(config, objective, mesh):
    """The evaluators that `config.evaluators` names, as one function (params, extras) -> dict."""
    if not config.evaluators:
        return lambda params, extras: {}
    modules = [model.module("evaluators", name, "evaluators") for name in config.evaluators]
    needs = {field for module in modules for field in getattr(module, "NEEDS", ())}
    predict, splits = make_predict(objective, mesh), make_splits(config, objective, mesh, needs)
    runs = [
        module.make(predict, splits, config.eval.get(name))
        for name, module in zip(config.evaluators, modules, strict=True)
    ]

    def run(params, extras):
        results = {}
        for evaluator in runs:
            results |= evaluator(params, extras)
        return results

    return run


def write(results: dict, out: Path, title: str) -> dict[str, float]:
    """Writes evaluation.json, evaluation.md and pictures/NAME.png; returns the numbers."""
    out.mkdir(parents=True, exist_ok=True)
    scalars = {k: float(v) for k, v in sorted(results.items()) if not isinstance(v, np.ndarray)}
    rows = [f"| {name} | {value:.4f} |" for name, value in scalars.items()]
    lines = [f"# {title}", "", "| metric | value |", "|---|---|", *rows, ""]
    (out / "evaluation.json").write_text(json.dumps(scalars, indent=2) + "\n")
    (out / "evaluation.md").write_text("\n".join(lines))
    for name, value in results.items():
        if isinstance(value, np.ndarray):
            metrics.save_picture(out, name, value)
    return scalars


def saved_config(args, keys):
    """The config saved with --checkpoint, on whatever devices there are."""
    config = checkpoint.read_config(checkpoint.find(args.checkpoint, args.step))
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def main(argv) -> None:
    """The command line."""
    flags = FLAGS | distributed.FLAGS
    args, config = cli.parse(argv, __doc__, flags, base=saved_config)
    memory.keep()
    distributed.start(args)
    out = Path(args.out or args.checkpoint)
    if any(place.is_file() for place in (out, *out.absolute().parents)):
        raise UserError(f"--out={out} lies in a file; name a folder")
    step_dir = checkpoint.find(args.checkpoint, args.step)
    objective, mesh, params, extras = model.restore(step_dir, config)
    evaluators = build(config, objective, mesh)
    results = evaluators(params, extras)
    if jax.process_index() == 0:
        scalars = write(results, out, f"{config.objective}, step {step_dir.name}")
        width = max(map(len, scalars), default=0)
        for name, value in scalars.items():
            print(f"{name:{width}}  {value:.4f}")
        print(f"written to {out}/evaluation.json, evaluation.md")


if __name__ == "__main__":
    cli.run(main)
