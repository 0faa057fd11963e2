"""Pickles read as a description of data: an interpreter of their opcodes that calls nothing.

Python's own unpickler imports what a file names and calls it; a subclass that filters the names
still runs the calls, the hashing and the recursion that the file asks for. Here a name in the file
is a string that is looked up among the few that weight files need, and what stands behind it is
built by this module: tensors become `View`, other objects `Record`. Everything else is refused by
name, wherever in the file it stands.

Format: the opcodes of CPython's `Lib/pickletools.py`, protocols 2 to 5.
"""

import struct
from collections.abc import Callable
from typing import Any

from bivl.weights.admitted import BadPickle, Storage, key
from bivl.weights.machine import Machine

MAX_BYTES = 2**26


def unpickle(
    data: bytes, start: int = 0, modules: bool = False, found: list[Storage] | None = None
) -> tuple[Any, int]:
    """The value of the pickle at `start` of `data`, and where it stops.

    It is made of None, bool, int, float, complex, str, bytes, list, tuple, sets, dict and of
    `Storage`, `View`, `Record` and `Name`. Containers may hold themselves and each other many
    times, as in the file, so walks over them must be bounded.

    modules: whether names under `__torch__` are admitted, the classes of a TorchScript archive.
    found: where to put every storage that the pickle refers to.

    Raises:
      BadPickle: the pickle is damaged, too large, or holds something that is not admitted.
    """
    machine = Machine(data, start, modules, [] if found is None else found)
    try:
        return _run(machine), machine.position
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise BadPickle(f"its pickle is damaged ({type(error).__name__})") from None


def _run(m: Machine) -> Any:
    """Runs up to STOP and returns what is on the stack."""
    while (code := m.take(1)) != b".":
        m.charge(1)
        op = _OPS.get(code)
        if op is None:
            name = _REFUSED.get(code, f"0x{code.hex()}")
            raise BadPickle(f"its pickle has the opcode {name}, which weights do not need")
        op(m)
    (value,) = m.stack
    if m.outer:
        raise ValueError
    return value


def _read_long(m: Machine) -> None:
    m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True))


def _frame(m: Machine) -> None:
    if m.number("<Q") > len(m.data) - m.position:
        raise BadPickle("its pickle ends early")


def _protocol(m: Machine) -> None:
    if not 2 <= m.number("<B") <= 5:
        raise BadPickle("its pickle is of a protocol that PyTorch does not write")


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str or len(name) + len(module) > 1000:
        raise TypeError
    m.named(module, name)


def _text(size: str, encoding: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.take(m.number(size)).decode(encoding))


def _bytes(size: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.take(m.number(size)))


def _constant(make: Callable[[], Any], steps: int = 1) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        m.charge(steps - 1)
        m.push(make())

    return run


def _memoize(index: Callable[[Machine], int]) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        m.memo[index(m)] = m.stack[-1]

    return run


_OPS: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"N": _constant(lambda: None),
    b"\x88": _constant(lambda: True),
    b"\x89": _constant(lambda: False),
    b")": _constant(tuple),
    b"]": _constant(list),
    b"}": _constant(dict),
    b"\x8f": _constant(set, steps=4),  # an empty set takes as much memory as four lists
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": _read_long,
    b"X": _text("<I", "utf-8"),
    b"\x8c": _text("<B", "utf-8"),
    b"\x8d": _text("<Q", "utf-8"),
    b"T": _text("<I", "latin-1"),
    b"U": _text("<B", "latin-1"),
    b"B": _bytes("<I"),
    b"C": _bytes("<B"),
    b"\x8e": _bytes("<Q"),
    b"(": Machine.mark,
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.take_tuple(1),
    b"\x86": lambda m: m.take_tuple(2),
    b"\x87": lambda m: m.take_tuple(3),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"s": lambda m: m.set_items(m.pop_pair()),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"\x90": lambda m: m.add(m.pop_mark()),
    b"\x91": lambda m: m.push(frozenset(map(key, m.pop_mark()))),
    b"0": lambda m: m.stack.pop(),
    b"1": Machine.pop_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"q": _memoize(lambda m: m.number("<B")),
    b"r": _memoize(lambda m: m.number("<I")),
    b"\x94": _memoize(lambda m: len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.named(m.line(), m.line()),
    b"\x93": _stack_global,
    b"R": Machine.reduce,
    b"\x81": Machine.new,
    b"b": Machine.build,
    b"Q": Machine.persistent,
}
_REFUSED = {
    **{b"i": "INST", b"o": "OBJ", b"\x92": "NEWOBJ_EX", b"P": "PERSID"},
    **{b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x8b": "LONG4"},
    **{b"I": "INT", b"L": "LONG", b"F": "FLOAT", b"S": "STRING", b"V": "UNICODE"},
    **{b"p": "PUT", b"g": "GET", b"l": "LIST", b"d": "DICT"},
    **{b"\x96": "BYTEARRAY8", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER"},
}
