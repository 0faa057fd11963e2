"""Times by hand."""

import itertools

import pytest

from bivl.core import roofline, topologies
from bivl.core.collectives import Collective
from bivl.core.costs import Matmul
from bivl.core.roofline import Place


def place(name, slices=1):
    topology = topologies.parse(name, slices)
    coords = list(itertools.product(*(range(n) for n in topology.shape)))
    numbers = [s for s in range(slices) for _ in coords]
    return Place(topology, tuple(coords) * slices, tuple(numbers))


def collective(kind, size, *groups):
    return Collective(kind, size, groups, 1.0, (), "f32", "")


ROW, ALL = range(0, 16), range(0, 256)  # of v5e:16x16: one dimension that closes, and both


@pytest.mark.parametrize(
    ("kind", "where", "group", "seconds"),
    [
        ("all-gather", "v5e:16x16", ROW, 1e9 * 15 / 16 / (2 * 50e9)),
        ("reduce-scatter", "v5e:16x16", ROW, 1e9 * 15 / 16 / (2 * 50e9)),
        ("all-reduce", "v5e:16x16", ROW, 2e9 * 15 / 16 / (2 * 50e9)),
        ("all-reduce", "v5e:16x16", ALL, 2e9 * 255 / 256 / (4 * 50e9)),
        ("all-gather", "v5e:4x4", range(0, 4), 1e9 * 3 / 4 / 50e9),  # does not close
        ("all-gather", "v5e:16x16", range(0, 8), 1e9 * 7 / 8 / 50e9),  # half of a ring
        ("all-gather", "v5p:4x4x4", range(0, 4), 1e9 * 3 / 4 / (2 * 100e9)),
        ("all-to-all", "v5e:16x16", ROW, 1e9 * 16 / 8 / 50e9),
        ("all-to-all", "v5e:16x16", ALL, 1e9 * 16 / 8 / 50e9),
        ("all-to-all", "v5e:8x8", range(0, 64), 1e9 * 8 / 4 / 50e9),
        ("all-to-all", "v5p:4x4x4", range(0, 64), 1e9 * 4 / 8 / 100e9),
    ],
)
def test_rings(kind, where, group, seconds):
    ici, dcn = roofline.exchange(collective(kind, 1e9, tuple(group)), place(where))
    assert ici == pytest.approx(seconds) and dcn == 0


def test_a_neighbour():
    moved = collective("collective-permute", 1e9, (0, 1), (1, 2))
    assert roofline.exchange(moved, place("v5e:4x4")) == (1e9 / 50e9, 0)
    assert roofline.exchange(moved, place("v5e:1x1", 3)) == (0, 1e9 / 3.125e9)


def test_slices_exchange_what_a_chip_of_each_has_left():
    ici, dcn = roofline.exchange(
        collective("all-reduce", 1e9, tuple(range(32))), place("v5e:4x4", 2)
    )
    assert ici == pytest.approx(2e9 * 15 / 16 / (2 * 50e9))
    assert dcn == pytest.approx(2e9 / 16 / 2 / 3.125e9)
    ici, dcn = roofline.exchange(collective("all-reduce", 1e9, (0, 16)), place("v5e:4x4", 2))
    assert ici == 0 and dcn == pytest.approx(1e9 / 3.125e9)


def test_times_and_what_bounds_them():
    matmul = Matmul(m=1024, n=1024, k=1024, batch=1, times=100, op_name="")
    reduced = collective("all-reduce", 1e6, tuple(range(16)))
    found = roofline.times([matmul], 8.19e9, [reduced, reduced], place("v5e:4x4"))
    assert found.compute == pytest.approx(2 * 1024**3 * 100 / 197e12)
    assert found.hbm == pytest.approx(0.01)
    assert found.ici == pytest.approx(2 * 2e6 * 15 / 16 / 100e9)
    assert (found.bound, found.step) == ("hbm", found.hbm)
    assert found.serial == pytest.approx(found.compute + found.hbm + found.ici)


def test_mfu():
    topology = topologies.parse("v5p:2x2x1")
    assert roofline.mfu(4 * 459e12, 2.0, topology) == pytest.approx(0.5)
    assert roofline.mfu(1.0, 0.0, topology) == 0
