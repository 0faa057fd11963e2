"""Names of TPU slices."""

import pytest

from bivl.core import topologies
from bivl.core.errors import UserError


@pytest.mark.parametrize(
    ("name", "slices", "count", "wraps", "shown"),
    [
        ("v5e:4x4", 1, 16, (False, False), "v5e:4x4"),
        ("v6e:8x16", 2, 256, (False, True), "2 x v6e:8x16"),
        ("v5p:4x4x8", 2, 256, (True,) * 3, "2 x v5p:4x4x8"),
        ("v4:2x2x1", 1, 4, (False,) * 3, "v4:2x2x1"),
        ("v4:4x4x2", 1, 32, (False,) * 3, "v4:4x4x2"),
    ],
)
def test_slices(name, slices, count, wraps, shown):
    found = topologies.parse(name, slices)
    assert (found.count, found.wraps, found.name) == (count, wraps, shown)


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("v5:4x4", 1, "chip 'v5' is unknown; did you mean v5"),
        ("h100", 1, "chip 'h100' is unknown; known are v4, v5e"),
        ("v5e:4x4x4", 1, "v5e has 2 dimensions; write v5e:4x4"),
        ("v5p:4x4", 1, "write v5p:4x4x4"),
        ("v5e", 1, "write v5e:4x4"),
        ("v5e:0x4", 1, "write v5e:4x4"),
        ("v5e:-4x4", 1, "write v5e:4x4"),
        ("v5e:32x16", 1, "512 chips .* at most 256; use --num_slices"),
        ("v5e:4x4", 0, "--num_slices=0"),
    ],
)
def test_what_is_no_slice(name, slices, words):
    with pytest.raises(UserError, match=words):
        topologies.parse(name, slices)
