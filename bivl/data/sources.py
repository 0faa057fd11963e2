"""Data sets by name: `open_source` turns a `data` mapping into records in our field names.

A new kind is one more function config -> Table and one more line in KINDS.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.digits import digits_table, mnist_table
from bivl.data.easy_vqa import easy_vqa_table
from bivl.data.folder import SUFFIXES, folder_table
from bivl.data.prepared import emoji_table, tfds_table
from bivl.data.scenes import scenes_table
from bivl.data.shapes import shapes_table
from bivl.data.speech import holds_speech, librispeech_table, speech_folder_table
from bivl.data.spoken import NAMES, spoken_table
from bivl.data.table import Column, Rows, Table, refuse_name, setting
from bivl.data.texts import jsonl_table, pydoc_table, text_table, tsv_table

# Our field names, and the contents (Column.content) that each can be made from.
FIELDS = {
    "image": ("image", "array", "text"),  # text: encoded images stored as plain strings
    "image2": ("image", "array", "text"),
    "text": ("text", "label"),
    "text_pair": ("text", "label"),
    "audio": ("audio", "array"),
    "label": ("label", "integer", "number"),
    "question": ("text", "label"),
    "answer": ("text", "label"),
    "id": ("integer",),
}
_TEXTS = ("text", "text_pair", "question", "answer")
KEYS = ("kind", "name", "dir", "split", "num_examples", "image_size", "fields")


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to one split; picklable, so it travels to worker processes.

    A record is a dict with those of our fields that the set has: `image` (encoded bytes, or a
    uint8 array [H, W] or [H, W, C]), `text`, `text_pair`, `question`, `answer` (str), `audio`
    (encoded bytes, a path or an array), `label` (int, or float for regression) and always `id`
    (int, the running number in this source unless `fields.id` names one).
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


@contextlib.contextmanager
def keys_of(group: str, keys: tuple[str, ...] = KEYS) -> Iterator[None]:
    """Inside, a UserError that says `data.KEY`, for one of `keys`, says `GROUP.KEY` instead.

    Readers know the mapping that they are given and not where it stands in a config.
    """
    try:
        yield
    except UserError as error:
        named = rf"(?<![\w./])((?:config\.)?)data\.(?=(?:{'|'.join(keys)})\b)"
        text = re.sub(named, lambda found: f"{found[1]}{group}.", str(error))
        raise UserError(text) from error


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
        return float(value) if column.content == "number" else int(value)
    if ours not in _TEXTS:
        return value
    if column.content == "label":
        number, names = int(value), column.names or ()
        return names[number] if 0 <= number < len(names) else ""
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _folder(config: Mapping[str, Any]) -> Table:
    """Image files or sound files, whichever the folder holds."""
    folder = pathlib.Path(setting(config, "dir", "")).expanduser()
    speech = setting(config, "dir") and folder.is_dir() and holds_speech(folder, SUFFIXES)
    return speech_folder_table(config) if speech else folder_table(config)


def _synthetic(config: Mapping[str, Any]) -> Table:
    """Coloured shapes, or with a `name` an invented spoken language."""
    name = setting(config, "name", "shapes")
    if name not in ("shapes", *NAMES):
        refuse_name("data.name: of kind=synthetic", name, ("shapes", *NAMES))
    return shapes_table(config) if name == "shapes" else spoken_table(config)


KINDS: dict[str, Callable[[Mapping[str, Any]], Table]] = {
    "emoji": emoji_table,
    "digits": digits_table,
    "mnist": mnist_table,
    "tfds": tfds_table,
    "folder": _folder,
    "librispeech": librispeech_table,
    "pydoc": pydoc_table,
    "text": text_table,
    "jsonl": jsonl_table,
    "tsv": tsv_table,
    "synthetic": _synthetic,
    "scenes": scenes_table,
    "easy_vqa": easy_vqa_table,
}
