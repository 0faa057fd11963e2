"""What a pickle of weights may name, and what each name stands for here.

Nothing is imported or called that a file asks for: a name selects one of the functions below, and
each of these only rearranges what it is given.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bivl.weights.stored import AGAIN, shown
from bivl.weights.tensors import DTYPES


class BadPickle(Exception):
    """A pickle that is damaged or not admitted: the cause, and the cure where it is a special one.

    Whoever knows the file turns it into a UserError.
    """

    def __init__(self, cause: str, cure: str = AGAIN) -> None:
        super().__init__(cause)
        self.cause, self.cure = cause, cure


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A name in the file, with its module. It refers to nothing."""

    full: str


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What the file says of an object: the name of its class and its attributes."""

    full: str
    state: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Numbers outside the pickle: the name of their type, the key they lie under, how many."""

    kind: str
    key: str
    elements: int


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A tensor: `shape` of a storage, from element `offset` on, `strides` elements apart.

    kind: the name of its type, where the storage is one of bytes.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: str = ""


KINDS: Mapping[str, np.dtype] = {
    f"torch.{name}Storage": DTYPES[kind]
    for name, kind in {
        **{"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16"},
        **{"Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32"},
        **{"Long": "int64", "ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    }.items()
} | {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
BYTES = "torch.storage.UntypedStorage"

# Objects of these become a `Record`: neither class is looked up, called or needed.
# Dictionary: the letters of a fine-tuned speech model, strings and their numbers, in the task_state
# of fairseq's files; without it no such file could be read.
CLASSES = frozenset({"argparse.Namespace", "fairseq.data.dictionary.Dictionary"})


_MAX_INTEGER = 2**63
_SCALARS = (str, int, float, bool, bytes, type(None))


def key(value: Any) -> Any:
    """`value`, if it may be a key: tuples could be made to hash for ever, large integers alike."""
    if type(value) not in _SCALARS or (type(value) is int and abs(value) >= _MAX_INTEGER):
        raise BadPickle("its pickle has keys that are no names or numbers")
    return value


def construct(name: str, args: tuple[Any, ...]) -> Any:
    """What calling `name` with `args` would give, of the calls that weights need."""
    make = _CALLS.get(name)
    if make is None:
        raise BadPickle(f"its pickle calls {shown(name)}")
    return make(*args)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Of PyTorch's `_rebuild_tensor` and `_rebuild_tensor_v2`.

    rest: whether it needs gradients, its hooks, and flags of lazy conjugation or negation.
    """
    if len(rest) > 3 or (len(rest) == 3 and rest[2]):
        raise BadPickle("has tensors that are conjugated or negated lazily", _RESOLVE)
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError
    numbers = (offset, *shape, *strides)
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise TypeError
    return View(storage, offset, shape, strides)


_RESOLVE = "save tensor.resolve_conj().resolve_neg() of them"


def _view_of_bytes(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    kind: Any,
    *rest: Any,
) -> View:
    """Of PyTorch's `_rebuild_tensor_v3`."""
    if type(kind) is not Name:
        raise TypeError
    return dataclasses.replace(
        _view(storage, offset, shape, strides, grad, hooks, *rest), kind=kind.full
    )


def _parameter(data: Any, *rest: Any) -> View:
    if type(data) is not View:
        raise TypeError
    return data


def _dict(*args: Any) -> dict[Any, Any]:
    """Of an OrderedDict or Counter: made empty, or of pairs or a dict. Not of bytes, whose length
    nobody counts: each would become a number here."""
    if args and type(args[0]) not in (list, tuple, dict):
        raise TypeError
    pairs = list(args[0].items()) if args and type(args[0]) is dict else [*(args or [()])[0]]
    made = {key(name): value for name, value in pairs}
    if len(args) > 1 or len(made) != len(pairs):
        raise TypeError
    return made


def _default_dict(factory: Any = None, *args: Any) -> dict[Any, Any]:
    del factory
    return _dict(*args)


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise TypeError
    return set(map(key, items))


def _size(sizes: Any) -> tuple[Any, ...]:
    if type(sizes) not in (list, tuple):
        raise TypeError
    return tuple(sizes)


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise TypeError
    return text.encode("latin-1")


def _complex(real: Any, imaginary: Any) -> complex:
    if not {type(real), type(imaginary)} <= {int, float}:
        raise TypeError
    return complex(real, imaginary)


def _numpy_type(code: Any, *flags: Any) -> Record:
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise BadPickle("holds NumPy numbers that are neither whole numbers nor fractions")
    return Record("numpy.dtype", {"code": code})


def _numpy_number(dtype: Any, data: Any) -> int | float | bool:
    if type(dtype) is not Record or dtype.full != "numpy.dtype" or type(data) is not bytes:
        raise TypeError
    state = dtype.state.get("state", (3, "<"))
    order = state[1] if type(state) is tuple else ""
    if order not in ("<", ">", "|", "="):
        raise TypeError
    (number,) = np.frombuffer(data, order + dtype.state["code"])
    return number.item()


_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": lambda: b"",  # how protocol 2 writes no bytes
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
    # TorchScript's lists, whose elements have a known type
    **{
        f"torch.jit._pickle.{name}": lambda items, tag=None: items
        for name in (
            *("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"),
            "restore_type_tag",
        )
    },
}
_FACTORIES = {f"builtins.{name}" for name in ("list", "dict", "int", "float", "bool", "str")}
NAMES = frozenset({*_CALLS, *CLASSES, *KINDS, *_FACTORIES, BYTES})
