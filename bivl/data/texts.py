"""Texts: the interpreter's own manual, JSON lines, tables of tab-separated values, plain files.

Files are UTF-8; bytes that are not become U+FFFD. `text_files` says how a folder is laid out.
"""

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bivl.core.errors import Undecodable, UserError
from bivl.data import text_files
from bivl.data.table import Column, Table, setting, split_ranges
from bivl.data.text_files import Spans

MAX_CLASSES = 10_000
TEST_FRACTION = 0.1  # of the range of hashes of pydoc's topics
_LOOKED_AT = 1000  # lines that tell what the columns hold
_WHOLE = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def pydoc_table(config: Mapping[str, Any]) -> Table:
    """The topics of Python's own help (`pydoc_data`), in every interpreter: about 80 documents.

    Columns: text, topic. Nine in ten are train, the rest test, by a hash of the topic's name.
    Texts, and a few topics, differ between versions of Python, so the title names the version.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python comes without pydoc_data; install its standard library whole, or choose "
            "another data.kind"
        ) from None
    hashes = {name: hashlib.sha256(name.encode()).digest()[:8] for name in topics}
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for name in sorted(hashes, key=hashes.__getitem__):
        test = int.from_bytes(hashes[name], "big") < TEST_FRACTION * 2**64
        splits["test" if test else "train"].append(name)
    title = f"pydoc of Python {platform.python_version()}"
    sizes = {name: len(rows) for name, rows in splits.items()}
    ranges = split_ranges(setting(config, "split", "train"), sizes, title)
    chosen = tuple(
        (splits[name][i], topics[splits[name][i]]) for name, rows in ranges for i in rows
    )
    columns = {"text": Column("text"), "topic": Column("text")}
    return Table(title, columns, lambda wanted: TopicRows(chosen))


@dataclasses.dataclass(frozen=True)
class TopicRows:
    """Rows of (topic, text) pairs in memory."""

    topics: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.topics)

    def __getitem__(self, index: int) -> dict[str, Any]:
        topic, text = self.topics[index]
        return {"text": text, "topic": topic}


def text_table(config: Mapping[str, Any]) -> Table:
    """Plain texts, *.txt, with the column text; a row is a document.

    Where a split is several files in a folder of any names, each file is one document. Where it is
    one file (or shards SPLIT-00000-of-00010.txt of one), empty lines separate its documents.
    """
    root, splits = text_files.splits(config, "text", ".txt")
    ranges_of = {name: text_files.documents(*splits[name]) for name in text_files.wanted(config)}
    title = f"the texts of {root}"
    spans = text_files.chosen(config, ranges_of, title)
    return Table(title, {"text": Column("text")}, lambda wanted: TextRows(spans))


def jsonl_table(config: Mapping[str, Any]) -> Table:
    """JSON lines, *.jsonl: each line is an object, each of its keys a column.

    The first 1,000 lines tell what a column holds: strings are text, whole numbers and booleans
    integer, other numbers "number". A column of strings that is wanted as the label (named by
    fields.label, or else called label) becomes a label: its classes are its sorted values over
    all splits, so that numbers agree between them.
    """
    return _lines_table(config, "jsonl", _from_json)


def tsv_table(config: Mapping[str, Any]) -> Table:
    """Tab-separated values, *.tsv, as GLUE's tasks come (splits train, dev and so on).

    The first line names the columns (CoLA's files lack it: put one there). Quotes are characters
    like any other. What columns hold is told as for jsonl, from how their cells are spelled.
    """
    return _lines_table(config, "tsv", _from_tsv)


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows with the column text, read when asked for."""

    spans: Spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self.spans.read(index).decode("utf-8", "replace")}

    def where(self, index: int) -> str:
        """Path and byte of a row."""
        return self.spans.where(index)


