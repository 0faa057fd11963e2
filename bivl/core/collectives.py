"""The exchanges between chips in a compiled program: what kind, who with whom, how much."""

import dataclasses
import math
import re

import numpy as np

from bivl.core.hlo import Computation, Instruction, Module, Shape

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
KINDS += ("collective-permute", "collective-broadcast")
_SENT = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between chips."""

    kind: str
    bytes: int
    """Of one call and chip, of the whole: what a gather gives, what a reduction takes."""
    groups: tuple[tuple[int, ...], ...]
    """Chips (numbers in the mesh, row by row) that exchange; of a permute (source, target)."""
    times: float
    dims: tuple[int, ...]
    """Of its largest array, as gathered."""
    dtype: str
    op_name: str


def groups_of(text: str, count: int) -> tuple[tuple[int, ...], ...]:
    """`replica_groups=` in any of its forms, or `source_target_pairs=` -> groups of chips.

    The forms: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2] {'b'} and {} for all `count`.
    """
    pairs = re.search(r"source_target_pairs=\{([\d,{}\s]*)\}", text)
    listed = re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", text)
    if pairs or listed:
        inside = re.findall(r"\{([\d,\s]*)\}", (pairs or listed)[1])
        return tuple(tuple(int(n) for n in re.findall(r"\d+", g)) for g in inside)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = ([int(n) for n in (g or "").split(",") if n] for g in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(order) if order else ids
        return tuple(map(tuple, ids.reshape(shape).tolist()))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    return (tuple(range(count)),)


def _mesh_groups(mesh: str, devices: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}: axes, or parts (before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    shape, chosen, number = [], [], 0
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    for name, size in sizes.items():
        # An axis whose part (before)size is meant is split into before x size x after.
        part = next((p for p in parts if p[0] == name), None)
        split = [size]
        if part and part[1]:
            before, inner = int(part[1]), int(part[2])
            split = [before, inner, size // before // inner]
        for i, length in enumerate(split):
            shape.append(length)
            if part and (len(split) == 1 or i == 1):
                chosen.append(number)
            number += 1
    count = math.prod(shape)
    ids = np.arange(count)
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", devices)
    if order:  # numbers laid out in one shape, and read with its dimensions in another order
        dims, moved = ([int(n) for n in (g or "").split(",") if n] for g in order.groups())
        ids = ids.reshape(dims).transpose(moved) if moved else np.array(dims)
    rest = [i for i in range(number) if i not in chosen]
    ids = ids.reshape(shape).transpose(rest + chosen)
    width = math.prod(shape[i] for i in chosen)
    return tuple(map(tuple, ids.reshape(-1, width).tolist()))


def find(module: Module, count: int, slices: int = 1) -> list[Collective]:
    """Every exchange between `slices` of `count` chips, each once though it is started, awaited
    and cloned.

    Each slice has the same program, in which chips are numbered from 0; what goes to others is a
    `send` to the host there, whose attributes say what becomes of it.
    """
    times = module.runs | module.fused
    started = set()  # (channel) of those that begin in one fusion and go on in others
    for name in module.fused:
        body = module.computations[name]
        if any('custom_call_target="AsyncCollectiveStart"' in x.text for x in body.instructions):
            started |= {_channel(x) for x in body.instructions if _kind(x)}
    found = []
    for name in times:
        body = module.computations[name]
        begins = any("AsyncCollectiveStart" in x.text for x in body.instructions)
        for x in body.instructions:
            goes_on = name in module.fused and not begins and _channel(x) in started
            sent = _SENT.search(x.text) if x.opcode == "send" else None
            if sent:
                found.append(_between(body, x, sent[1], times[name], count, slices))
            if _kind(x) and not goes_on:
                scattered = name.startswith("all-reduce-scatter")
                found.append(_collective(body, x, times[name], count, scattered))
    return [c for c in found if any(len(set(g)) > 1 for g in c.groups)]


def _between(body: Computation, x: Instruction, what, times, count, slices) -> Collective:
    """An exchange of each chip with those in its place in other slices."""
    kind = {"ONE_TO_ONE": "collective-permute"}.get(what, what.lower().replace("_", "-"))
    groups = tuple(tuple(i + count * s for s in range(slices)) for i in range(count))
    maker = body.operand(x, 0)
    shape = maker.shapes[0] if maker else Shape("", ())
    if kind == "collective-permute":
        groups = tuple(group[:2] for group in groups)
    size = shape.bytes * (slices if kind == "all-gather" else 1)
    return Collective(kind, size, groups, times, shape.dims, shape.dtype, x.op_name)


def _kind(x: Instruction) -> str:
    kind = x.opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _channel(x: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", x.text)
    return found[1] if found else x.name


def _collective(
    body: Computation, x: Instruction, times: float, count: int, scattered: bool
) -> Collective:
    kind, groups = _kind(x), groups_of(x.text, count)
    makers = [body.named[n] for n in x.operands if n in body.named]
    shapes = [s for m in makers for s in m.shapes[:1]]
    size = sum(s.bytes for s in shapes)
    largest = max(shapes, key=lambda s: s.bytes, default=Shape("", ()))
    dims = largest.dims
    if kind == "all-gather":
        size *= len(groups[0])
        named = re.search(r"dimensions=\{(\d+)\}", x.text)
        axis = int(named[1]) if named else 0
        dims = tuple(n * len(groups[0]) if i == axis else n for i, n in enumerate(dims))
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    return Collective(kind, size, groups, times, dims, largest.dtype, x.op_name)


def axes_of(groups, shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the chips of a group differ."""
    first = np.array([g for g in groups if len(set(g)) > 1][:64], dtype=object)
    found = set()
    for group in first:
        places = np.array(np.unravel_index(np.array(list(group), int), tuple(shape.values())))
        found |= {n for n, row in zip(shape, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(n for n in shape if n in found)
