"""TPU chips and slices by name: what a topology such as "v5e:4x4" has to give."""

import dataclasses
import difflib
import math

from bivl.core.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip (docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e)."""

    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm: float
    """Bytes that a program may use: the chip's HBM less what the runtime keeps, as libtpu 0.0.42
    names it when a program needs more."""
    hbm_bandwidth: float
    """Bytes a second, reading and writing together."""
    ici_link: float
    """Bytes a second of one link in one direction: the bidirectional figure of the pages over two
    directions and the chip's links; for v4 the 50 GB/s of arXiv 2304.01433."""
    dcn: float
    """Bytes a second of a chip's share of its host's network cards, in one direction."""
    dimensions: int
    """Of the torus; a chip has two links along each."""
    lanes: int
    """Side of the matrix unit."""


# DCN: v5e hosts have 2 x 100 Gbit/s for 8 chips; v5p 50 Gbit/s a chip; v6e 4 x 200 Gbit/s for 8;
# v4 as v5p, which no page says.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 50e9, 6.25e9, 3, 128),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 2, 128),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, 3, 128),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, 2, 256),
}
PODS = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256}  # the most chips of one slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some equal slices of one kind of chip."""

    kind: str
    shape: tuple[int, ...]
    """Chips along each dimension of a slice."""
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As written on the command line, with the number of slices where there are several."""
        one = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of each dimension close to a ring.

        Two dimensions close where they span the pod's 16 chips; three where each is a multiple of 4
        (the pages' conditions; twisted tori are taken for plain ones)."""
        if self.chip.dimensions == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse(name: str, slices: int = 1) -> Topology:
    """ "v5e:4x4" -> Topology; UserError names what is wrong with it."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 1)
        cure = f"did you mean {near[0]}?" if near else f"known are {', '.join(CHIPS)}"
        raise UserError(f"--topology={name}: chip {kind!r} is unknown; {cure}")
    dimensions = CHIPS[kind].dimensions
    example = f"{kind}:{'x'.join(['4'] * dimensions)}"
    sizes = shape.split("x")
    if len(sizes) != dimensions or not all(s.isdecimal() and 0 < int(s) <= 64 for s in sizes):
        raise UserError(f"--topology={name}: {kind} has {dimensions} dimensions; write {example}")
    if slices < 1:
        raise UserError(f"--num_slices={slices} must be at least 1")
    found = Topology(kind, tuple(map(int, sizes)), slices)
    if math.prod(found.shape) > PODS[kind]:
        raise UserError(
            f"--topology={name} has {math.prod(found.shape)} chips but a slice of {kind} has at "
            f"most {PODS[kind]}; use --num_slices"
        )
    return found
