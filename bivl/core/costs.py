"""What a compiled program costs one chip: its matmuls and its traffic with main memory."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from bivl.core.collectives import KINDS
from bivl.core.hlo import Computation, Instruction, Module, Shape

SLICES = ("dynamic-slice", "slice", "gather")
# Instructions that move nothing themselves.
STILL = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
STILL += ("call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency")
STILL += ("async-start", "async-update")
ALLOCATED = 'custom_call_target="AllocateBuffer"'


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matrix product, or as many equal ones as `batch` and `times` say."""

    m: int
    n: int
    k: int
    batch: int
    times: float
    """Calls in one step."""
    op_name: str

    @property
    def flops(self) -> float:
        """2 for each multiply-add, all calls."""
        return 2.0 * self.m * self.n * self.k * self.batch * self.times

    def padded(self, lanes: int) -> float:
        """FLOPs of a matrix unit of lanes x lanes that takes rows by eight.

        The contraction and one side fill up to its lanes, the other side to eight."""

        def up(size, unit):
            return -(-size // unit) * unit

        side = min(up(a, 8) * up(b, lanes) for a, b in ((self.m, self.n), (self.n, self.m)))
        return 2.0 * side * up(self.k, lanes) * self.batch * self.times


def _valid(size: int, kernel: int, out: int, window: dict) -> int:
    """Pairs of output and kernel positions along one dimension that meet an input value."""
    stride, low = window.get("stride", 1), window.get("pad", 0)
    dilate, spread = window.get("lhs_dilate", 1), window.get("rhs_dilate", 1)
    if kernel == 1 and dilate == 1 and low == 0:
        return out
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((at >= 0) & (at < (size - 1) * dilate + 1) & (at % dilate == 0)).sum())


def _window(text: str, number: int) -> list[dict]:
    """`window={size=2x3 pad=0_0x1_1}` -> for each spatial dimension its settings."""
    found = re.search(r"window=\{([^}]*)\}", text)
    windows: list[dict] = [{"size": 1} for _ in range(number)]
    for part in found[1].split() if found else ():
        name, _, values = part.partition("=")
        for window, value in zip(windows, values.split("x"), strict=False):
            window[name] = int(value.split("_")[0])
    return windows


