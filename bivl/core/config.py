"""Configs: `file.py:option,option=value`, dotted overrides, JSON, and what a resume may change."""

import ast
import difflib
import importlib.util
import json
import math
import sys
from pathlib import Path

from ml_collections import ConfigDict

from bivl.core.errors import UserError


def load(spec: str) -> ConfigDict:
    """`path/to/file.py:options` -> locked ConfigDict, from the file's `get_config(options)`."""
    path, _, options = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"config file {path} does not exist; configs are under configs/")
    if file.suffix != ".py":
        raise UserError(f"config {path} is not a Python file; pass FILE.py[:option,option=value]")
    root = str(Path(__file__).resolve().parents[2])  # shipped configs import `configs.common`
    if root not in sys.path:
        sys.path.append(root)
    module_spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(options or None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config {spec}: {type(error).__name__}: {error}") from error
    config.lock()
    return config


def _parse(name: str, text: str, old):
    """Text of an override -> value of the type of the value it replaces."""

    def refuse(wanted):
        return UserError(f"config.{name}={text!r} is not {wanted}; its value now is {old!r}")

    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise refuse("true or false")
        return text.lower() in ("true", "1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, tuple):
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        if old and value and isinstance(old[0], str) != isinstance(value[0], str):
            raise refuse("a tuple of the same kind")
        return value
    if old is None:
        return value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise refuse("a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse("a number")
    if isinstance(old, int) and value != int(value) if math.isfinite(value) else False:
        raise refuse("a whole number")
    return int(value) if isinstance(old, int) and math.isfinite(value) else float(value)


def override(config: ConfigDict, assignments: list[tuple[str, str]]) -> None:
    """Sets dotted keys in place; an unknown key is refused with the nearest one named."""
    for name, text in assignments:
        *parents, last = name.split(".")
        node, seen = config, "config"
        for key in (*parents, last):
            if not isinstance(node, ConfigDict) or key not in node:
                names = list(node.keys()) if isinstance(node, ConfigDict) else []
                close = difflib.get_close_matches(key, names, 1)
                cure = f"did you mean {seen}.{close[0]}?" if close else f"it has {sorted(names)}"
                raise UserError(f"{seen} has no key {key!r}; {cure}")
            parent, node, seen = node, node[key], f"{seen}.{key}"
        if isinstance(node, ConfigDict):
            raise UserError(f"{seen} is a group of keys; set one of {sorted(node.keys())}")
        with parent.ignore_type():
            parent[last] = _parse(name, text, node)
    check_numbers(config)


def flatten(config, prefix: str = "") -> dict:
    """Nested mapping -> {dotted key: leaf}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_numbers(config) -> None:
    """Every number is finite, and none but a mesh size is negative."""
    for name, value in flatten(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                low = -1 if name.startswith("mesh.") else 0
                if not math.isfinite(number) or number < low:
                    raise UserError(f"config.{name}={number} must be a finite number >= {low}")


def to_json(config: ConfigDict) -> str:
    """Plain JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2)


def from_dict(tree: dict) -> ConfigDict:
    """What `to_json` wrote, parsed, -> locked ConfigDict; lists become tuples again."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    config = ConfigDict(tuples(tree))
    config.lock()
    return config


# A resume may change these; any other difference would not be the same run.
MAY_CHANGE = (
    "steps",
    "log_every",
    "evaluate_every",
    "evaluators",
    "eval",
    "eval_data",
    "mesh",
    "loader",
    "checkpoint",
    "guard",
    "wandb",
    "data.dir",
    "optimizer.accumulate",
)


def check_resume(saved: ConfigDict, config: ConfigDict, workdir) -> None:
    """UserError naming the first key in which `config` is another run than `saved`."""
    old, new = flatten(saved), flatten(config)
    for name in sorted(old.keys() | new.keys()):
        free = any(name == key or name.startswith(f"{key}.") for key in MAY_CHANGE)
        if not free and old.get(name) != new.get(name):
            raise UserError(
                f"config.{name} is {new.get(name)!r} but the run in {workdir} has "
                f"{old.get(name)!r}; use another --workdir, or the saved value"
            )
