"""What a reader of one kind hands to `sources.open_source`, and what all readers share."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np

from bivl.core.errors import UserError


class Rows(Protocol):
    """Picklable random access to a split: row i is a dict in the data set's own names.

    It may have `where(i) -> str` too, which says where row i comes from (a path).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Column:
    """One feature of a data set.

    content: "image" (encoded bytes or uint8 array), "text" (bytes or str), "label" (class number),
      "integer", "number" (with fractions), "array" (numbers), "audio" (encoded bytes, a path or an
      array), else a name to show in error messages.
    names: the class names of a label.
    """

    content: str
    names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """One split of a data set in its own names.

    title: what messages call it.
    columns: its features.
    rows: columns wanted -> the rows with (at least) these.
    defaults: our name -> its name, where they differ.
    """

    title: str
    columns: Mapping[str, Column]
    rows: Callable[[tuple[str, ...]], Rows]
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)


def setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value of `config[key]`; None and "" count as unset."""
    value = config.get(key)
    return default if value is None or (isinstance(value, str) and not value) else value


def refuse_name(what: str, value: Any, existing: Iterable[str]) -> NoReturn:
    """Raises the UserError for a name that does not exist: the nearest one, and what there is."""
    existing = sorted(existing)
    near = difflib.get_close_matches(str(value), existing, n=1)
    shown = ", ".join(existing[:20]) + (", ..." if len(existing) > 20 else "")
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{what} {value!r} does not exist; {hint}there is {shown or 'none'}")


_PART = re.compile(r"\s*([^\[\]+]+?)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")


def split_names(split: str) -> list[tuple[str, str | None, str | None]]:
    """Parts (name, start, stop) of a split in TFDS syntax: train, test[:80%], train[5:9]+test."""
    parts = [_PART.fullmatch(part) for part in str(split).split("+")]
    if not all(parts):
        raise UserError(
            f"data.split={split!r} cannot be read; write train, train[:80%], train[100:200] or "
            "train+test"
        )
    return [(part[1], part[2], part[3]) for part in parts if part]


def split_ranges(split: str, sizes: Mapping[str, int], title: str) -> list[tuple[str, range]]:
    """The rows that `split` names: (split name, range of running numbers) for each part.

    Percentages are rounded to the nearest row and negative numbers count from the end, as in TFDS.

    Raises:
      UserError: a syntax error, a split that is not in `sizes`, a slice that is empty or outside.
    """
    ranges = []
    for name, start, stop in split_names(split):
        if name not in sizes:
            refuse_name(f"data.split: the split of {title}", name, sizes)
        size = sizes[name]
        first = _boundary(split, start, size, 0)
        ranges.append((name, range(first, max(first, _boundary(split, stop, size, size)))))
    if not sum(len(rows) for _, rows in ranges):
        counts = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise UserError(
            f"data.split={split!r} of {title} is empty; choose one with records ({counts})"
        )
    return ranges


def _boundary(split: str, text: str | None, size: int, default: int) -> int:
    if text is None:
        return default
    number = int(text.rstrip("%"))
    limit = 100 if text.endswith("%") else size
    if abs(number) > limit:
        unit = "%" if text.endswith("%") else f" (the split has {size} records)"
        raise UserError(f"data.split={split!r}: {text} is outside; stay within {limit}{unit}")
    number = round(number * size / 100) if text.endswith("%") else number
    return number + size if number < 0 else number


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """Rows out of arrays in memory: column name -> array or list with one entry a row."""

    arrays: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.arrays.items()}


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Well mixed uint64 of whole numbers (splitmix64, Steele et al. 2014), alike everywhere."""
    z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