@dataclasses.dataclass(frozen=True)
class LineRows:
    """Rows of lines, read when asked for; a row that does not fit its columns is Undecodable."""

    spans: Spans
    headers: tuple[tuple[str, ...], ...]  # of each file
    parse: Any  # (line, header) -> the raw values by name
    columns: Mapping[str, Column]
    numbers: Mapping[str, Mapping[str, int]]  # of label columns: class name -> number

    def __len__(self) -> int:
        return len(self.spans)

    def raw(self, index: int) -> dict[str, Any]:
        """The values as the file has them."""
        return self.parse(self.spans.read(index), self.headers[self.spans.file[index]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.raw(index)
        return {name: self._value(row, name, column) for name, column in self.columns.items()}

    def _value(self, row: dict[str, Any], name: str, column: Column) -> Any:
        value = row.get(name)
        if column.content == "text":
            if isinstance(value, (list, dict)):
                raise Undecodable(f"{name} holds no text")
            return "" if value is None else str(value)
        try:
            if column.content == "label":
                return self.numbers[name][value]
            number = float(value)
            if column.content == "number" and math.isfinite(number):
                return number
            if number != int(number) or abs(number) >= 2**63 or column.content == "number":
                raise ValueError
            return int(value)
        except (TypeError, ValueError, KeyError, OverflowError):
            wanted = {"label": "none of the classes", "integer": "no whole number"}
            found = f"{name} holds {str(value)[:50]!r}"
            raise Undecodable(f"{found}, {wanted.get(column.content, 'no number')}") from None

    def where(self, index: int) -> str:
        """Path and byte of a row."""
        return self.spans.where(index)


def _from_json(line: bytes, header: tuple[str, ...]) -> dict[str, Any]:
    del header
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"the line is no JSON ({type(error).__name__})") from error
    if not isinstance(row, dict):
        raise Undecodable("the line is no JSON object")
    return row


def _from_tsv(line: bytes, header: tuple[str, ...]) -> dict[str, Any]:
    cells = line.decode("utf-8", "replace").rstrip("\r").split("\t")
    if len(cells) != len(header):
        raise Undecodable(f"the line has {len(cells)} cells for {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _lines_table(config: Mapping[str, Any], kind: str, parse: Any) -> Table:
    root, splits = text_files.splits(config, kind, f".{kind}")
    title, headers = f"the {kind} of {root}", {}

    def opened(split: str) -> Spans:
        parts = [text_files.lines(path) for path in splits[split][0]]
        if kind == "tsv":
            headers.update({part[0]: _header(*part) for part in parts})
            parts = [(path, start[1:], stop[1:]) for path, start, stop in parts]
        return Spans.of(parts)

    def rows_of(spans: Spans, columns: Mapping[str, Column]) -> LineRows:
        numbers = {
            name: {label: k for k, label in enumerate(column.names)}
            for name, column in columns.items()
            if column.names
        }
        head = tuple(headers.get(path, ()) for path in spans.paths)
        return LineRows(spans, head, parse, columns, numbers)

    everything = {name: opened(name) for name in text_files.wanted(config)}
    spans = text_files.chosen(config, everything, title)
    first = next(part for part in everything.values() if len(part))
    columns = _columns(rows_of(first, {}), kind)
    fields = setting(config, "fields", {})
    label = setting(fields, "label", "label") if hasattr(fields, "get") else ""
    if label in columns and columns[label].content == "text":
        others = {name: opened(name) for name in splits if name not in everything}
        names = _classes([rows_of(s, {}) for s in (everything | others).values()], label, title)
        columns[label] = Column("label", names)
    return Table(title, columns, lambda wanted: rows_of(spans, {n: columns[n] for n in wanted}))


def _columns(rows: LineRows, kind: str) -> dict[str, Column]:
    """What the columns hold, from the first lines."""
    seen: dict[str, set[str]] = {}
    for _, row in _readable(rows, min(len(rows), _LOOKED_AT)):
        for name, value in row.items():
            spelled = _spelled(value) if kind == "tsv" else _content(value)
            seen.setdefault(name, set()).update({spelled} - {""})
    if not seen:
        raise UserError(
            f"{rows.where(0)}: no line can be read as {kind}; correct data.dir or data.kind"
        )
    columns = {}
    for name, contents in seen.items():
        if kind == "tsv" and "text" in contents or not contents:
            contents = {"text"}  # an empty column is one of empty texts
        numbers = contents <= {"integer", "number"}
        content = "number" if numbers and len(contents) == 2 else "/".join(sorted(contents))
        columns[name] = Column(content)
    return columns


def _readable(rows: LineRows, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(count):
        try:
            yield index, rows.raw(index)
        except Undecodable:
            continue


def _content(value: Any) -> str:
    names = {str: "text", bool: "integer", int: "integer", float: "number", type(None): ""}
    return names.get(type(value), type(value).__name__)


def _spelled(cell: str) -> str:
    if not cell:
        return ""
    if _WHOLE.fullmatch(cell):
        return "integer"
    return "number" if _NUMBER.fullmatch(cell) else "text"


def _classes(parts: list[LineRows], label: str, title: str) -> tuple[str, ...]:
    names = set()
    for rows in parts:
        for _, row in _readable(rows, len(rows)):
            if isinstance(row.get(label), str):
                names.add(row[label])
            if len(names) > MAX_CLASSES:
                raise UserError(
                    f"{title}: {label} has more than {MAX_CLASSES} different values, so it is no "
                    "class; set data.fields.label to another column"
                )
    return tuple(sorted(names))


def _header(path: str, start: np.ndarray, stop: np.ndarray) -> tuple[str, ...]:
    spans = Spans.of([(path, start[:1], stop[:1])])
    try:
        line = spans.read(0) if len(spans) else b""
    except Undecodable as error:
        raise UserError(f"{path}: the first line cannot be read: {error}; correct it") from error
    names = tuple(line.decode("utf-8", "replace").rstrip("\r").split("\t"))
    if len(set(names)) < len(names) or not all(names):
        raise UserError(
            f"{path}: the first line does not name the columns, each by another name; put such a "
            "line there"
        )
    return names
