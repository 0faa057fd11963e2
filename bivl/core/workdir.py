"""The folder of a run: where it may be, and the config.json that says which run it holds."""

import json
from pathlib import Path

import jax

from bivl.core import config as configs
from bivl.core.errors import UserError


def find(name) -> Path:
    """--workdir as an absolute path that is a folder, or can become one; creates nothing."""
    if not str(name):
        raise UserError("--workdir is empty; name a folder")
    if "://" in str(name):
        raise UserError(f"--workdir={name}: mount the bucket and pass its folder (docs/pods.md)")
    workdir = Path(name).expanduser().resolve()
    for place in (workdir, *workdir.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"--workdir={workdir}: {place} is a file; name a folder")
    return workdir


def claim(workdir: Path, config) -> None:
    """Creates the folder with its config.json, or checks that it holds the same run."""
    saved = workdir / "config.json"
    if saved.is_file():
        try:
            old = configs.from_dict(json.loads(saved.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{saved} cannot be read ({error}); use another --workdir") from error
        configs.check_resume(old, config, workdir)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            text, temporary = configs.to_json(config), workdir / "config.json.tmp"
            if not saved.is_file() or saved.read_text() != text:
                temporary.write_text(text)
                temporary.replace(saved)
        except OSError as error:
            raise UserError(f"--workdir={workdir} cannot be written: {error}") from error