def _convolution(x: Instruction, lhs: Shape, rhs: Shape, times: float) -> Matmul:
    """A convolution as matrix products; on TPU every matmul is one.

    Compilers write further batch, row, column and contraction dimensions as spatial ones; which a
    dimension is shows in how often output and kernel positions meet."""
    left, right, out = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", x.text).groups()
    spatial = [c for c in out if c.isdigit()]
    m, n = x.shapes[0].dims[out.index("b")], x.shapes[0].dims[out.index("f")]
    k, batch = rhs.dims[right.index("i")], 1
    for label, window in zip(sorted(spatial), _window(x.text, len(spatial)), strict=True):
        size, kernel = lhs.dims[left.index(label)], rhs.dims[right.index(label)]
        turns = x.shapes[0].dims[out.index(label)]
        valid = _valid(size, kernel, turns, window)
        if turns == 1:
            k *= valid
        elif kernel == 1:
            m *= turns
        elif size == 1:
            n *= turns
        elif valid <= turns:
            batch *= valid
        else:
            m, k = m * turns, k * valid / turns
    groups = re.search(r"(?:feature|batch)_group_count=(\d+)", x.text)
    if groups and int(groups[1]) > 1:  # each group has its own columns (features) or rows (batch)
        batch, n = batch * int(groups[1]), max(n // int(groups[1]), 1)
    return Matmul(m, n, max(round(k), 1), batch, times, x.op_name)


def _dot(x: Instruction, lhs: Shape, times: float) -> Matmul:
    def axes(name):
        found = re.search(rf"{name}=\{{([\d,]*)\}}", x.text)
        return [int(n) for n in found[1].split(",") if n] if found else []

    contracted, batched = axes("lhs_contracting_dims"), axes("lhs_batch_dims")
    k = math.prod(lhs.dims[i] for i in contracted)
    batch = math.prod(lhs.dims[i] for i in batched)
    m = lhs.size // max(k * batch, 1)
    n = x.shapes[0].size // max(m * batch, 1)
    return Matmul(m, n, k, batch, times, x.op_name)


def matmuls(module: Module) -> list[Matmul]:
    """Every matrix product and convolution, fused ones too."""
    found = []
    for name, times in (module.runs | module.fused).items():
        body = module.computations[name]
        for x in body.instructions:
            sides = [body.operand(x, i) for i in (0, 1)]
            if x.opcode == "convolution" and all(sides):
                lhs, rhs = (side.shapes[0] for side in sides if side)
                found.append(_convolution(x, lhs, rhs, times))
            elif x.opcode == "dot" and sides[0]:
                found.append(_dot(x, sides[0].shapes[0], times))
    return found


def _held(shapes: Sequence[Shape]) -> int:
    """Bytes of those that lie in main memory."""
    return sum(s.bytes for s in shapes if s.space == 0)


def _arguments(body: Computation) -> list[Instruction]:
    found = (i for i in body.instructions if i.opcode == "parameter")
    return sorted(found, key=lambda i: int(i.literal))


def _read(module: Module, body: Computation, name: str) -> int | None:
    """Bytes that a fused computation, and those in it, read of its parameter: slices of it only;
    None: all."""
    total = 0
    for x in body.users.get(name, ()):
        if x.opcode in SLICES and x.operands[0] == name:
            total += sum(s.bytes for s in x.shapes[:1])
        elif x.opcode == "dynamic-update-slice" and x.operands[0] == name != x.operands[1]:
            continue
        elif x.opcode in ("bitcast", "fusion"):
            places = [(body, x.name)]
            if x.opcode == "fusion":
                fused = module.computations[x.called[0]]
                pairs = zip(x.operands, _arguments(fused), strict=True)
                places = [(fused, argument.name) for maker, argument in pairs if maker == name]
            parts = [_read(module, *place) for place in places]
            if None in parts:
                return None
            total += sum(part or 0 for part in parts)
        else:
            return None
    return total


def _written(module: Module, body: Computation, x: Instruction) -> int:
    """Bytes that the root of a fused computation writes; of an update in place, the update."""
    if x.opcode == "tuple":
        parts = [body.named[n] for n in x.operands if n in body.named]
        return sum(_written(module, body, part) for part in parts)
    if x.opcode == "bitcast" and body.operand(x, 0):
        return _written(module, body, body.operand(x, 0))
    if x.opcode == "fusion" and x.called:
        fused = module.computations[x.called[0]]
        return _written(module, fused, fused.root)
    if x.opcode == "dynamic-update-slice" and body.operand(x, 1):
        return sum(s.bytes for s in body.operand(x, 1).shapes[:1])
    return sum(s.bytes for s in x.shapes)


def traffic(module: Module) -> dict[str, float]:
    """Bytes of main memory that one chip reads and writes in a step, by instruction's name.

    An instruction reads its operands and writes its result once; what lies in a nearer memory
    (VMEM) is free, of a stacked array a slice counts, and of an update in place the update.
    """
    found: dict[str, float] = {}
    for name, times in module.runs.items():
        body = module.computations[name]
        for x in body.instructions:
            still = x.opcode in STILL or x.opcode.endswith("-done") or ALLOCATED in x.text
            if not still:
                found[x.name] = found.get(x.name, 0.0) + times * _moved(module, body, x)
    return found


def _moved(module: Module, body: Computation, x: Instruction) -> int:
    makers = [body.named[n] for n in x.operands if n in body.named]
    if x.opcode in SLICES:
        return _held(x.shapes[:1]) + sum(s.bytes for s in x.shapes[:1])
    if x.opcode == "slice-start":  # -> (source, target, context)
        return _held(x.shapes[1:2]) + sum(s.bytes for s in x.shapes[1:2])
    if x.opcode == "dynamic-update-slice":
        return 2 * sum(s.bytes for s in makers[1].shapes[:1]) if len(makers) > 1 else 0
    if x.opcode == "copy-start":  # -> (target, source, context)
        return _held(x.shapes[:1]) + sum(_held(m.shapes[:1]) for m in makers)
    inner = module.computations.get(x.called[0]) if x.called else None
    if x.opcode != "fusion" or inner is None:
        kind = x.opcode.removesuffix("-start")
        written = x.shapes[1:2] if kind != x.opcode and kind in KINDS else x.shapes
        return _held(written) + sum(_held(m.shapes) for m in makers)
    total = 0
    for maker, argument in zip(makers, _arguments(inner), strict=False):
        whole = _held(maker.shapes)
        part = _read(module, inner, argument.name) if whole else 0
        total += whole if part is None else min(part, whole)
    return total + min(_held(x.shapes), _written(module, inner, inner.root))
