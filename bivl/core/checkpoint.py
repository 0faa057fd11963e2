"""Checkpoints by Orbax: saved asynchronously, restored on any device count, in part if wanted.

A step's folder is its number and holds `state` and `config`, so one step alone is enough to load a
model. Nothing here unpickles: arrays are TensorStore, everything else is JSON.
"""

import json
import logging
import re
import shutil
import warnings
from pathlib import Path
from urllib.parse import unquote

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from bivl.core import config as configs
from bivl.core import distributed
from bivl.core.errors import UserError
from bivl.core.state import State

log = logging.getLogger("bivl")
warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "config/metadata")
# The parameters that tasks share, those of two towers too; a task's others are heads.
ENCODER = re.compile(r"(image_|text_)?(embed|trunk)/")


class Unreadable(UserError):
    """A checkpoint that is torn or damaged; another one may do."""


def _extents(folder: Path):
    """(file, bytes it needs) of every node and value that a saved state's newest tree points to."""
    store = ts.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    root = ts.ocdbt.dump(store).result()["versions"][-1]["root"]
    locations = [root["location"]] if "location" in root else []
    while locations:
        location = locations.pop()
        kind, base, name, start, size = location.split(":")
        yield folder / unquote(base) / unquote(name), int(start) + int(size)
        if kind == "btreenode":
            entries = ts.ocdbt.dump(store, location).result()["entries"]
            links = (e.get("location") or e.get("indirect_value") for e in entries)
            locations += [link for link in links if link]


def is_whole(step_dir: Path) -> bool:
    """Whether a step's folder has all that a finished save writes; reads no array."""
    if not all((step_dir / part).is_file() for part in PARTS):
        return False
    try:
        json.loads((step_dir / "state" / "_METADATA").read_text())
        needed: dict[Path, int] = {}
        for file, size in _extents(step_dir / "state"):
            needed[file] = max(size, needed.get(file, 0))
        return all(file.stat().st_size >= size for file, size in needed.items())
    except (OSError, ValueError, KeyError, IndexError):
        return False


def numbered(directory: Path) -> list[int]:
    """Step numbers of the folders in `directory`, newest first, whole or not."""
    if not directory.is_dir():
        return []
    return sorted((int(p.name) for p in directory.iterdir() if p.name.isdecimal()), reverse=True)


def find(directory, step: int | None = None) -> Path:
    """A workdir, its `checkpoints/` or one step's folder -> the folder of `step` (newest whole)."""
    root = Path(directory).resolve()
    if not root.exists():
        raise UserError(f"checkpoint {directory} does not exist; pass a workdir or a step's folder")
    if is_whole(root) and step in (None, int(root.name) if root.name.isdecimal() else None):
        return root
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = numbered(folder)
    whole = [n for n in steps if is_whole(folder / str(n))]
    if step is not None and step not in whole:
        raise UserError(f"{directory} has no checkpoint of step {step}; it has {sorted(whole)}")
    if not whole:
        what = f"only unfinished ones: {steps}" if steps else "none"
        raise UserError(f"{directory} has no finished checkpoint ({what}); pass a workdir")
    for torn in (n for n in steps if n > whole[0] and step is None):
        log.warning("checkpoint %s is unfinished; passed over", folder / str(torn))
    return folder / str(whole[0] if step is None else step)


def read_config(step_dir: Path):
    """The config saved with a step."""
    try:
        config = configs.from_dict(json.loads((step_dir / "config" / "metadata").read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"the config saved in {step_dir} cannot be read ({error}); pass another checkpoint"
        ) from error
    configs.check_complete(config, f"the config saved in {step_dir}")
    return config


def _names(tree) -> dict[str, object]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def saved_shapes(step_dir: Path) -> dict[str, tuple]:
    """Path -> shape of every array of a saved state."""
    try:
        # The handler, because a checkpointer warns that `state` alone is no whole checkpoint.
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(step_dir / "state")).tree
    except Exception as error:
        raise Unreadable(f"checkpoint {step_dir} cannot be read: {_line(error)}") from error
    return {name: tuple(leaf.shape) for name, leaf in _names(tree).items()}


def _line(error) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def check_shapes(step_dir: Path, wanted, prefix: str) -> None:
    """UserError naming the first array of `wanted` that the checkpoint lacks or has otherwise."""
    saved = saved_shapes(step_dir)
    for name, leaf in _names(wanted).items():
        shape = saved.get(f"{prefix}{name}")
        if shape != tuple(leaf.shape):
            has = f"has shape {shape}" if shape is not None else "is absent"
            raise UserError(
                f"{prefix}{name} {has} in checkpoint {step_dir}, this config wants "
                f"{tuple(leaf.shape)}; use the config that the checkpoint was made with"
            )


