"""Rule tables read both ways: names, slots, layouts, parts, and what does not fit."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivl.core.errors import UserError
from bivl.weights import matching
from bivl.weights.rules import Rule, norm, pair
from bivl.weights.transforms import TRANSFORMS

N, D, H, F = 3, 12, 4, 20
OURS = {
    "embed/kernel": (5, 5, 3, D),
    "embed/conv0/kernel": (7, 2, D),
    "embed/conv1/kernel": (3, 2, D),
    "embed/at/value": (9, D),
    "blocks/qkv/kernel": (N, D, 3, H, D // H),
    "blocks/q/value": (N, H, D // H),
    "blocks/k/value": (N, H, D // H),
    "blocks/v/value": (N, H, D // H),
    "blocks/out/kernel": (N, H, D // H, D),
    "blocks/out/bias": (N, D),
    "blocks/norm/scale": (N, D),
    "blocks/norm/bias": (N, D),
    "blocks/mlp/kernel": (N, D, F),
    "alibi": (H,),
}
TABLE = (
    Rule("*.index", drop="an index"),
    Rule("patch.weight", "embed/kernel", "convolution"),
    Rule("convs.{i}.0.weight", "embed/conv{i-1}/kernel", "convolution"),
    Rule("at", "embed/at/value", "batched"),
    Rule("types[0/2]", "+embed/at/value", "every_row"),
    Rule("types[1/2]", drop="one type only"),
    *(
        Rule(f"early.{{n<1}}.{p}.weight", f"blocks/qkv/kernel[n,:,{i}]", "linear")
        for i, p in enumerate("qkv")
    ),
    *(Rule(f"early.{{n<1}}.{p}.bias", f"blocks/{p}/value[n]", "flat") for p in "qkv"),
    Rule("late.{n}.qkv.weight", "blocks/qkv/kernel[n+1]", "linear"),
    *(
        Rule(f"late.{{n}}.qkv.bias[{i}/3]", f"blocks/{p}/value[n+1]", "flat")
        for i, p in enumerate("qkv")
    ),
    *pair("late.{n}.out", "blocks/out[n+1]", "merge"),
    *pair("early.{n<1}.out", "blocks/out[n]", "merge"),
    *norm("late.{n}.norm", "blocks/norm[n+1]"),
    *norm("early.{n<1}.norm", "blocks/norm[n]"),
    Rule("late.{n}.mlp.old", "blocks/mlp/kernel[n+1]", "linear"),
    Rule("late.{n}.mlp.weight", "blocks/mlp/kernel[n+1]", "linear"),
    Rule("early.{n<1}.mlp.weight", "blocks/mlp/kernel[n]", "linear"),
    Rule("alibi_scale", "alibi", "alibi"),
)
SHAPES = {
    "patch.weight": (D, 3, 5, 5),
    "convs.1.0.weight": (D, 2, 7),
    "convs.2.0.weight": (D, 2, 3),
    "at": (1, 9, D),
    "types": (2, D),
    **{f"early.0.{part}.weight": (D, D) for part in "qkv"},
    **{f"early.0.{part}.bias": (D,) for part in "qkv"},
    **{f"late.{i}.qkv.weight": (3 * D, D) for i in range(2)},
    **{f"late.{i}.qkv.bias": (3 * D,) for i in range(2)},
    **{f"{block}.out.weight": (D, D) for block in ("early.0", "late.0", "late.1")},
    **{f"{block}.out.bias": (D,) for block in ("early.0", "late.0", "late.1")},
    **{
        f"{block}.norm.{x}": (D,)
        for block in ("early.0", "late.0", "late.1")
        for x in ("weight", "bias")
    },
    **{f"{block}.mlp.weight": (F, D) for block in ("early.0", "late.0", "late.1")},
    "alibi_scale": (1, 1, H, 1, 1),
    "x.index": (4, 4),
}


@dataclasses.dataclass(frozen=True)
class Array:
    """A tensor in memory with the face of one in a file."""

    value: np.ndarray

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def read(self):
        return self.value.copy()


def tensors(shapes=SHAPES):
    rng = np.random.default_rng(0)
    return {name: Array(rng.standard_normal(shape).astype("f")) for name, shape in shapes.items()}


def arrays(found, given):
    return {path: x.read() for path, x in matching.filled(found, given, OURS).items()}


def changed(**shapes):
    """The shapes with some other ones; None takes a name away."""
    named = SHAPES | {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {name: shape for name, shape in named.items() if shape is not None}


def test_a_table_takes_everything_to_its_place():
    found, given = matching.match(TABLE, SHAPES, OURS), tensors()
    assert not found.missing and not found.unused
    assert found.dropped == (("types[1/2]", "one type only"), ("x.index", "an index"))
    got, raw = arrays(found, given), {name: x.value for name, x in given.items()}
    assert {name: x.shape for name, x in got.items()} == OURS
    # The maps are those of PyTorch, in einsum's words.
    x = np.random.default_rng(1).standard_normal((2, D))
    for i, part in enumerate("qkv"):
        wanted = (x @ raw[f"early.0.{part}.weight"].T).reshape(2, H, D // H)
        np.testing.assert_allclose(
            np.tensordot(x, got["blocks/qkv/kernel"][0, :, i], 1), wanted, atol=1e-5
        )
        wanted = (x @ raw["late.1.qkv.weight"].T).reshape(2, 3, H, D // H)[:, i]
        np.testing.assert_allclose(
            np.tensordot(x, got["blocks/qkv/kernel"][2, :, i], 1), wanted, atol=1e-5
        )
        np.testing.assert_array_equal(
            got[f"blocks/{part}/value"][1].ravel(), raw["late.0.qkv.bias"].reshape(3, D)[i]
        )
    heads = x.reshape(2, H, D // H)
    out = np.tensordot(heads, got["blocks/out/kernel"][1], 2)
    np.testing.assert_allclose(out, x @ raw["late.0.out.weight"].T, atol=1e-5)
    assert got["embed/conv1/kernel"][2, 1, 5] == raw["convs.2.0.weight"][5, 1, 2]
    assert got["embed/kernel"][1, 2, 0, 7] == raw["patch.weight"][7, 0, 1, 2]
    np.testing.assert_array_equal(got["embed/at/value"], raw["at"][0] + raw["types"][0])


def test_there_and_back_is_the_same():
    found, given = matching.match(TABLE, SHAPES, OURS), tensors()
    got = arrays(found, given)
    names = matching.exported(TABLE, OURS)
    # Of alternatives the first is written; ours do not know the other type, or the index.
    wanted = {
        name.replace("late.0.mlp.weight", "late.0.mlp.old").replace(
            "late.1.mlp.weight", "late.1.mlp.old"
        )
        for name in SHAPES
    }
    assert set(names) == wanted - {"x.index"}
    for name, pieces in names.items():
        back = matching.assemble(pieces, got)
        source = given[name.replace("old", "weight")].value
        if name == "types":
            np.testing.assert_array_equal(back, np.zeros((1, D)))
        elif name == "at":
            np.testing.assert_array_equal(back[0], got["embed/at/value"])
        else:
            np.testing.assert_array_equal(back, source, err_msg=name)


def test_paths_without_are_not_written():
    names = matching.exported(TABLE, OURS, ("blocks/qkv", "alibi"))
    assert not any("qkv.weight" in name or "alibi" in name for name in names)
    assert "late.0.qkv.bias" in names


def slot_shapes():
    sizes = st.integers(1, 4)
    return {
        "": st.lists(sizes, max_size=4),
        "linear": st.lists(sizes, min_size=2, max_size=4),
        "merge": st.lists(sizes, min_size=2, max_size=4),
        "convolution": st.lists(sizes, min_size=3, max_size=4),
        "pointwise": st.lists(sizes, min_size=2, max_size=2),
        "flat": st.lists(sizes, min_size=1, max_size=3),
        "batched": st.lists(sizes, min_size=1, max_size=3),
        "alibi": st.lists(sizes, min_size=1, max_size=1),
        "old_alibi": st.lists(sizes, min_size=1, max_size=1),
    }


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"every_row"}))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_layouts_are_each_others_inverse(name, data):
    if name not in slot_shapes():
        pytest.skip("has a test of its own")
    shape = tuple(data.draw(slot_shapes()[name]))
    value = np.random.default_rng(0).standard_normal(shape)
    theirs = TRANSFORMS[name].theirs(value)
    np.testing.assert_array_equal(TRANSFORMS[name].ours(theirs, shape), value)


def test_missing_is_told_by_the_names_of_the_file():
    found = matching.match(
        TABLE, changed(early__0__q__weight=None, at=None, late__1__qkv__bias=None), OURS
    )
    assert set(found.missing) == {
        ("early.0.q.weight", "blocks/qkv/kernel[0,:,0]"),
        ("at", "embed/at/value"),
        *(("late.1.qkv.bias", f"blocks/{part}/value[2]") for part in "qkv"),
    }
    assert not found.unused


def test_of_alternatives_the_first_is_missed_and_each_will_do():
    found = matching.match(TABLE, changed(late__0__mlp__weight=None), OURS)
    assert found.missing == (("late.0.mlp.old", "blocks/mlp/kernel[1]"),)
    other = changed(late__0__mlp__weight=None) | {"late.0.mlp.old": (F, D)}
    assert not matching.match(TABLE, other, OURS).missing
    with pytest.raises(UserError, match="late.0.mlp.weight and late.0.mlp.old are both"):
        matching.match(TABLE, SHAPES | {"late.0.mlp.old": (F, D)}, OURS)


def test_what_has_no_rule_is_missed_too():
    found = matching.match(TABLE, SHAPES, OURS | {"gate": (3,)})
    assert found.missing == (("", "gate"),)
    assert not matching.match(TABLE, SHAPES, OURS | {"gate/a": (3,)}, fresh=("gate",)).missing
    assert matching.match(TABLE, SHAPES, OURS | {"gates": (3,)}, fresh=("gate",)).missing


@pytest.mark.parametrize(
    "name",
    [
        "late.2.out.bias",
        "early.1.q.bias",
        "convs.0.0.weight",
        "convs.3.0.weight",
        "late.01x.out.bias",
        "late.99999.out.bias",
        "zlate.0.out.bias",
        "late.0.out.bias\n",
        "",
    ],
)
def test_what_has_no_place_is_unused(name):
    assert matching.match(TABLE, SHAPES | {name: (D,)}, OURS).unused == (name,)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("late__0__out__weight", (D, D + 1), (D, D)),
        ("late__0__mlp__weight", (D, F), (F, D)),  # as many numbers, but turned
        ("late__1__qkv__bias", (3 * D + 1,), (3 * D,)),
        ("late__1__qkv__weight", (D, 3 * D), (3 * D, D)),
        ("alibi_scale", (H, 1, 1, 1, 1), (1, 1, H, 1, 1)),
        ("patch__weight", (D, 5, 5, 3), (D, 3, 5, 5)),
        ("types", (3, D), (2, D)),
        ("at", (9, D), (1, 9, D)),
        ("late__0__norm__bias", (), (D,)),
    ],
)
def test_a_wrong_shape_names_both(name, shape, wanted):
    with pytest.raises(UserError) as error:
        matching.match(TABLE, changed(**{name: shape}), OURS)
    line = str(error.value)
    assert line.startswith(f"{name.replace('__', '.')} has shape {shape}") and str(wanted) in line
    assert "blocks/" in line or "alibi" in line or "embed/" in line


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_numbers_are_read_as_float32(dtype):
    found, given = matching.match(TABLE, SHAPES, OURS), tensors()
    given["alibi_scale"] = Array(given["alibi_scale"].value.astype(dtype))
    got = arrays(found, given)
    assert all(x.dtype == np.float32 for x in got.values())
    np.testing.assert_array_equal(got["alibi"], given["alibi_scale"].value.astype("f").ravel())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["late.1.out.weight", "types", "late.0.qkv.bias"])
def test_what_is_not_finite_is_refused(name, bad):
    found, given = matching.match(TABLE, SHAPES, OURS), tensors()
    given[name].value.flat[0] = bad
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        arrays(found, given)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64])
def test_what_is_no_weight_is_refused(dtype):
    found, given = matching.match(TABLE, SHAPES, OURS), tensors()
    given["alibi_scale"] = Array(given["alibi_scale"].value.astype(dtype))
    with pytest.raises(UserError, match="alibi_scale holds"):
        arrays(found, given)
