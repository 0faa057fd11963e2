"""The stack machine that a pickle is a program for, without anything that leaves it."""

import dataclasses
import struct
from typing import Any

from bivl.weights.admitted import CLASSES, NAMES, BadPickle, Name, Record, Storage, construct, key
from bivl.weights.stored import shown

_MAX_STEPS = 2**21  # ops and elements copied; 10,000 tensors with Adam's take 1 million


@dataclasses.dataclass
class Machine:
    """Where a program stands.

    data, position: the program, and what to read next.
    modules: whether names under `__torch__` are admitted.
    found: every storage seen.
    steps: the work done. stack, outer: values since the last mark, and below each mark.
    memo: values that the program kept.
    """

    data: bytes
    position: int
    modules: bool
    found: list[Storage]
    steps: int = 0
    stack: list[Any] = dataclasses.field(default_factory=list)
    outer: list[list[Any]] = dataclasses.field(default_factory=list)
    memo: dict[int, Any] = dataclasses.field(default_factory=dict)

    def take(self, count: int) -> bytes:
        """The next bytes. `count` is bounded by what there is before anything is allocated."""
        stop = self.position + count
        if stop > len(self.data):
            raise BadPickle("its pickle ends early")
        part = self.data[self.position : stop]
        self.position = stop
        return part

    def number(self, kind: str) -> Any:
        """The next number, of a type of `struct`."""
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def charge(self, steps: int) -> None:
        """Counts work, so that small files cannot ask for much of it."""
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise BadPickle("its pickle holds more objects than a model needs")

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self) -> None:
        """Sets a mark."""
        self.outer.append(self.stack)
        self.stack = []

    def take_tuple(self, count: int) -> None:
        """Replaces the last values by one tuple of them."""
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def add(self, items: list[Any]) -> None:
        """Adds to the set on the stack."""
        if type(self.stack[-1]) is not set:
            raise TypeError
        self.stack[-1].update(map(key, items))

    def set_items(self, items: list[Any]) -> None:
        """Sets keys and values, which alternate, of the dict on the stack."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for k in range(0, len(items), 2):
            name = key(items[k])
            if name in target:
                raise BadPickle(f"its pickle holds the key {shown(name)} twice")
            target[name] = items[k + 1]

    def pop_pair(self) -> list[Any]:
        """The last two values, in the order they were pushed."""
        if len(self.stack) < 3:
            raise IndexError
        value = self.stack.pop()
        return [self.stack.pop(), value]

    def named(self, module: str, name: str) -> None:
        """Pushes a name if it is admitted."""
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full not in NAMES and not (self.modules and module.split(".")[0] == "__torch__"):
            raise BadPickle(
                f"holds {shown(full)}, which is no tensor, container, number or argparse.Namespace",
                "if you trust it, save its tensors alone with PyTorch",
            )
        self.push(Name(full))

    def line(self) -> str:
        """Text up to the end of the line."""
        stop = self.data.find(b"\n", self.position, self.position + 1000)
        if stop < 0:
            raise ValueError
        text = self.take(stop - self.position).decode("ascii")
        self.take(1)
        return text

    def reduce(self) -> None:
        """What `name(*args)` would be."""
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple:
            raise BadPickle("its pickle calls what is no name")
        for arg in args:
            self.charge(len(arg) if isinstance(arg, (list, dict, tuple, str)) else 0)
        self.push(construct(name.full, args))

    def new(self) -> None:
        """An object without attributes."""
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple or args:
            raise BadPickle("its pickle makes an object of what is no name")
        if name.full not in CLASSES and not name.full.startswith("__torch__."):
            raise BadPickle(f"its pickle makes an object of {shown(name.full)}")
        self.push(Record(name.full, {}))

    def build(self) -> None:
        """Gives the object on the stack its attributes."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict and type(state) is dict:
            return  # attributes of an OrderedDict: the versions of a state dict's modules
        if type(target) is not Record or len(target.state) > (target.full == "numpy.dtype"):
            raise TypeError
        if target.full == "numpy.dtype":
            target.state["state"] = state
        elif type(state) is dict and all(type(name) is str for name in state):
            self.charge(len(state))
            target.state.update(state)
        else:
            raise TypeError

    def persistent(self) -> None:
        """A storage, which lies outside the pickle: ("storage", type, key, place, elements)."""
        value = self.stack.pop()
        if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
            raise BadPickle("its pickle refers to something outside that is no storage")
        kind, name, elements = value[1], value[2], value[4]
        if type(kind) is not Name or type(name) is not str or type(elements) is not int:
            raise TypeError
        if any(part is not None for part in value[5:]):
            raise BadPickle("has storages that are parts of others")
        self.found.append(Storage(kind.full, name, elements))
        self.push(self.found[-1])
