"""How long a step takes at least: each resource of a chip alone, at its peak."""

import dataclasses
import math

from bivl.core.collectives import Collective
from bivl.core.costs import Matmul
from bivl.core.topologies import Topology

ASSUMPTIONS = (
    "compute: all matmuls in bfloat16 at the chip's peak; a contraction and one side fill the "
    "matrix unit's lanes, the other side rows of 8; elementwise work is free",
    "hbm: every instruction reads its operands and writes its result once, at full bandwidth",
    "ici: rings along each dimension of the torus that a group spans, in both directions where the "
    "dimension closes and in one where it does not; no latency",
    "dcn: what a reduction inside a slice has left, over each chip's share of its host's network",
    "step: the slowest resource, the others hidden behind it; serial: one after the other",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the chips of a mesh are, in the mesh's order (row by row)."""

    topology: Topology
    coords: tuple[tuple[int, ...], ...]
    """Of each chip in its slice."""
    slices: tuple[int, ...]
    """Number of the slice of each chip."""

    def spread(self, group) -> tuple[int, int, list[tuple[int, int]]]:
        """A group of chips -> (slices, chips in one of them, (chips, one-way rings) of each
        dimension of the torus that these span).

        There are two rings where the dimension closes and the group spans it, one where not; chips
        that lie on one dimension without being neighbours count as if they were.
        """
        found = sorted({self.slices[i] for i in group})
        inside = [self.coords[i] for i in group if self.slices[i] == found[0]]
        spanned = []
        sizes = zip(*inside, strict=True)
        for values, size, wraps in zip(
            sizes, self.topology.shape, self.topology.wraps, strict=False
        ):
            distinct = len(set(values))
            if distinct > 1:
                spanned.append((distinct, 2 if wraps and distinct == size else 1))
        return len(found), len(inside), spanned or [(1, 1)]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step that each resource needs."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def step(self) -> float:
        """When they overlap perfectly."""
        return max(dataclasses.astuple(self))

    @property
    def serial(self) -> float:
        """When they do not overlap at all."""
        return sum(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The slowest resource."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def exchange(collective: Collective, place: Place) -> tuple[float, float]:
    """-> seconds of one call on ICI and on DCN.

    Rings (Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005):
    a gather or scatter of n bytes moves n (p - 1) / p through every link, a reduction to all twice
    that. Of an exchange of all with all n k / 4 bytes cross the middle of a dimension of k chips
    one way, half of them where it closes; the longest dimension takes longest.
    """
    chip, n = place.topology.chip, collective.bytes
    if collective.kind == "collective-permute":
        cross = any(place.slices[a] != place.slices[b] for a, b in collective.groups)
        return (0.0, n / chip.dcn) if cross else (n / chip.ici_link, 0.0)
    group = max(collective.groups, key=len)
    slices, inside, spanned = place.spread(group)
    width = sum(rings for _, rings in spanned) * chip.ici_link
    passes = 2 if collective.kind == "all-reduce" else 1
    ici = passes * n * (inside - 1) / inside / width
    dcn = passes * n / inside * (slices - 1) / slices / chip.dcn
    if "all-to-all" in collective.kind:
        crossed = max(k / rings for k, rings in spanned) / 4 if inside > 1 else 0
        ici, dcn = n * crossed / chip.ici_link, dcn * inside
    return ici, dcn


def times(matmuls: list[Matmul], moved: float, exchanges: list[Collective], place: Place) -> Times:
    """Seconds of each resource for one step of one chip; `moved`: bytes of main memory."""
    chip = place.topology.chip
    compute = math.fsum(m.padded(chip.lanes) for m in matmuls) / chip.flops
    parts = [(c.times, *exchange(c, place)) for c in exchanges]
    ici = math.fsum(count * ici for count, ici, _ in parts)
    dcn = math.fsum(count * dcn for count, _, dcn in parts)
    return Times(compute, moved / chip.hbm_bandwidth, ici, dcn)


def mfu(flops: float, seconds: float, topology: Topology) -> float:
    """Share of all chips' peak that `flops` of one step in `seconds` are."""
    return flops / seconds / topology.chip.flops / topology.count if seconds else 0.0
