"""easy-VQA (Victor Zhou, 2019): questions about one shape each, out of the package of that name."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from bivl.core.errors import UserError
from bivl.data.images import read_file
from bivl.data.table import Column, Table, setting, split_ranges

MAX_BYTES = 2**26  # of the file of questions; the published ones have 2 MB
_CURE = "pip install --no-deps easy-vqa"
Questions = tuple[tuple[str, str, int], ...]  # (question, answer, number of the image)


def easy_vqa_table(config: Mapping[str, Any]) -> Table:
    """38,575 questions about 4,000 images of 64x64 for train, 9,673 about 1,000 others for test.

    Columns: image (PNG), question, answer (one of 13) and id, the number of the image in its
    split. Without being told otherwise the label is the answer. The package is read where it is
    installed, and never run.

    Raises:
      UserError: the package is missing or damaged, an unknown or empty split.
    """
    folder = _folder()
    answers = tuple(_read(folder / "answers.txt").decode("utf-8", "replace").split())
    splits = {name: _questions(folder / name / "questions.json") for name in ("train", "test")}
    unknown = {row[1] for rows in splits.values() for row in rows} - set(answers)
    if unknown or len(set(answers)) < len(answers):
        raise UserError(f"{folder}/answers.txt lacks {sorted(unknown)[:3]}; {_CURE} again")
    sizes = {name: len(rows) for name, rows in splits.items()}
    ranges = split_ranges(setting(config, "split", "train"), sizes, "easy-VQA")
    rows = tuple(
        (str(folder / name / "images" / f"{number}.png"), question, answers.index(answer), number)
        for name, part in ranges
        for question, answer, number in splits[name][part.start : part.stop]
    )
    columns = {
        "image": Column("image"),
        "question": Column("text"),
        "answer": Column("label", answers),
        "id": Column("integer"),
    }
    return Table("easy-VQA", columns, lambda wanted: QuestionRows(rows), {"label": "answer"})


@dataclasses.dataclass(frozen=True)
class QuestionRows:
    """Rows of (path of the image, question, number of the answer, number of the image)."""

    rows: tuple[tuple[str, str, int, int], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, question, answer, number = self.rows[index]
        return {"image": read_file(path), "question": question, "answer": answer, "id": number}

    def where(self, index: int) -> str:
        """The path of a row's image, and its question."""
        return f"{self.rows[index][0]}, {self.rows[index][1]!r}"


def _folder() -> pathlib.Path:
    # Found without importing it: only its files are wanted.
    found = importlib.util.find_spec("easy_vqa")
    for place in (found.submodule_search_locations or ()) if found else ():
        if (folder := pathlib.Path(place) / "data").is_dir():
            return folder
    raise UserError(f"kind=easy_vqa reads the package easy-vqa, which is not installed; {_CURE}")


def _read(path: pathlib.Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {_CURE} again") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES} bytes; {_CURE} again")
    return data


def _questions(path: pathlib.Path) -> Questions:
    try:
        return _parse(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:80]}); {_CURE} again") from error


@functools.lru_cache(2)  # by content, as a program opens the same set several times
def _parse(data: bytes) -> Questions:
    rows = json.loads(data)
    for row in rows if isinstance(rows, list) else [rows]:
        if not (isinstance(row, list) and list(map(type, row)) == [str, str, int] and row[2] >= 0):
            raise ValueError("it is no list of question, answer and number")
    return tuple((question, answer, number) for question, answer, number in rows)
