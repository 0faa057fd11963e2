"""Compiled HLO text -> computations, and how often each of them runs in one call.

Reads what `compiled.as_text()` gives for CPU, GPU and TPU. The language is XLA's own
(openxla.org/xla/operation_semantics); only what costs need is read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ITEM = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_BITS = re.compile(r"\d+")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_BRACKET = re.compile(r"[()]")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array as the compiler lays it out."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    """Dimensions from minor to major; empty: not said, the last is the minor one."""
    tile: tuple[int, ...] = ()
    space: int = 0
    """Memory space; 0 is the chip's main memory, on TPU 1 is VMEM and 5 the host's."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes of one value."""
        bits = _BITS.search(self.dtype)
        return int(bits[0]) / 8 if bits else float(self.dtype == "pred")  # tokens have none

    @property
    def bytes(self) -> int:
        """Bytes in memory, tiles filled up."""
        dims = list(self.dims)
        order = self.order or tuple(reversed(range(len(dims))))
        for axis, tile in zip(order, reversed(self.tile), strict=False):
            dims[axis] = -(-dims[axis] // tile) * tile
        return int(math.prod(dims) * self.itemsize)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shapes opcode(operands), attributes`; a tuple has several shapes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    """All behind the operands."""
    literal: str
    """What stands between the brackets where that is no operand: a constant, a parameter number."""
    root: bool

    @property
    def op_name(self) -> str:
        """The path of scopes in the Python program that the instruction comes from."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of computations that it runs, reducers among them."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        named = _CALLED.findall(self.text)
        if branches:
            named += _NAME.findall(branches[1])
        two = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.text)
        return tuple(named + two)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A body of instructions, in order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def named(self) -> dict[str, Instruction]:
        return {x.name: x for x in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each name."""
        found: dict[str, list[Instruction]] = {}
        for x in self.instructions:
            for name in dict.fromkeys(x.operands):
                found.setdefault(name, []).append(x)
        return found

    @property
    def root(self) -> Instruction:
        return next((x for x in self.instructions if x.root), self.instructions[-1])

    def operand(self, instruction: Instruction, number: int) -> Instruction | None:
        """The instruction that makes an operand."""
        if number >= len(instruction.operands):
            return None
        return self.named.get(instruction.operands[number])


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """Name of each computation that runs by itself -> how often it does in one call.

        Bodies of loops count as often as the loop turns, every branch of a choice once. What is
        fused into one instruction is in `fused`, not here.
        """
        return self._walk(fused=False)

    @functools.cached_property
    def fused(self) -> dict[str, float]:
        """The same for computations inside fusions."""
        return {k: v for k, v in self._walk(fused=True).items() if k not in self.runs}

    def _walk(self, fused: bool) -> dict[str, float]:
        times: dict[str, float] = {}
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, count = waiting.pop()
            if name not in self.computations:
                continue
            times[name] = times.get(name, 0.0) + count
            for x in self.computations[name].instructions:
                if x.opcode in ("while", "call", "conditional", "async-start") or (
                    fused and x.opcode in ("fusion", "custom-call")
                ):
                    turns = self.trips(x)[0] if x.opcode == "while" else 1
                    waiting += [(inner, count * turns) for inner in x.called]
        return times

    def trips(self, loop: Instruction) -> tuple[int, bool]:
        """-> (turns of a `while`, whether they are known); 1 where nothing tells."""
        said = _TRIPS.search(loop.text)
        if said:
            return int(said[1]), True
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        bounds = list(self._bounds(condition[1])) if condition else []
        return (max(bounds), True) if bounds else (1, False)

    def _bounds(self, name: str) -> Iterator[int]:
        """Integer constants of a condition, the largest of which a counter is compared with."""
        if name not in self.computations:
            return
        for x in self.computations[name].instructions:
            if x.opcode == "constant" and x.shapes[0].dtype in ("s32", "u32", "s64"):
                if x.literal.lstrip("-").isdecimal() and int(x.literal) > 0:
                    yield int(x.literal)
            elif x.opcode == "fusion":
                for inner in x.called:
                    yield from self._bounds(inner)

    def unknown_loops(self) -> list[str]:
        """Op names of loops that turn an unknown number of times, counted as one."""
        loops = [x for c in self.runs for x in self.computations[c].instructions]
        return [x.op_name for x in loops if x.opcode == "while" and not self.trips(x)[1]]


def parse(text: str) -> Module:
    """Text of a compiled module. ValueError when it holds no entry computation."""
    entry, name, computations = "", None, {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, instructions = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(instructions))
            name = None
        else:
            found = _instruction(line)
            if found:
                instructions.append(found)
    if not entry:
        raise ValueError("no ENTRY computation in this text")
    return Module(entry, computations)


def shapes(text: str) -> tuple[Shape, ...]:
    """ "(f32[2,3]{1,0:T(8,128)}, s32[])" -> its arrays, tuples within tuples flattened."""
    found = []
    for dtype, dims, layout in _ITEM.findall(text):
        order, _, rest = layout.partition(":")
        tile = _TILE.match(rest)
        space = _SPACE.search(rest)
        found.append(
            Shape(
                dtype,
                tuple(int(n) for n in re.findall(r"\d+", dims)),
                tuple(int(n) for n in order.split(",") if n),
                tuple(int(n) for n in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    begin = head.end()
    end = _closing(line, begin) if line[begin] == "(" else line.find(" ", begin)
    open_ = line.find("(", end)
    close = _closing(line, open_)
    inside, rest = line[open_ + 1 : close - 1], line[close:]
    opcode = line[end:open_].strip()
    literal = inside if opcode in ("constant", "parameter") else ""
    operands = () if literal else tuple(_NAME.findall(inside))
    return Instruction(
        head[2], shapes(line[begin:end]), opcode, operands, rest, literal, bool(head[1])
    )


def _closing(text: str, begin: int) -> int:
    """Index behind the bracket that closes the one at `begin`."""
    depth = 0
    for bracket in _BRACKET.finditer(text, begin):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.end()
    return len(text)
