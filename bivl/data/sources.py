"""Data sets by name: `open_source` turns a `data` mapping into records in our field names.

A new kind is one more function config -> Table and one more line in KINDS.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.folder import folder_table
from bivl.data.prepared import emoji_table, tfds_table
from bivl.data.table import Column, Rows, Table, refuse_name, setting, split_ranges

# Our field names, and the contents (Column.content) that each can be made from.
FIELDS = {
    "image": ("image", "array", "text"),  # text: encoded images stored as plain strings
    "text": ("text", "label"),
    "audio": ("array",),
    "label": ("label", "integer"),
    "question": ("text", "label"),
    "answer": ("text", "label"),
    "id": ("integer",),
}
_TEXTS = ("text", "question", "answer")


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to one split; picklable, so it travels to worker processes.

    A record is a dict with those of our fields that the set has: `image` (encoded bytes, or a
    uint8 array [H, W] or [H, W, C]), `text`, `question`, `answer` (str), `audio` (array), `label`
    (int) and always `id` (int, the running number in this source unless `fields.id` names one).
    """

    title: str
    split: str
    rows: Rows
    fields: tuple[tuple[str, str, Column], ...]  # (ours, the set's, what it holds)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = self.rows[int(index)]
        record = {ours: _value(ours, row[name], column) for ours, name, column in self.fields}
        record.setdefault("id", int(index))
        return record

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names of `label`, None where there are none."""
        return next((column.names for ours, _, column in self.fields if ours == "label"), None)

    def where(self, index: int) -> str:
        """Where a record comes from, for messages: its path or its number."""
        where = getattr(self.rows, "where", None)
        return where(index) if where else f"record {index} of {self.title}, {self.split}"

    def describe(self) -> str:
        """One line: what it is, how many records, which fields."""
        fields = ", ".join(o if o == name else f"{o} (its {name})" for o, name, _ in self.fields)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"{self.title}, {self.split}: {len(self)} records with {fields}{classes}"


def open_source(config: Mapping[str, Any]) -> Source:
    """Opens the split that a `data` mapping names.

    Keys: `kind`; `split` (TFDS syntax: train, train[:80%], train[10:20]; default train); `fields`,
    our name -> the set's name, empty = unset (then our name, if the set has such a feature);
    `name` and `dir` for tfds, `dir` for folder; `num_examples` and `image_size` for synthetic.

    Raises:
      UserError: an unknown kind, folder, split or field, a damaged or an empty data set.
    """
    kind = setting(config, "kind", "")
    if kind not in KINDS:
        refuse_name("data.kind", kind, KINDS)
    table = KINDS[kind](config)
    fields = _map_fields(table, setting(config, "fields", {}))
    rows = table.rows(tuple(dict.fromkeys(name for _, name, _ in fields)))
    return Source(table.title, setting(config, "split", "train"), rows, fields)


def _map_fields(table: Table, wanted: Mapping[str, Any]) -> tuple[tuple[str, str, Column], ...]:
    if not hasattr(wanted, "keys"):
        raise UserError(f"data.fields={wanted!r} is no mapping; set data.fields.image and the like")
    wanted = dict(wanted)
    for ours in wanted:
        if ours not in FIELDS:
            refuse_name("data.fields: our field", ours, FIELDS)
    fields = []
    for ours, contents in FIELDS.items():
        if name := setting(wanted, ours):
            if name not in table.columns:
                refuse_name(
                    f"data.fields.{ours}: in {table.title} the feature", name, table.columns
                )
            if (content := table.columns[name].content) not in contents:
                raise UserError(
                    f"data.fields.{ours}={name!r} holds {content}, but {ours} needs "
                    f"{' or '.join(contents)}; name another feature or leave it empty"
                )
            fields.append((ours, name, table.columns[name]))
            continue
        name = table.defaults.get(ours, ours)
        # Without being asked, only a feature that fits is taken; and ids are running numbers.
        if ours != "id" and name in table.columns and table.columns[name].content in contents:
            fields.append((ours, name, table.columns[name]))
    if not fields:
        raise UserError(
            f"{table.title} has none of our fields; set data.fields.image, text or audio to one "
            f"of its features: {', '.join(sorted(table.columns))}"
        )
    return tuple(fields)


def _value(ours: str, value: Any, column: Column) -> Any:
    """A value as a record holds it. TFDS gives texts as bytes, its mock data str and 0-d arrays."""
    if ours in ("label", "id"):
        return int(value)
    if ours not in _TEXTS:
        return value
    if column.content == "label":
        number, names = int(value), column.names or ()
        return names[number] if 0 <= number < len(names) else ""
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """Rows out of arrays in memory: column name -> array or list with one entry a row."""

    arrays: Mapping[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.arrays.items()}


def digits_table(config: Mapping[str, Any]) -> Table:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; 1,400 for train and 397 for test."""
    from sklearn.datasets import load_digits  # a second, which other kinds need not pay

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    order = np.argsort(_hash(np.arange(len(images))), kind="stable")
    splits = {"train": order[:1400], "test": order[1400:]}
    sizes = {name: len(rows) for name, rows in splits.items()}
    ranges = split_ranges(setting(config, "split", "train"), sizes, "digits")
    chosen = np.concatenate([splits[name][rows.start : rows.stop] for name, rows in ranges])
    arrays = {"image": images[chosen], "label": data.target[chosen]}
    columns = {"image": Column("image"), "label": Column("label", tuple("0123456789"))}
    return Table("digits", columns, lambda wanted: ArrayRows(arrays))


_COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50),
    "white": (245, 245, 245), "black": (15, 15, 15),
}  # fmt: skip
_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": lambda x, y: (y < 0.8) & (2 * abs(x) < y + 1),
    "diamond": lambda x, y: abs(x) + abs(y) < 1.1,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) < 0.25,
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 1),
    "saltire": lambda x, y: (abs(abs(x) - abs(y)) < 0.35) & (np.maximum(abs(x), abs(y)) < 0.9),
    "bar": lambda x, y: (abs(y) < 0.3) & (abs(x) < 1),
    "pole": lambda x, y: (abs(x) < 0.3) & (abs(y) < 1),
    "half moon": lambda x, y: (x * x + y * y < 1) & ((x - 0.5) ** 2 + y * y > 0.6),
}


def synthetic_table(config: Mapping[str, Any]) -> Table:
    """Coloured shapes made from the index: `num_examples` in the split, `image_size` pixels."""
    count, size = setting(config, "num_examples", 0), setting(config, "image_size", 32)
    sizes = {"train": count or 1024, "test": count or 256}
    if size < 1 or min(sizes.values()) < 1:
        raise UserError(
            f"data.image_size={size} and data.num_examples={count} must be positive; correct them"
        )
    ranges = split_ranges(setting(config, "split", "train"), sizes, "synthetic")
    # The splits differ in their seeds: test starts where no train set reaches.
    offset = {"train": 0, "test": 2**40}
    seeds = np.concatenate([np.arange(r.start, r.stop) + offset[name] for name, r in ranges])
    columns = {
        "image": Column("image"),
        "text": Column("text"),
        "label": Column("label", tuple(_SHAPES)),
    }
    return Table("synthetic", columns, lambda wanted: ShapeRows(seeds, int(size)))


@dataclasses.dataclass(frozen=True)
class ShapeRows:
    """A shape on a smooth gradient for each seed; the shape is the label, the text names both."""

    seeds: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = int(self.seeds[index])
        label, colour = seed % len(_SHAPES), list(_COLOURS)[(seed // len(_SHAPES)) % len(_COLOURS)]
        # Twelve numbers in [0, 1): two background colours, the gradient, the place and the radius.
        u = _hash(seed * 16 + np.arange(12)) / 2**64
        x, y = _coordinates(self.size)
        slope = (x * (u[6] - 0.5) + y * (u[7] - 0.5) + 0.5)[..., None]
        image = 60 + 135 * (u[0:3] + (u[3:6] - u[0:3]) * slope)
        radius = 0.3 + 0.3 * u[8]
        place = (u[9:11] * 2 - 1) * (1 - radius)
        inside = list(_SHAPES.values())[label]((x - place[0]) / radius, (y - place[1]) / radius)
        image[inside] = _COLOURS[colour]
        text = f"a {colour} {list(_SHAPES)[label]}"
        return {"image": image.astype(np.uint8), "text": text, "label": label}


@functools.lru_cache
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y in [-1, 1], each [size, size]."""
    line = (np.arange(size) + 0.5) * (2 / size) - 1
    return line[None, :] * np.ones((size, 1)), line[:, None] * np.ones((1, size))


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Well mixed uint64 of whole numbers (splitmix64, Steele et al. 2014), alike everywhere."""
    z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


KINDS: dict[str, Callable[[Mapping[str, Any]], Table]] = {
    "emoji": emoji_table,
    "digits": digits_table,
    "tfds": tfds_table,
    "folder": folder_table,
    "synthetic": synthetic_table,
}
