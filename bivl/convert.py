"""`python -m bivl.convert --source=FILE_OR_DIR --out=DIR [--family=NAME] [--to=NAME]`.

Official weights become a checkpoint that `bivl.load`, `evaluate --checkpoint` and
`--config.init=DIR` read. With --to=huggingface a checkpoint, or official weights, become a folder
that transformers' from_pretrained reads; with --to=official safetensors under the names of a
model's own code, where transformers has none. Prints what became of every tensor; conversion.json
says the same. What a file does not tell is given as --config.KEY=VALUE.
"""

import functools
import importlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flax import traverse_util

from bivl import model
from bivl.core import checkpoint, cli, piecemeal
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.weights import export as exports
from bivl.weights import report as reports
from bivl.weights import vocabularies
from bivl.weights.files import open_weights
from bivl.weights.incoming import Found, Official, shapes
from bivl.weights.plan import Plan
from bivl.weights.stored import shown

log = logging.getLogger("bivl")

CONFIGS = Path(__file__).parents[1] / "configs"
ELSEWHERE = ("huggingface", "official")  # whose names and files
NOT_OFFICIAL = (
    "huggingface",
    "timm",
)  # layouts under names that are not those of a model's own code
FLAGS = {
    "--source": {"required": True, "help": "weights: a file, a folder, or one of our checkpoints"},
    "--out": {"required": True, "help": "the folder to write, new or empty"},
    "--family": {"help": "whose weights they are, where the file does not tell"},
    "--to": {"choices": ("bivl", *ELSEWHERE), "default": "bivl", "help": "what to write"},
    "--part": {"help": "the top-level key of the file to use, such as model_ema"},
    "--teacher": {"action": "store_true", "help": "keep the averaged model as the teacher"},
}
CONVERSION = "conversion.json"
KEPT = "kept.safetensors"  # beside a checkpoint: tensors that our model has no place for
SOURCE = "source"  # beside a checkpoint: the small files that came with the weights


# From a file to a model


@functools.cache
def modules() -> tuple:
    """Every module of bivl/weights."""
    stems = sorted(file.stem for file in (Path(__file__).parent / "weights").glob("[!_]*.py"))
    return tuple(importlib.import_module(f"bivl.weights.{stem}") for stem in stems)


def families() -> dict[str, dict]:
    """Family name -> its layouts, from every module that has some."""
    return {k: v for module in modules() for k, v in getattr(module, "FAMILIES", {}).items()}


def fits(value, old) -> bool:
    """Whether what a file says may stand where the recipe has `old`: of its kind, and no number
    that is infinite or takes more than 31 bits. Where the recipe has None, that or a whole one."""
    if isinstance(value, list | tuple):
        first = old[0] if isinstance(old, list | tuple) and old else None
        return isinstance(old, list | tuple) and all(fits(item, first) for item in value)
    if type(value) in (int, float):
        whole = type(value) is int and (old is None or type(old) is int)
        return (whole or type(old) is float) and abs(value) < 2**31
    return type(value) is type(old)


def configured(plan: Plan, keys=()):
    """The config of a plan; `keys` are those that the command line will override."""
    for key, why in plan.unknown.items():
        if key not in keys:
            raise UserError(f"{key} is not known: {why}; pass --config.{key}=...")
    name, _, options = plan.config.partition(":")
    config = configs.load(f"{CONFIGS / name}:{options}")
    with config.unlocked(), config.ignore_type():
        for key, value in plan.changes.items():
            group, _, last = key.rpartition(".")
            node: Any = config[group] if group else config
            usual = node.get(last, value)  # what a recipe leaves out is of any kind
            if fits(value, usual):
                node[last] = value
            elif key not in keys:
                raise UserError(
                    f"the file's own config makes config.{key} {shown(repr(value))}, where "
                    f"{usual!r}, say, is right; correct it, or pass --config.{key}=..."
                )
        config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    return config


class Own:
    """A checkpoint of ours, trained or converted."""

    def __init__(self, args, step_dir: Path):
        self.step_dir = step_dir
        inside = step_dir.parent.name == "checkpoints"
        self.root = step_dir.parents[1] if inside else step_dir.parent
        if args.to == "bivl":
            raise UserError(
                f"--source={args.source} is a checkpoint of ours; pass --to=huggingface, say"
            )
        if args.part or args.family or args.teacher:
            raise UserError(
                f"--source={args.source} is a checkpoint of ours, which --part, --family and "
                "--teacher are not for; leave them out"
            )

    def config(self):
        """The config saved with the checkpoint."""
        config = checkpoint.read_config(self.step_dir)
        config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
        return config

    def read(self, config, objective) -> Found:
        """The parameters; of a converted checkpoint also what came with the weights."""
        flat, _ = shapes(objective)
        parts = {
            path if path.startswith("extras/") else f"params/{path}": s for path, s in flat.items()
        }
        wanted = {path: piecemeal.stored(self.step_dir, path, s) for path, s in parts.items()}
        checkpoint.check_shapes(self.step_dir, traverse_util.unflatten_dict(wanted, sep="/"), "")
        arrays = {path.removeprefix("params/"): x for path, x in wanted.items()}
        report, kept = {}, {}
        if (self.root / CONVERSION).is_file():
            report = vocabularies.read_json(self.root / CONVERSION)
            if (self.root / KEPT).is_file():
                kept = open_weights(self.root / KEPT).tensors
        return Found(config, arrays, {}, report, kept, vocabularies.small(self.root / SOURCE))


