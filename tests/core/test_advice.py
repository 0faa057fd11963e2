"""Warnings and what to try, on made-up programs."""

import pytest

from bivl.core import advice, hlo
from bivl.core.advice import Leaf
from bivl.core.collectives import Collective
from bivl.core.costs import Matmul

MESH = {"data": 8, "fsdp": 1, "tensor": 1}
WHOLE = Leaf("params/trunk/w", (12, 1024, 4096), (12, 1024, 4096), 4)
PART = Leaf("params/trunk/w", (12, 1024, 4096), (12, 128, 4096), 4)
SMALL = Leaf("params/b", (4096,), (4096,), 4)
BATCH = Leaf("batch/image", (64, 512, 512, 3), (64, 512, 512, 3), 1)


def test_large_arrays_that_every_chip_holds():
    (line,) = advice.replicated([WHOLE, SMALL, BATCH], MESH)
    assert line.startswith("1 arrays of the state, 0.20 GB") and "config.mesh.fsdp" in line
    (line,) = advice.replicated([WHOLE], MESH | {"fsdp": 8})
    assert "bivl/core/sharding.py" in line
    assert not advice.replicated([PART, SMALL, BATCH], MESH)
    assert not advice.replicated([WHOLE], dict.fromkeys(MESH, 1))


def test_matmuls_that_fill_the_unit_badly():
    good = Matmul(1024, 1024, 1024, 1, 1, "a/mlp/dot_general")
    bad = Matmul(17, 17, 32, 4096, 12, "a/BHQd,BHKd->BHQK/dot_general")
    assert not advice.padded([good], 128) and not advice.padded([], 128)
    (line,) = advice.padded([good, bad], 128)
    assert "multiplies 13.35 times" in line and "mlp" not in line
    assert "BHQd,BHKd->BHQK [17, 32] x [32, 17] wastes 93%" in line


def scores(space, name="softmax/exp"):
    return hlo.parse(f"""%soft (p: f32[8,12,512,512]) -> f32[8,12,512,512] {{
  %p = f32[8,12,512,512] parameter(0)
  ROOT %e = f32[8,12,512,512] exponential(%p), metadata={{op_name="a/{name}"}}
}}

ENTRY %main (q: f32[8,12,512,64]) -> f32[8,12,512,512] {{
  %q = f32[8,12,512,64] parameter(0)
  %s = f32[8,12,512,512]{{3,2,1,0{space}}} dot(%q, %q), lhs_contracting_dims={{3}}
  ROOT %f = f32[8,12,512,512]{{3,2,1,0{space}}} fusion(%s), kind=kLoop, calls=%soft
}}
""")


def test_scores_of_attention_in_main_memory():
    (line,) = advice.attention(scores(""))
    assert "0.2 GB of scores" in line and "[8, 12, 512, 512]" in line
    assert not advice.attention(scores(":S(1)"))
    assert not advice.attention(scores("", "logistic"))


def gather(dims, times):
    size = 4
    for n in dims:
        size *= n
    return Collective("all-gather", size, ((0, 1),), times, dims, "f32", "")


@pytest.mark.parametrize(
    ("times", "lines"),
    [(12, 0), (24, 1)],  # every layer once, every layer twice
)
def test_parameters_that_are_gathered_twice(times, lines):
    found = advice.gathers([gather((1024, 4096), times), gather((77, 4096), 99)], [PART, SMALL])
    assert len(found) == lines
    assert all("24 times for 12 parameters" in line and PART.path in line for line in found)


FACTS = {"accumulate": 2, "rows": [16, 8], "remat": "none", "gather": "update", "mesh": MESH}


def test_what_to_try():
    """1 GB of state of which 0.2 are parameters; temporaries of 10 GB and a chip of 8."""
    leaves = [WHOLE, Leaf("opt_state/mu", (200_000_000,), (200_000_000,), 4)]
    found = advice.cures(8e9, leaves, 10e9, FACTS, 8)
    assert found == [
        "--config.optimizer.accumulate=4",
        "--config.model.remat=full, a third more matmuls",
        "16 chips at the same batch_size",
    ]
    found = advice.cures(1e9, leaves, 0.2e9, FACTS | {"remat": "full"}, 8)
    assert found == ["--config.mesh.fsdp=2"]
    assert "smaller batch_size" in advice.cures(1e6, leaves, 1e9, FACTS | {"remat": "full"}, 8)[0]
    divided = FACTS | {"mesh": MESH | {"fsdp": 2}}
    layer = "--config.mesh.gather=layer, which gathers parameters more often"
    assert layer in advice.cures(8e9, leaves, 10e9, divided, 8)
    assert layer not in advice.cures(8e9, leaves, 10e9, divided | {"gather": "layer"}, 8)
