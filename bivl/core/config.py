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
    except (Exception, SystemExit) as error:
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(f"config {spec}: {name}{error}; correct the file or its options") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {spec}: get_config must return a ConfigDict")
    check_complete(config, f"config {spec}")
    config.lock()
    return config


def check_complete(config: ConfigDict, what: str) -> None:
    """UserError unless a config has the groups and names that every program reads."""
    for key in ("objective", "modality", "model", "data", "mesh", "eval"):
        if key not in config:
            raise UserError(f"{what} has no key {key!r}; configs start from configs.common.base()")


def choice(name: str, value, known):
    """`value`, that of config.NAME, if it is one of `known`; else UserError."""
    if value not in known:
        raise UserError(f"config.{name}={value!r} is unknown; use one of {sorted(known)}")
    return value


def _literal(text: str):
    """Text -> the Python value it spells, or itself where it spells none."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _tuple(value) -> tuple:
    """`a,b` or `(1, 2)` or one value -> a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _number(value) -> float | None:
    """A number, 1e3 and nan included, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return value if isinstance(value, int) else number


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
    value = _literal(text)
    if isinstance(old, tuple):
        value = _tuple(value)
        if old and any(isinstance(item, str) != isinstance(old[0], str) for item in value):
            raise refuse("a tuple of the same kind")
        return value
    if old is None:
        return value
    value = _number(value)
    if value is None:
        raise refuse("a number")
    if not isinstance(old, int) or not math.isfinite(value):
        return float(value)
    if value != int(value):
        raise refuse("a whole number")
    return int(value)


def override(config: ConfigDict, assignments: list[tuple[str, str]]) -> None:
    """Sets dotted keys in place; an unknown key is refused with the nearest one named."""
    for name, text in assignments:
        *parents, last = name.split(".")
        node, seen = config, "config"
        for key in (*parents, last):
            if not isinstance(node, ConfigDict):
                raise UserError(f"{seen} is one value and has no key {key!r}; set {seen} itself")
            if key not in node:
                names = list(node.keys())
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
    """Every number is finite, none but a mesh size is negative, and whole ones fit 31 bits."""
    for name, value in flatten(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                low = -1 if ".mesh." in f".{name}" else 0
                if not math.isfinite(number) or number < low:
                    raise UserError(f"config.{name}={number} must be a finite number >= {low}")
                if isinstance(number, int) and number >= 2**31:  # devices count in int32
                    raise UserError(f"config.{name}={number} is too large; keep it below 2**31")


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
    "augment.scaled_decoding",  # the same windows
    "model.attention",
    "optimizer.accumulate",
)


def check_resume(saved: ConfigDict, config: ConfigDict, workdir) -> None:
    """UserError naming the first key in which `config` is another run than `saved`."""
    old, new = flatten(saved), flatten(config)
    for name in sorted(old.keys() | new.keys()):
        free = any(name == key or name.startswith(f"{key}.") for key in MAY_CHANGE)
        free |= name.startswith("data.") and name.endswith(".dir")  # of a mixture's parts
        if not free and old.get(name) != new.get(name):
            raise UserError(
                f"config.{name} is {new.get(name)!r} but the run in {workdir} has "
                f"{old.get(name)!r}; use another --workdir, or the saved value"
            )