def restore_part(step_dir: Path, wanted: dict):
    """Reads the named parts of a state, {"params": abstract tree, ...}, wherever `wanted` says."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(step_dir / "state", args=args)
    except Exception as error:
        raise UserError(f"checkpoint {step_dir} cannot be read: {_line(error)}") from error


def matching(step_dir: Path, params) -> list[str]:
    """Paths of `params` that a checkpoint has in the same shape.

    UserError where there is none, where one of the encoder has another shape there, and where no
    trunk is found, as between models of images and of images with texts: only heads may be new, an
    encoder that is so would look trained and not be.
    """
    saved = saved_shapes(step_dir)
    shapes = {k: (saved.get(f"params/{k}"), tuple(x.shape)) for k, x in _names(params).items()}
    found = [k for k, (theirs, ours) in shapes.items() if theirs == ours]
    if not found:
        raise UserError(f"no parameter of checkpoint {step_dir} fits this model; check config.init")
    for key, (theirs, ours) in shapes.items():
        if ENCODER.match(key) and theirs not in (None, ours):
            raise UserError(
                f"config.init: {key} has shape {theirs} in checkpoint {step_dir}, this config "
                f"wants {ours}; make config.model and the sizes of inputs those of the checkpoint"
            )
    trunks, theirs = _trunks(shapes), _trunks(k.removeprefix("params/") for k in saved)
    if trunks and not _trunks(found):
        raise UserError(
            f"config.init: checkpoint {step_dir} has {', '.join(theirs) or 'no trunk'}, this model "
            f"{', '.join(trunks)}: its encoder would start untrained; name a checkpoint of the "
            "same kind of model"
        )
    return found


def _trunks(names) -> list[str]:
    """The first two parts of the paths that lie in an encoder's layers."""
    parts = (k.split("/") for k in names if ENCODER.match(k))
    return sorted({"/".join(p[:2]) for p in parts if p[0].endswith("trunk")})


def load_matching(step_dir: Path, state: State) -> State:
    """Fine-tuning's start: params that match by path and shape replace those of `state`.

    The teacher takes the loaded value wherever it has the same path (a student that is restarted is
    its own first teacher). Logs what was loaded, what was not, and what the checkpoint has besides;
    UserErrors are those of `matching`.
    """
    saved, own = saved_shapes(step_dir), _names(state.params)
    keys, structure = list(own), jax.tree.structure(state.params)
    wanted: dict = {}
    for key in matching(step_dir, state.params):
        node = wanted
        *parents, last = key.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        x = own[key]
        node[last] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    loaded = _names(restore_part(step_dir, {"params": wanted})["params"])
    for key in (k for k in keys if k not in loaded):
        shape = saved.get(f"params/{key}")
        why = "not in the checkpoint" if shape is None else f"the checkpoint has shape {shape}"
        log.info("init: %s keeps its own values (%s)", key, why)
    unused = sorted(k for k in saved if k.startswith("params/") and k[7:] not in own)
    log.info("init: %d of %d arrays loaded from %s", len(loaded), len(keys), step_dir)
    log.info("init: not used from the checkpoint: %s", ", ".join(unused) or "nothing")
    params = jax.tree.unflatten(structure, [loaded.get(k, own[k]) for k in keys])

    def follow(path, old):
        new = loaded.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        same = new is not None and new.shape == old.shape
        return jax.device_put(new.astype(old.dtype), old.sharding) if same else old

    teacher = jax.tree_util.tree_map_with_path(follow, state.teacher)
    teacher = jax.tree.map(lambda x: x.copy(), teacher)
    extras = _matching_extras(step_dir, saved, state.extras)
    return state.replace(params=params, teacher=teacher, extras=extras)


def _matching_extras(step_dir: Path, saved: dict, extras):
    """The extras of the checkpoint if it has all of them alike: the statistics of batch norms are a
    part of the model that its parameters are not."""
    own = _names(extras)
    if not own or any(saved.get(f"extras/{k}") != tuple(x.shape) for k, x in own.items()):
        return extras
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), extras
    )
    log.info("init: the extras are the checkpoint's too")
    return restore_part(step_dir, {"extras": wanted})["extras"]


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, directory: Path, keep: int):
        """`keep`: how many steps stay."""
        self.directory = Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max(keep, 1), cleanup_tmp_directories=True, create=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: State, config, wait: bool = False) -> None:
        """Starts a save (finished before return with `wait`); a step on disk is not saved again."""
        if step not in self._manager.all_steps():
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config.to_dict())
            )
            self._manager.save(step, args=args, force=True)
        if wait:
            self._manager.wait_until_finished()

    def restore_newest(self, abstract: State) -> State | None:
        """The newest checkpoint that can be read, on `abstract`'s devices; None if there is none.

        Torn ones are passed over with a warning and, once an older one is read, set aside, so that
        their number can be saved again. UserError when there are some but none can be read, or
        they hold another model.
        """
        steps = numbered(self.directory)
        for i, step in enumerate(steps):
            try:
                state = self._restore(step, abstract)
            except Unreadable as error:
                log.warning("%s; passed over for the one before", error)
                continue
            self._set_aside(steps[:i])
            return state
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self.directory} can be read; "
                "restore one from a copy, or start in another --workdir"
            )
        return None

    def _restore(self, step: int, abstract: State) -> State:
        step_dir = self.directory / str(step)
        if not is_whole(step_dir):
            raise Unreadable(f"checkpoint {step_dir} is unfinished")
        check_shapes(step_dir, abstract, "")
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args).state
        except Exception as error:
            raise Unreadable(f"checkpoint {step_dir} cannot be read: {_line(error)}") from error

    def _set_aside(self, torn: list[int]) -> None:
        """Renames N to N.torn: as a step it would block its number and push out whole ones."""
        if not torn:
            return
        if jax.process_index() == 0:
            for step in torn:
                aside = self.directory / f"{step}.torn"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        distributed.barrier("torn checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for a running save."""
        self._manager.wait_until_finished()
        self._manager.close()
