"""Compiled text: recorded pieces as TPU compilers write them, and programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bivl.core import hlo
from bivl.core.hlo import Shape

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8])->f32[4,8]}

FileNames
1 "a (file) = with {brackets}.py"

%add (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%x.1, %y.1)
}

%inner (p.1: f32[4,8]) -> f32[4,8] {
  %p.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %exp = f32[4,8]{1,0:T(8,128)} exponential(%p.1), metadata={op_name="a/b(c)"}
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %v = f32[4,8]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %f = f32[4,8]{1,0:T(8,128)S(1)} fusion(%v), kind=kLoop, calls=%inner
  %deeper = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%s), condition=%few, body=%turn
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%i, /*index=1*/%f)
}

%turn (s.2: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  ROOT %s.2 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
}

%few (s.3: (s32[], f32[4,8])) -> pred[] {
  %s.3 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.3, %bound), direction=LT
}

%until (s.4: (s32[], f32[4,8])) -> pred[] {
  ROOT %s.4 = pred[]{:T(512)} constant(true)
}

ENTRY %main (param: f32[4,8]) -> f32[4,8] {
  %param = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%zero, %param)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%start), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"x":[]}
  %endless = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%start), condition=%until, \
body=%turn, metadata={op_name="who/knows"}
  ROOT %out = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_how_often_computations_run():
    module = hlo.parse(TEXT)
    assert module.entry == "main"
    assert module.runs == {"main": 1, "body": 3, "until": 4, "turn": 16, "few": 15}
    assert module.fused == {"inner": 3}
    assert module.unknown_loops() == ["who/knows"]


def test_instructions():
    body = hlo.parse(TEXT).computations["body"]
    fusion = body.named["f"]
    assert (fusion.opcode, fusion.operands, fusion.called) == ("fusion", ("v",), ("inner",))
    assert fusion.shapes == (Shape("f32", (4, 8), (1, 0), (8, 128), 1),)
    assert body.root.name == "t" and body.root.operands == ("i", "f")
    assert [x.name for x in body.users["s"]] == ["i", "v", "deeper"]
    assert body.operand(fusion, 0).name == "v" and body.operand(fusion, 1) is None
    inner = hlo.parse(TEXT).computations["inner"]
    assert inner.root.op_name == "a/b(c)" and inner.named["p.1"].literal == "0"


@pytest.mark.parametrize(
    ("text", "size", "room", "space"),
    [
        ("f32[4,8]", 32, 128, 0),
        ("f32[4,8]{1,0:T(8,128)}", 32, 4096, 0),
        ("f32[4,8]{0,1:T(8,128)S(1)}", 32, 4096, 1),
        ("bf16[3,8,128]{2,1,0:T(8,128)(2,1)}", 3072, 6144, 0),
        ("bf16[8,3,128]{2,0,1:T(8,128)(2,1)S(5)}", 3072, 6144, 5),
        ("f32[130]{0:T(128)}", 130, 1024, 0),
        ("pred[5]", 5, 5, 0),
        ("s4[6]", 6, 3, 0),
        ("f8e4m3fn[6]", 6, 6, 0),
        ("token[]", 1, 0, 0),
    ],
)
def test_shapes(text, size, room, space):
    (shape,) = hlo.shapes(text)
    assert (shape.size, shape.bytes, shape.space) == (size, room, space)


def test_tuples_are_flattened():
    found = hlo.shapes("((f32[2]{0}, /*index=1*/bf16[3,4]{1,0}), s32[])")
    assert [s.dims for s in found] == [(2,), (3, 4), ()]


def test_text_without_a_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_loops_of_a_program_compiled_here():
    def f(x, ws):
        body = lambda x, w: (lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=3)[0], None)  # noqa: E731
        return lax.scan(body, x, ws)[0]

    abstract = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (7, 16, 16))]
    module = hlo.parse(jax.jit(f).lower(*abstract).compile().as_text())
    assert not module.unknown_loops()
    assert 21 in (module.runs | module.fused).values()