def opened(args) -> Official | Own:
    """What --source is."""
    path = Path(args.source).expanduser()
    try:
        step_dir = checkpoint.find(path)
    except UserError:
        if checkpoint.numbered(path) or checkpoint.numbered(path / "checkpoints"):
            raise
        return Official(path, args.part, args.family, families(), args.teacher)
    return Own(args, step_dir)


# From a model to a folder


def write_checkpoint(found: Found, folder: Path, final: Path) -> dict:
    """A run's folder: config.json, checkpoints/0, and what came with the weights, the tokenizer of
    the config included. `final`: where the folder will lie. Returns conversion.json."""
    config, path = found.config, found.config.get("tokenizer", {}).get("path", "")
    for file in (*found.files, *vocabularies.files(path)):  # the tokenizer's go over others
        (folder / SOURCE).mkdir(exist_ok=True)
        shutil.copy(file, folder / SOURCE / file.name)
    if path:
        inside = final / SOURCE
        config.tokenizer.path = str(inside / Path(path).name if Path(path).is_file() else inside)
    params = traverse_util.unflatten_dict(dict(found.arrays), sep="/")
    state = {"extras": params.pop("extras", {}), "params": params}
    if found.teacher:
        state["teacher"] = traverse_util.unflatten_dict(dict(found.teacher), sep="/")
    (folder / "config.json").write_text(configs.to_json(config))
    piecemeal.save(folder / "checkpoints" / "0", state, config)
    if found.kept:
        exports.write_safetensors(folder / KEPT, found.kept)
    return found.report


def write_elsewhere(to: str, found: Found, folder: Path, final: Path) -> dict:
    """config.json, model.safetensors, preprocessor and tokenizer; returns conversion.json.

    A model that came from where it goes is given back as it was: its names, types and files.
    """
    ours = {path: x.shape for path, x in found.arrays.items()}
    stored = str(found.report.get("layout", "official")).split()[0]
    came = stored == to if stored in NOT_OFFICIAL else to == "official"
    report = found.report if came else {}
    base = [file for file in found.files if report and file.name == "config.json"]
    rows = (*report.get("mapped", ()), *report.get("dropped", ()))
    origin = exports.Origin(
        vocabularies.read_json(base[0]) if base else {},
        tuple(row.get("source") or row["key"].partition("[")[0] for row in rows),
        tuple(row["path"] for row in report.get("initialised", ())),
        str(found.report.get("family", "")),
    )
    made = (function(found.config, ours, origin) for function in exporters(to))
    made = next(filter(None, made), None)
    if made is None:
        c = found.config
        raise UserError(
            f"--to={to} has no model like this one (objective {c.objective}, modality "
            f"{c.modality}, model.norm {c.model.get('norm')}); "
            f"try --to={ELSEWHERE[to == ELSEWHERE[0]]}"
        )
    written = exports.folder(made, found.arrays, origin, found.kept if report else {}, report)
    exports.write_safetensors(folder / "model.safetensors", written.tensors)
    for file in found.files:
        shutil.copy(file, folder / file.name)
    own = {name: x for name, x in made.files.items() if not (report and (folder / name).exists())}
    for name, content in (own | {"config.json": made.config}).items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / name).write_text(text, "utf-8")
    print(reports.table(written.report))
    return written.report


def exporters(to: str) -> tuple:
    """Functions (config, shapes by path, Origin) -> Export or None, of every family that has some
    for `to`."""
    found = (getattr(module, "EXPORTS", {}).get(to, ()) for module in modules())
    return tuple(function for functions in found for function in functions)


def main(argv) -> None:
    """The command line."""
    sources: list[Official | Own] = []

    def base(args, keys):
        source = opened(args)
        sources.append(source)
        return source.config() if isinstance(source, Own) else configured(source.plan, keys)

    args, config = cli.parse(argv, __doc__, FLAGS, base=base)
    if args.teacher and args.to != "bivl":
        raise UserError(f"--to={args.to} has no place for a teacher; leave --teacher out")
    if not sources:
        raise UserError("--config=FILE is not for convert, which makes the config from the weights")
    out = Path(args.out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is not empty; name a new folder")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: the folder {out.parent} does not exist; make it first")
    found = sources[0].read(config, model.make_objective(config))
    elsewhere = functools.partial(write_elsewhere, args.to)
    write = write_checkpoint if args.to == "bivl" else elsewhere
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        report = write(found, folder, out)
        (folder / CONVERSION).write_text(json.dumps(report, indent=1) + "\n")
        if out.exists():
            out.rmdir()
        folder.rename(out)
    log.info("written to %s", out)


if __name__ == "__main__":
    cli.run(main)
