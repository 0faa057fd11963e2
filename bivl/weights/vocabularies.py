"""What lies beside weights: tokenizers of texts, letters of speech recognition, preprocessors."""

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.data.decoding import BOUNDARY, LIBRISPEECH
from bivl.data.vocabulary.layouts import LAYOUTS

MAX_BYTES = 2**26
ENDINGS = (".json", ".txt", ".gz", ".model", ".bpe", ".spm")
SKIPPED = (".index.json", "conversion.json")
UNWRITTEN = 0xE000  # Unicode's private use: what stands for ids that are no letter


def small(folder: Path) -> tuple[Path, ...]:
    """The small files of a folder; of a file none, as its neighbours may be anybody's."""
    found = sorted(folder.iterdir()) if folder.is_dir() else ()
    return tuple(
        file
        for file in found
        if file.suffix in ENDINGS and not file.name.endswith(SKIPPED) and file.is_file()
        if file.stat().st_size <= MAX_BYTES
    )


def files(path: str) -> tuple[Path, ...]:
    """The files of the tokenizer at `path`: that file, or those of a layout in that folder, or all
    its small files."""
    at = Path(path).expanduser()
    if not path or at.is_file():
        return (at,) if path else ()
    for names in LAYOUTS:
        if all((at / name).is_file() for name in names):
            return tuple(at / name for name in names)
    return small(at)


def tokens(folder: Path | None, rows: int) -> tuple[dict, tuple[str, ...]]:
    """(changes, notes) for the tokenizer of a table with `rows` ids: the byte-level BPE in
    `folder`, else one that knows numbers alone."""
    found = folder and any(all((folder / name).is_file() for name in names) for names in LAYOUTS)
    if not found:
        note = (
            "no tokenizer lies beside the weights: the model takes token ids alone; pass "
            "--config.tokenizer.kind=bpe --config.tokenizer.path=FOLDER for texts"
        )
        return {"tokenizer.kind": "ids", "tokenizer.path": "", "tokenizer.size": rows}, (note,)
    tokenizer = tokenizers.load({"kind": "bpe", "path": str(folder)})
    if (tokenizer.size, tokenizer.pad) != (rows, 1):
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.size} ids and pads with {tokenizer.pad}, "
            f"the model has {rows} and pads with 1; put the model's own tokenizer there"
        )
    return {"tokenizer.kind": "bpe", "tokenizer.path": str(folder)}, ()


def read_json(path: Path):
    """A JSON file that lies beside weights."""
    return _read(path, json.loads)


def _read(path: Path, parse):
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error


def preprocessor(folder: Path | None) -> Mapping[str, Any]:
    """preprocessor_config.json; empty where there is none."""
    file = folder / "preprocessor_config.json" if folder else None
    found = read_json(file) if file and file.is_file() else {}
    if not isinstance(found, Mapping):
        raise UserError(f"{file} holds no settings; copy it again")
    return found


def views(folder: Path | None) -> dict[str, Any]:
    """Config changes for images as the preprocessor beside the weights treats them: statistics of
    pixels, and whether they are cropped or squashed."""
    found, changes = preprocessor(folder), {}
    for key in ("image_mean", "image_std"):
        given = found.get(key)
        if three(given) and found.get("do_normalize", True):
            changes[key] = tuple(map(float, given))
    if found and not found.get("do_center_crop", True):
        return changes | {"augment.squash": True}
    whole, crop = (side(found.get(key)) for key in ("size", "crop_size"))
    return changes | ({"augment.crop_ratio": min(1.0, crop / whole)} if whole and crop else {})


def three(value) -> bool:
    """Whether this is a list of three numbers, one for each colour."""
    alike = isinstance(value, list) and len(value) == 3
    return alike and all(type(x) in (int, float) and 0 <= x < 2**31 for x in value)


def side(size) -> int:
    """The side of a square that a preprocessor means; 0 if it says none."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and 0 < size < 2**31 else 0


def letters(folder: Path | None, classes: int) -> tuple[str, tuple[str, ...]]:
    """(config.letters, notes) of a CTC head with `classes` outputs, of which the first is blank.

    From `vocab.json` (Hugging Face) or `dict.ltr.txt` (fairseq, whose first four ids are special).
    Ids that are no letter (<s>, <unk>) are private characters of Unicode, so that every class keeps
    its place. UserError where the blank is not 0 or there is no word boundary.
    """
    if folder and (folder / "vocab.json").is_file():
        return _spelled(_names(folder / "vocab.json", classes)), ()
    if folder and (folder / "dict.ltr.txt").is_file():
        lines = _read(folder / "dict.ltr.txt", str.splitlines)
        names = [*["<special>"] * 4, *(line.split()[0] for line in lines if line.strip())]
        if len(names) != classes:
            raise UserError(
                f"{folder / 'dict.ltr.txt'} has {len(names) - 4} letters, the model {classes - 4}; "
                "put the model's own there"
            )
        return _spelled(names), ()
    if classes == 1 + len(LIBRISPEECH):
        found = LIBRISPEECH
    elif classes == 4 + len(LIBRISPEECH):
        found = _spelled([*["<special>"] * 4, *LIBRISPEECH])
    else:
        found = _spelled([*["<unknown>"] * (classes - 1), BOUNDARY])
    note = (
        "no vocabulary lies beside the weights: letters are guessed; pass "
        "--config.letters=... with the letter of every class but the first"
    )
    return found, (note,)


def _names(path: Path, classes: int) -> list[str]:
    vocabulary = read_json(path)
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    by_id = {i: name for name, i in pairs if type(i) is int}
    if sorted(by_id) != list(range(classes)) or len(pairs) != classes:
        raise UserError(
            f"{path} does not name the {classes} classes of the model, each once; put the model's "
            "own there"
        )
    if by_id[0] not in ("<pad>", "[PAD]", "<blank>", "<ctc_blank>", "<s>"):
        raise UserError(
            f"{path}: the first class is {by_id[0]!r}, not the blank, which is not supported; give "
            "another model"
        )
    return [str(by_id[i]) for i in range(classes)]


def _spelled(names: list[str]) -> str:
    """One character for each class but the first."""
    found = [
        name
        if len(name) == 1 and not name.isspace() and unicodedata.normalize("NFC", name) == name
        else chr(UNWRITTEN + i)
        for i, name in enumerate(names)
    ][1:]
    if BOUNDARY not in found or len(set(found)) < len(found):
        raise UserError(
            f"the vocabulary beside the weights has no word boundary {BOUNDARY!r}, or a letter "
            "twice; put the model's own there"
        )
    return "".join(found)
