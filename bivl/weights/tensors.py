"""Arrays that are still in their file: shape and type are known, the numbers are read on demand."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from bivl.weights.stored import Extent, File, shown

MAX_DIMENSIONS = 32
_MAX_NAME = 1000
_SPARE = 2**26  # bytes that small files may exceed the two factors by
_OUT = 4  # all tensors together, in units of the file: tied and shared ones count each time
_READ = 16  # bytes read for them, where tensors are thin slices of large storages

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is still in its file.

    shape: its sizes. dtype: as `read` gives it, in this machine's byte order.
    extent: the bytes that it lies in, from byte `offset` on, `strides` bytes apart, in byte order
      `order`, "<" or ">".
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    extent: Extent = dataclasses.field(repr=False)
    offset: int = 0
    strides: tuple[int, ...] = ()
    order: str = "<"

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes from its first to its last element."""
        if not math.prod(self.shape):
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return last + self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, new and writable; not always contiguous. UserError if the file is damaged."""
        data = self.extent.read(self.offset, self.offset + self.span)
        if not self.span:
            return np.empty(self.shape, self.dtype)
        kind = np.dtype(np.uint8) if self.dtype == np.bool_ else self.dtype
        # NumPy checks once more that the view stays inside.
        array = np.ndarray(self.shape, kind.newbyteorder(self.order), data, 0, self.strides)
        if self.dtype == np.bool_:
            return array != 0
        if not self._dense():
            array = array.copy()  # lets go of what lies between; elements may be the same memory
        return array.astype(self.dtype, copy=False)

    def _dense(self) -> bool:
        """Whether its elements are the span, each once, in any order of the axes."""
        expected = self.dtype.itemsize
        for step, n in sorted(zip(self.strides, self.shape, strict=True)):
            if n > 1 and step != expected:
                return False
            expected *= n
        return True


def placed(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, if its name can be printed, it lies within its extent and arrays can be as large.

    Names go to terminals and tables, where control characters would do more than name.
    """
    shape, strides, extent = tensor.shape, tensor.strides, tensor.extent
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise extent.file.error(f"has a tensor called {shown(name)!r}, which is no name")
    numbers = (*shape, *strides, tensor.offset)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise extent.file.error(f"{shown(name)} has no valid shape")
    filled = math.prod(n for n in shape if n) * tensor.dtype.itemsize
    if len(shape) > MAX_DIMENSIONS or filled >= 2**62:
        raise extent.file.error(f"{shown(name)} has no valid shape")
    if tensor.offset + tensor.span > extent.size:
        raise extent.file.error(
            f"{shown(name)} of shape {shape} does not fit in the {extent.size} bytes of "
            f"{shown(extent.name)}"
        )
    return tensor


def check_total(file: File, tensors: Iterable[Tensor]) -> None:
    """UserError if tensors take much more memory, or reading, than an honest file's would."""
    every = list(tensors)
    out = sum(tensor.nbytes for tensor in every)
    read = sum(t.extent.size if t.extent.deflated else t.span for t in every)
    if out > _OUT * file.size + _SPARE or read > _READ * file.size + _SPARE:
        raise file.error(
            f"its tensors take {max(out, read)} bytes, far more than the {file.size} of the file",
            "save contiguous copies of them, uncompressed",
        )
