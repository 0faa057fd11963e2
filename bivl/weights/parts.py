"""Checkpoints hold more than one model's weights: which part is meant, and what else there is."""

from collections.abc import Iterator, Mapping
from typing import Any

from bivl.weights.admitted import Name, Record, Storage, View
from bivl.weights.stored import File, shown
from bivl.weights.tensors import Tensor, check_total
from bivl.weights.torch_files import Opened

# In the order of preference. data2vec, BEiT and fairseq write `model`, DeepSpeed `module`,
# Lightning and others `state_dict`.
PREFERRED = ("model", "module", "state_dict", "model_state_dict")
CONFIGS = ("cfg", "args", "config", "hyper_parameters")
_MAX_DEPTH = 64
_MAX_NODES = 2**20  # values met on a walk; shared ones count each time, or walks could take ages

Parts = dict[str, dict[str, Tensor]]


def split(opened: Opened) -> tuple[Parts, dict[str, str], dict[str, Any]]:
    """(parts, others, config) of a checkpoint.

    parts: top-level key -> its tensors by name, where nested keys are joined by dots. Tensors that
      stand at the top, and what is nested beside them, are the part "".
    others: what else there is, except for parts and config: dotted name -> what it is.
    config: the first of `CONFIGS` that is filled, as plain containers.
    """
    file, value, walk = opened.file, opened.value, _Walk(opened)
    top = value.state if isinstance(value, Record) else value
    if isinstance(top, View):
        raise file.error("is a single tensor without a name", "save a dict of tensors")
    if type(top) is not dict:
        raise file.error(f"holds {describe(top)}, not a dict of tensors", "save a dict of tensors")
    if opened.script:
        groups: dict[str, Any] = {"": top}
    elif _is_state_dict(top) and not any(_is_state_dict(top.get(name)) for name in PREFERRED):
        apart = {name for name in CONFIGS if type(top.get(name)) in (dict, Record)}
        groups = {"": {name: item for name, item in top.items() if name not in apart}}
        groups |= {name: top[name] for name in CONFIGS if name in apart}
    else:
        groups = _groups(file, top)
    parts, others = {}, {}
    for name, group in groups.items():
        tensors, rest = walk.tensors(group)
        if tensors:
            parts[name] = tensors
            others.update({f"{name}.{key}".strip("."): what for key, what in rest.items()})
        else:
            others[name] = describe(group)
    check_total(file, (tensor for part in parts.values() for tensor in part.values()))
    filled = [n for n in CONFIGS if n not in parts and type(top.get(n)) in (dict, Record)]
    config = {}
    if filled:
        config = walk.plain(top[filled[0]])
        others.pop(filled[0], None)
    return parts, {} if opened.script else others, config


def choose(file: File, parts: Parts, wanted: str | None) -> str:
    """The part to use: `wanted`, else the first of `PREFERRED`, else "", else the only one.

    Raises:
      UserError: there is none, or no rule says which.
    """
    names = ", ".join(shown(name) or "the top" for name in parts) or "none"
    if wanted is not None:
        if wanted in parts:
            return wanted
        raise file.error(f"has no part {shown(wanted)}", f"its parts with tensors are: {names}")
    for name in (*PREFERRED, ""):
        if name in parts:
            return name
    if not parts:
        raise file.error("holds no tensors", "choose a file with weights")
    if len(parts) > 1 or "optimizer" in next(iter(parts)):
        raise file.error(
            "does not say which part are the weights", f"name one of its parts: {names}"
        )
    return next(iter(parts))


def describe(value: Any) -> str:
    """What a value is, for a list."""
    if isinstance(value, (Record, Name)):
        return shown(value.full)
    if isinstance(value, View):
        return f"tensor {list(value.shape)}"
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (bool, int, float)) and abs(value) < 2**63:
        return f"{type(value).__name__} {value}"
    return type(value).__name__


def _groups(file: File, top: dict[Any, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, value in top.items():
        if str(name) in groups:
            raise file.error(f"has the key {shown(name)} twice")
        groups[str(name)] = {name: value} if isinstance(value, View) else value
    return groups


def _is_state_dict(value: Any) -> bool:
    return type(value) is dict and any(type(item) is View for item in value.values())


class _Walk:
    """Walks over a value that may contain itself, of bounded depth and length."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._nodes = opened, 0

    def tensors(self, group: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, what else there is) by their dotted names."""
        tensors: dict[str, Tensor] = {}
        others: dict[str, str] = {}
        for name, value in self._leaves(group, "", 0):
            if name in tensors or name in others:
                raise self._opened.file.error(f"has two values called {shown(name)}")
            if isinstance(value, View):
                tensors[name] = self._opened.tensor(name, value)
            else:
                others[name] = describe(value)
        return tensors, others

    def _leaves(self, value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
        self._step(depth)
        children = value.state if isinstance(value, Record) else value
        if isinstance(children, (list, tuple)):
            children = dict(enumerate(children))
        if type(children) is not dict:
            yield name, value
            return
        for key, child in children.items():
            dotted = f"{name}.{key}" if name and key != "" else name or str(key)
            if len(dotted) > 1000:
                raise self._opened.file.error(f"has the name {shown(dotted)}, which is too long")
            yield from self._leaves(child, dotted, depth + 1)

    def plain(self, value: Any, depth: int = 0) -> Any:
        """The value with strings for names and tensors, and containers of Python alone."""
        self._step(depth)
        if isinstance(value, Record):
            value = value.state
        if type(value) is dict:
            return {name: self.plain(item, depth + 1) for name, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(self.plain(item, depth + 1) for item in value)
        return describe(value) if isinstance(value, (Name, View, Storage)) else value

    def _step(self, depth: int) -> None:
        self._nodes += 1
        if depth > _MAX_DEPTH or self._nodes > _MAX_NODES:
            raise self._opened.file.error("holds values that are nested too deeply or too often")


def left_out(parts: Mapping[str, Mapping[str, Tensor]], part: str) -> dict[str, str]:
    """The parts that are not used: name -> how many tensors."""
    return {
        name or "the top": f"{len(tensors)} tensors"
        for name, tensors in parts.items()
        if name != part
    }
