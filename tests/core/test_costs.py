"""Matmuls and memory traffic of programs compiled here, and of lines as the TPU writes them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bivl.core import costs, flops, hlo


def compiled(f, *shapes):
    abstract = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.parse(jax.jit(f).lower(*abstract).compile().as_text()), flops.count(f, *abstract)


def convolve(x, w):
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=axes)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (jnp.matmul, ((3, 4), (4, 5))),
        (lambda q, k: jnp.einsum("BHQd,BHKd->BHQK", q, k), ((2, 3, 5, 8), (2, 3, 7, 8))),
        (
            lambda x, ws: lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0],
            ((8, 16), (7, 16, 16)),
        ),
        (convolve, ((2, 8, 8, 3), (2, 2, 3, 16))),
    ],
)
def test_flops_are_those_of_the_shapes(f, shapes):
    module, counted = compiled(f, *shapes)
    found = math.fsum(m.flops for m in costs.matmuls(module))
    assert found == counted > 0


def line(lhs, rhs, out, rest):
    """The only matmul of a program of one convolution."""
    text = f"""ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {rest}
}}
"""
    (found,) = costs.matmuls(hlo.parse(text))
    return found.m, found.n, found.k, found.batch


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "rest", "expected"),
    [  # as libtpu writes them for v5e
        # patches times their projection: height, width and colours are contracted
        (
            "bf16[4,64,8,8,3]", "f32[8,8,3,128,1]", "f32[4,64,128,1,1]",
            "window={size=8x3x1}, dim_labels=2b0f1_0i1o2->2bf01", (4 * 64, 128, 192, 1),
        ),
        # a projection to query, key and value: three and heads are columns
        (
            "f32[4,65,128,1,1]", "f32[128,3,4,32,1]", "f32[4,65,3,4,32]",
            "window={size=1x3x4 pad=0_0x2_2x3_3 rhs_reversal=0x1x1}, "
            "dim_labels=0bf12_i12o0->0b12f", (4 * 65, 3 * 4 * 32, 128, 1),
        ),
        # scores of attention: examples and heads are a batch
        (
            "f32[4,4,65,32]", "f32[4,4,65,32]", "f32[4,4,65,65]",
            "window={size=4x4 stride=3x3 lhs_dilate=4x4}, dim_labels=01bf_01oi->01bf",
            (65, 65, 32, 16),
        ),
    ],
)  # fmt: skip
def test_matmuls_that_are_written_as_convolutions(lhs, rhs, out, rest, expected):
    assert line(lhs, rhs, out, rest) == expected


def test_the_matrix_unit_is_filled_up():
    matmul = costs.Matmul(m=197, n=197, k=64, batch=12, times=2, op_name="")
    assert matmul.flops == 2 * 197 * 197 * 64 * 24
    assert matmul.padded(128) == 2 * 200 * 256 * 128 * 24
    assert matmul.padded(256) == 2 * 200 * 256 * 256 * 24
    full = costs.Matmul(m=128, n=8, k=256, batch=1, times=1, op_name="")
    assert full.padded(128) == full.flops


TRAFFIC = """%slice (p.0: f32[24,8,128], p.1: s32[], p.2: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[24,8,128] parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[8,128] parameter(2)
  %one = f32[1,8,128] dynamic-slice(%p.0, %p.1, %p.1, %p.1), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128] bitcast(%one)
  ROOT %sum = f32[8,128] add(%flat, %p.2)
}

%put (q.0: f32[24,8,128], q.1: f32[1,8,128], q.2: s32[]) -> f32[24,8,128] {
  %q.0 = f32[24,8,128] parameter(0)
  %q.1 = f32[1,8,128] parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %new = f32[24,8,128] dynamic-update-slice(%q.0, %q.1, %q.2, %q.2, %q.2)
}

ENTRY %main (a: f32[24,8,128], b: f32[8,128]) -> f32[24,8,128] {
  %a = f32[24,8,128] parameter(0)
  %b = f32[8,128] parameter(1)
  %i = s32[] constant(3)
  %layer = f32[8,128] fusion(%a, %i, %b), kind=kLoop, calls=%slice
  %near = f32[8,128]{1,0:S(1)} negate(%layer)
  %start = (f32[8,128]{1,0:S(1)}, f32[8,128], u32[]) copy-start(%b)
  %done = f32[8,128]{1,0:S(1)} copy-done(%start)
  %row = f32[1,8,128]{2,1,0:S(1)} bitcast(%done)
  ROOT %all = f32[24,8,128] fusion(%a, %row, %i), kind=kLoop, calls=%put
}
"""


def test_slices_updates_and_near_memory():
    array = 4 * 8 * 128
    assert costs.traffic(hlo.parse(TRAFFIC)) == {
        "layer": 3 * array + 4,  # a layer of the stack, the index and b in, a layer out
        "near": array,  # what it reads; its result stays near
        "start": array,
        "all": array + 4,  # the update alone, and the index
    }


NESTED = """%take (t.0: f32[24,8,128], t.1: s32[]) -> f32[8,128] {
  %t.0 = f32[24,8,128] parameter(0)
  %t.1 = s32[] parameter(1)
  %one = f32[1,8,128] dynamic-slice(%t.0, %t.1, %t.1, %t.1), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128] bitcast(%one)
}

%outer (o.0: f32[24,8,128], o.1: s32[]) -> f32[8,128] {
  %o.0 = f32[24,8,128] parameter(0)
  %o.1 = s32[] parameter(1)
  %layer = f32[8,128] fusion(%o.0, %o.1), kind=kLoop, calls=%take
  ROOT %more = f32[8,128] negate(%layer)
}

ENTRY %main (a: f32[24,8,128]) -> f32[8,128] {
  %a = f32[24,8,128] parameter(0)
  %i = s32[] constant(3)
  %room = f32[24,8,128] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %all = f32[8,128] fusion(%a, %i), kind=kOutput, calls=%outer
}
"""


def test_a_slice_within_a_fusion_within_a_fusion():
    """And room that is only set aside moves nothing."""
    assert costs.traffic(hlo.parse(NESTED)) == {"all": 2 * 4 * 8 * 128 + 4}


def test_traffic_of_a_program_compiled_here():
    module, _ = compiled(lambda x: x + 1.0, (256, 256))
    assert math.fsum(costs.traffic(module).values()) == 2 * 4 * 256 * 256
