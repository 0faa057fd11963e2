"""Transcripts beside sound files: which file holds them, and which sound each line names."""

import collections
import csv
import functools
import json
import posixpath
from collections.abc import Callable, Iterator

from bivl.core.errors import UserError
from bivl.data.audio import SUFFIXES

MAX_BYTES = 2**28  # 256 MiB of transcripts in one file; LibriSpeech's 960 hours have 50 MiB
LIBRISPEECH = ".trans.txt"
_NAMES = ("transcripts.tsv", "transcripts.jsonl", "metadata.csv", "transcription")
_NOISE = "_background_noise_"  # in Speech Commands, a folder that is no class
Files = dict[str, str]  # path relative to the folder of the split, with slashes -> path


def is_sound(file: tuple[str, str]) -> bool:
    """Whether a (path, path) of Files is a sound, and none of background noise."""
    return file[0].lower().endswith(SUFFIXES) and folder_of(file[0]) != _NOISE


def sounds(files: Files) -> Files:
    """The sound files among them."""
    return dict(filter(is_sound, files.items()))


def folder_of(key: str) -> str:
    """The name of the folder in which a file lies, "" directly in that of the split."""
    return posixpath.basename(posixpath.dirname(key))


def find(files: Files) -> list[str]:
    """Files directly in a folder that hold its transcripts."""
    direct = [key for key in files if "/" not in key]
    return [key for key in direct if key in _NAMES or key.endswith(".transcription")]


def texts_of(files: Files) -> dict[str, str]:
    """Sound file -> its text, for the files of one split; empty where there are no transcripts."""
    found = find(files)
    if len(found) > 1:
        raise UserError(f"{files[found[0]]} lies beside {', '.join(found[1:])}; keep one of them")
    found = found or [key for key in files if key.endswith(LIBRISPEECH)]
    names, texts = _names(sounds(files)) if found else {}, {}
    for key in found:
        for name, text in _pairs(files[key]):
            # Looked up and never joined to a path, so that no name leads out of the folder.
            sound = names.get(posixpath.normpath(posixpath.join(posixpath.dirname(key), name)))
            if not sound:
                cause = f"{files[key]}: {name!r} is not the name of one sound in its folder"
                raise UserError(f"{cause}; add the file or drop the line")
            if sound in texts:
                raise UserError(f"{files[key]}: {name!r} has two transcripts; drop one")
            texts[sound] = text
    return texts


def _names(found: Files) -> dict[str, str]:
    """What transcripts may call a sound -> the sound, "" for what two of them are called."""
    names: dict[str, str] = {}
    stems = {key: key.rpartition(".")[0] for key in found}
    for level in ({key: posixpath.basename(stems[key]) for key in found}, stems):
        count = collections.Counter(level.values())
        names |= {name: key if count[name] == 1 else "" for key, name in level.items()}
    return names | {key: key for key in found}


def _pairs(path: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each line of a transcript file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes; split the data set")
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 ({error}); correct it") from error
    if path.endswith(".csv"):
        yield from _csv(path, lines)
        return
    parse = next(parse for end, parse in _PARSERS.items() if path.endswith(end))
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not (pair := parse(line.strip("\r"))):
                raise UserError(f"{path}, line {number} cannot be read; correct or drop it")
            yield pair


def _csv(path: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    try:
        for row in csv.DictReader(line + "\n" for line in lines):
            name, text = row.get("file_name"), row.get("transcription")
            if name is None or text is None:
                raise UserError(f"{path} needs the columns file_name and transcription; add them")
            yield name, text
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file ({error}); correct it") from error


def _jsonl(line: str) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
        pair = (entry["audio"], entry["text"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return pair if all(isinstance(value, str) for value in pair) else None


def _cut(line: str, mark: str) -> tuple[str, str] | None:
    name, found, text = line.partition(mark)
    return (name, text.strip()) if found else None


def _sphinx(line: str) -> tuple[str, str] | None:
    text, bracket, name = line.rstrip().removesuffix(")").rpartition("(")
    text = text.strip().removeprefix("<s>").removesuffix("</s>").strip()
    return (name.strip(), text) if bracket else None


_PARSERS: dict[str, Callable[[str], tuple[str, str] | None]] = {
    ".tsv": functools.partial(_cut, mark="\t"),
    ".jsonl": _jsonl,
    LIBRISPEECH: functools.partial(_cut, mark=" "),
    "transcription": _sphinx,
}
