"""What is worth changing about a compiled step, and what to try when it does not fit."""

import dataclasses
import math
from collections import defaultdict

from bivl.core.collectives import Collective
from bivl.core.costs import Matmul
from bivl.core.hlo import Module

LARGE = 2**24  # bytes of an array that a chip should not hold whole without need
MARGIN = 0.95  # of main memory that an estimate may fill


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the state or the batch."""

    path: str
    """"params/...", "teacher/...", "opt_state/...", "extras/...", "step" or "batch/..."."""
    shape: tuple[int, ...]
    held: tuple[int, ...]
    """Shape of a chip's part."""
    itemsize: float

    @property
    def bytes(self) -> int:
        """On one chip."""
        return int(math.prod(self.held) * self.itemsize)


def replicated(leaves: list[Leaf], mesh: dict[str, int]) -> list[str]:
    """Large arrays of the state that every chip holds whole."""
    whole = [x for x in leaves if x.held == x.shape and x.bytes >= LARGE]
    whole = [x for x in whole if not x.path.startswith("batch/")]
    if not whole or math.prod(mesh.values()) == 1:
        return []
    largest = max(whole, key=lambda x: x.bytes)
    cure = "give its axes a rule in bivl/core/sharding.py"
    if mesh["fsdp"] == 1:
        cure = "config.mesh.fsdp divides them"
    return [
        f"{len(whole)} arrays of the state, {sum(x.bytes for x in whole) / 1e9:.2f} GB, lie whole "
        f"on every chip, the largest {largest.path} {list(largest.shape)}; {cure}"
    ]


def padded(matmuls: list[Matmul], lanes: int, worst: int = 3) -> list[str]:
    """Matmuls that fill the matrix unit badly, where they cost more than a tenth of all."""
    total = math.fsum(m.padded(lanes) for m in matmuls)
    useful = math.fsum(m.flops for m in matmuls)
    if not total or useful > 0.9 * total:
        return []
    groups: dict[tuple, list[Matmul]] = defaultdict(list)
    for m in matmuls:
        groups[m.op_name.split("/")[-2:][0], *sorted((m.m, m.n)), m.k].append(m)

    def waste(found):
        return math.fsum(m.padded(lanes) - m.flops for m in found)

    shown = []
    for (name, m, n, k), found in sorted(groups.items(), key=lambda g: -waste(g[1]))[:worst]:
        if waste(found) > 0.01 * total:
            shown.append(f"{name} [{m}, {k}] x [{k}, {n}] wastes {waste(found) / total:.0%}")
    return [
        f"the matrix unit multiplies {total / useful:.2f} times the values that there are (sizes "
        f"that are multiples of 8 and {lanes} fill it): {'; '.join(shown)}"
    ]


def attention(module: Module) -> list[str]:
    """Softmax's scores that go through main memory: [.., queries, keys] for every head.

    They are told by their `exp`; that of a sigmoid is called `logistic`.
    """
    bodies = [module.computations[name] for name in module.runs | module.fused]
    scores = set()
    for body in bodies:
        for x in body.instructions:
            softmax = x.opcode == "exponential" and x.op_name.endswith("/exp")
            if softmax and len(_sides(x.shapes[0].dims)) >= 4:
                scores.add(_sides(x.shapes[0].dims))
    total, largest = 0.0, (0, ())
    for name, times in module.runs.items():
        for x in module.computations[name].instructions:
            if x.opcode in ("parameter", "get-tuple-element", "tuple", "bitcast", "while"):
                continue
            for shape in x.shapes:
                if shape.space == 0 and _sides(shape.dims) in scores:
                    total += times * shape.bytes
                    largest = max(largest, (shape.bytes, shape.dims))
    if largest[0] < LARGE:
        return []
    return [
        f"attention is not fused: {total / 1e9:.1f} GB of scores are written to main memory, the "
        f"largest {list(largest[1])}"
    ]


def _sides(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in dims if n > 1))


def gathers(exchanges: list[Collective], leaves: list[Leaf]) -> list[str]:
    """Parameters (or a layer of stacked ones) that are gathered more than once a step."""
    owners: dict[int, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        if leaf.path.startswith(("params/", "teacher/")) and leaf.held != leaf.shape:
            size = math.prod(leaf.shape)
            owners[size].append(leaf)
            if len(leaf.shape) > 2:
                owners[size // leaf.shape[0]] += [leaf] * leaf.shape[0]
    counts: dict[int, float] = defaultdict(float)
    moved: dict[int, float] = defaultdict(float)
    for c in exchanges:
        size = math.prod(c.dims)
        if c.kind == "all-gather" and size in owners and c.bytes >= 2**20:
            counts[size] += c.times
            moved[size] += c.times * c.bytes
    lines = []
    for size in sorted(counts, key=lambda s: -moved[s]):
        if counts[size] > len(owners[size]):
            names = sorted({x.path for x in owners[size]})
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(
                f"arrays of {size:,} values are gathered {counts[size]:.0f} times for "
                f"{len(owners[size])} parameters ({moved[size] / 1e9:.2f} GB a chip): {shown}; "
                "--config.mesh.gather=update gathers each once"
            )
    return lines


def cures(
    capacity: float, leaves: list[Leaf], temporary: float, facts: dict, chips: int
) -> list[str]:
    """What to try when a step needs more than `capacity` bytes of a chip; the nearest first.

    Estimates: activations shrink with the examples of a micro-batch, the state with mesh.fsdp.
    """
    state = sum(x.bytes for x in leaves)
    gradients = sum(x.bytes for x in leaves if x.path.startswith("params/"))
    room, lines = MARGIN * capacity, []
    accumulate, rows = facts["accumulate"], facts["rows"]
    for times in (2, 4, 8, 16, 32, 64):
        if state + gradients + temporary / times <= room and all(r % times == 0 for r in rows):
            lines.append(f"--config.optimizer.accumulate={accumulate * times}")
            break
    if facts["remat"] == "none":
        lines.append("--config.model.remat=full, a third more matmuls")
    mesh = facts["mesh"]
    if mesh["fsdp"] > 1 and facts["gather"] == "update":
        lines.append("--config.mesh.gather=layer, which gathers parameters more often")
    for fsdp in (2, 4, 8, 16, 32, 64):
        if mesh["data"] % fsdp or mesh["fsdp"] > 1:
            break
        if state / fsdp + temporary <= room:
            lines.append(f"--config.mesh.fsdp={fsdp}")
            break
    for times in (2, 4, 8, 16):
        if state + temporary / times <= room and all(r % times == 0 for r in rows):
            lines.append(f"{chips * times} chips at the same batch_size")
            break
    return lines or ["a smaller batch_size, and --config.mesh.fsdp for the state"]
