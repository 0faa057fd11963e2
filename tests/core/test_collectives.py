"""Who exchanges with whom: every form in which compilers write it, and programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bivl.core import collectives, hlo, sharding

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("replica_groups=[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7)), ("fsdp", "tensor")),
        (
            "replica_groups=[2,4]<=[4,2]T(1,0)",
            ((0, 2, 4, 6), (1, 3, 5, 7)),
            ("data", "fsdp"),
        ),
        ("replica_groups=[1,8]<=[8]", (tuple(range(8)),), ("data", "fsdp", "tensor")),
        ("replica_groups={}", (tuple(range(8)),), ("data", "fsdp", "tensor")),
        ("", (tuple(range(8)),), ("data", "fsdp", "tensor")),
        (
            "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={0}",
            ((0, 2), (1, 3), (4, 6), (5, 7)),
            ("fsdp",),
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}",
            ((0, 1, 4, 5), (2, 3, 6, 7)),
            ("data", "tensor"),
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}",
            ((0, 2), (1, 3), (4, 6), (5, 7)),
            ("fsdp",),
        ),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
            ("fsdp", "tensor"),
        ),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
            ("data",),
        ),
        ("source_target_pairs={{0,1},{1,0},{2,2}}", ((0, 1), (1, 0), (2, 2)), ("tensor",)),
    ],
)
def test_groups(text, groups, axes):
    found = collectives.groups_of(f"channel_id=1, {text}, metadata={{}}", 8)
    assert found == groups
    assert collectives.axes_of(found, MESH) == axes


def compiled(f, places, *shapes):
    mesh = sharding.make_mesh(MESH)
    abstract = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*p)))
        for s, p in zip(shapes, places[:-1], strict=True)
    ]
    out = NamedSharding(mesh, PartitionSpec(*places[-1]))
    program = jax.jit(f, out_shardings=out).lower(*abstract).compile()
    found = collectives.find(hlo.parse(program.as_text()), 8)
    return {(c.kind, collectives.axes_of(c.groups, MESH)): (c.bytes, c.times) for c in found}


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # contracted over fsdp: a sum of what each has, [16, 64] of data's halves
        ([("data", "fsdp"), ("fsdp",), ("data",)], {("all-reduce", ("fsdp",)): (4 * 8 * 64, 1)}),
        ([("data",), (None, "tensor"), ("data", "tensor")], {}),
        (
            [("data",), (None, "tensor"), ("data",)],
            {("all-gather", ("tensor",)): (4 * 8 * 64, 1)},
        ),
    ],
)
def test_matmuls_compiled_here(places, expected):
    assert compiled(jnp.matmul, places, (16, 32), (32, 64)) == expected


def test_an_exchange_in_a_loop_counts_every_turn():
    def f(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]

    places = [("data", "fsdp"), (None, "fsdp"), ("data", "fsdp")]
    found = compiled(f, places, (16, 32), (7, 32, 32))
    assert {times for _, times in found.values()} == {7}
    assert found and all("fsdp" in axes for _, axes in found)


ASYNC = """%begin (p.0: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {
  %p.0 = bf16[64,128] parameter(0)
  %g.0 = bf16[256,128] all-gather(%p.0), channel_id=84, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %s = (bf16[64,128], bf16[256,128]) custom-call(%g.0), \
custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p.1: bf16[64,128]) -> bf16[256,128] {
  %p.1 = bf16[64,128] parameter(0)
  ROOT %g.1 = bf16[256,128] all-gather(%p.1), channel_id=84, replica_groups={{0,1,2,3}}, \
dimensions={0}
}

%end (p.2: bf16[64,128]) -> bf16[256,128] {
  %p.2 = bf16[64,128] parameter(0)
  %g.2 = bf16[256,128] all-gather(%p.2), channel_id=84, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = bf16[256,128] custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.3: f32[8,4]) -> f32[2,4] {
  %p.3 = f32[8,4] parameter(0)
  %i = s32[] constant(0)
  %r = f32[8,4] all-reduce(%p.3), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %mine = f32[2,4] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,4}
}

ENTRY %main (a: bf16[64,128], b: f32[8,4]) -> bf16[256,128] {
  %a = bf16[64,128] parameter(0)
  %b = f32[8,4] parameter(1)
  %f.0 = (bf16[64,128], bf16[256,128]) fusion(%a), kind=kCustom, calls=%begin
  %f.1 = bf16[256,128] fusion(%a), kind=kCustom, calls=%meanwhile
  %f.3 = f32[2,4] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %alone = f32[8,4] all-reduce(%b), channel_id=9, replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  %to = (f32[8,4], f32[8,4], u32[]) collective-permute-start(%b), source_target_pairs={{0,1},{1,2}}
  %at = f32[8,4] collective-permute-done(%to)
  ROOT %f.2 = bf16[256,128] fusion(%a), kind=kCustom, calls=%end
}
"""


def test_what_is_started_and_awaited_counts_once():
    """As libtpu overlaps a gather with other work, and writes a reduction of which each keeps a
    part."""
    found = collectives.find(hlo.parse(ASYNC), 4)
    assert sorted((c.kind, c.bytes, c.times, c.dims) for c in found) == [
        ("all-gather", 2 * 256 * 128, 1, (256, 128)),
        ("collective-permute", 4 * 8 * 4, 1, (8, 4)),
        ("reduce-scatter", 4 * 8 * 4, 1, (8, 4)),
    ]


SLICES = """ENTRY %main (a: bf16[128,4096]) -> bf16[128,4096] {
  %a = bf16[128,4096] parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[128,4096], u32[], token[]) send(%a, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:7}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[128,4096], u32[], token[]) recv(%after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (bf16[128,4096], token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %out = bf16[128,4096] get-tuple-element(%recv-done), index=0
}
"""


def test_what_slices_exchange():
    """As libtpu writes it for several slices, every one of which runs this text."""
    (found,) = collectives.find(hlo.parse(SLICES), 8, 2)
    assert (found.kind, found.bytes, found.times) == ("all-reduce", 2 * 128 * 4096, 1)
    assert found.groups[1] == (1, 9) and len(found.groups) == 8
    assert collectives.axes_of(found.groups, {"data": 4, "fsdp": 4, "tensor": 1}) == ("data",)
