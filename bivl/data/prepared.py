"""TFDS data sets, read as prepared ArrayRecord directories and without TensorFlow."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.table import Column, Rows, Table, refuse_name, setting, split_names, split_ranges

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CURE = "prepare it with tfds.builder(NAME, file_format='array_record').download_and_prepare()"
_SMALLEST_SHARD = 2**16  # an ArrayRecord file is never smaller, even with one record


def emoji_table(config: Mapping[str, Any]) -> Table:
    """The packaged Noto emoji: image, text (its name), keywords, words (those of the keywords,
    without the commas between them, which are half of a short text's tokens), category,
    subcategory."""
    folder = pathlib.Path(__file__).parent / "emoji"
    table = _directory_table(folder, "emoji", setting(config, "split", "train"))
    columns = {**table.columns, "words": Column("text")}

    def rows(wanted):
        stored = ("keywords" if name == "words" else name for name in wanted)
        found = table.rows(tuple(dict.fromkeys(stored)))
        return EmojiRows(found) if "words" in wanted else found

    return dataclasses.replace(
        table, title="emoji", columns=columns, rows=rows, defaults={"label": "category"}
    )


@dataclasses.dataclass(frozen=True)
class EmojiRows:
    """Rows of the packaged emoji, `words` among their fields."""

    stored: Rows

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.stored[index]
        return row | {"words": row["keywords"].replace(b",", b"")}


def tfds_table(config: Mapping[str, Any]) -> Table:
    """A TFDS data set: `name` (NAME[/CONFIG][:VERSION]) and, unless it is in TFDS's own, `dir`.

    With `dir`, only the files there count, whatever TFDS knows by that name. `dir` is the folder
    that holds NAME/[CONFIG/]VERSION (the newest version is read) or the version folder itself.
    """
    name, split = setting(config, "name", ""), setting(config, "split", "train")
    if folder := setting(config, "dir"):
        return _directory_table(folder, name, split)
    if not name:
        raise UserError("data.name is empty; kind=tfds needs data.name, data.dir or both")
    return _named_table(name, split)


def _directory_table(folder: Any, name: str, split: str) -> Table:
    import tensorflow_datasets as tfds  # half a second, which other kinds need not pay

    if not hasattr(tfds, "builder_from_directory"):  # it hides what its own import stumbled over
        raise UserError(
            "tensorflow_datasets cannot be imported whole; see what is missing with "
            "python -c 'import tensorflow_datasets.public_api'"
        )
    version = _version_folder(folder, name)
    try:
        builder = tfds.builder_from_directory(version)
        sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
        features = dict(builder.info.features)  # pyright: ignore
    except Exception as error:  # TFDS raises what its parsers raise
        raise UserError(f"data.dir={version} is damaged ({_line(error)}); {_CURE}") from error
    base = name.partition(":")[0].partition("/")[0]
    if base and base not in (builder.info.name, *version.parts):
        raise UserError(
            f"data.name={name!r} but data.dir={version} holds {builder.info.name!r}; correct one"
        )
    title = f"{builder.info.name} in {version}"
    split_ranges(split, sizes, title)
    for part, _, _ in split_names(split):
        _check_shards(version, builder.info.splits[part].filepaths)
    # TFDS knows the shards, so it gets the text of the split, which is checked above.
    split = str(split).replace(" ", "")
    columns = {key: _column(feature) for key, feature in features.items()}
    return Table(title, columns, lambda wanted: DirectoryRows.open(builder, split, wanted))


@dataclasses.dataclass
class DirectoryRows:
    """Rows of a prepared directory; only the wanted features are parsed, images stay encoded."""

    folder: str
    records: Any  # the TFDS data source of serialized examples
    features: Any  # FeaturesDict of the wanted features
    decoders: dict[str, Any]

    @classmethod
    def open(cls, builder: Any, split: str, wanted: tuple[str, ...]) -> "DirectoryRows":
        """Opens the files behind `split`."""
        import tensorflow_datasets as tfds

        folder = str(builder.data_dir)
        features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in wanted})
        skip = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            records = builder.as_data_source(split=split, deserialize_method=raw)
        except NotImplementedError as error:
            raise UserError(
                f"data.dir={folder} is not in the ArrayRecord format; {_CURE}"
            ) from error
        return cls(folder, records, features, {key: tfds.decode.SkipDecoding() for key in skip})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            raw = self.records[index]
            if not raw:
                raise ValueError("the file ends early")
            return self.features.deserialize_example_np(raw, decoders=self.decoders)
        except Exception as error:  # a damaged shard raises what the C++ reader finds
            raise UserError(
                f"record {index} in {self.folder} cannot be read ({_line(error)}); "
                "a shard is damaged: copy or prepare it again"
            ) from error


@dataclasses.dataclass(frozen=True)
class BuilderRows:
    """Rows of a builder that is no directory, as `tfds.testing.mock_data` makes: decoded."""

    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


def _named_table(name: str, split: str) -> Table:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        # Community data sets need TensorFlow to be listed.
        refuse_name("data.name", name, tfds.list_builders(with_community_datasets=False))
    except Exception as error:
        raise UserError(
            f"data.name={name!r} cannot be opened ({_line(error)}); if it is prepared already, "
            "set data.dir to its folder"
        ) from error
    if builder.info.splits:
        return _directory_table(builder.data_dir, name, split)
    try:
        records = builder.as_data_source(split=split)  # pyright: ignore
    except Exception as error:
        raise UserError(
            f"data.name={name!r} is not prepared in {builder.data_dir}; {_CURE}, or set data.dir"
        ) from error
    columns = {key: _column(feature) for key, feature in builder.info.features.items()}
    return Table(name, columns, lambda wanted: BuilderRows(records))


def _version_folder(folder: Any, name: str) -> pathlib.Path:
    """The folder with dataset_info.json that `dir` and `name` mean."""
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        cure = "mount the bucket" if "://" in str(folder) else "correct the path"
        raise UserError(f"data.dir={folder} is not a folder; {cure}")
    name, _, version = name.partition(":")
    base, _, variant = name.partition("/")
    if (root / "dataset_info.json").is_file():
        return root
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"data.name={name!r} leaves data.dir={root}; name a data set inside")
    if base and (root / base).is_dir():
        place = root / base
    elif not base or root.name == base:
        place = root
    else:
        refuse_name(f"data.name: in data.dir={root} the data set", base, _folders(root))
    if variant:
        if not (place / variant).is_dir():
            refuse_name(f"data.name: the configuration of {place}", variant, _folders(place))
        place = place / variant
    found = _newest(place, version)
    if not found.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"{found} is a link that leaves data.dir={root}; set data.dir to its target"
        )
    return found


def _newest(place: pathlib.Path, version: str) -> pathlib.Path:
    """The newest (or the named) prepared version in a folder, or in its only configuration."""
    inside = [place / key for key in _folders(place)]
    versions = {f.name: f for f in inside if _VERSION.fullmatch(f.name) and _prepared(f)}
    if version and version not in versions:
        refuse_name(f"data.name: in {place} version", version, versions)
    if versions:
        newest = max(versions, key=lambda text: tuple(map(int, text.split("."))))
        return versions[version or newest]
    # No version here: one level of configurations may lie in between.
    variants = [f for f in inside if any(_prepared(f / key) for key in _folders(f))]
    if len(variants) == 1:
        return _newest(variants[0], version)
    found = ", ".join(f.name for f in variants or inside[:20]) or "nothing"
    cure = "name one as data.name=NAME/CONFIG" if variants else _CURE
    raise UserError(f"data.dir: {place} holds no prepared version but {found}; {cure}")


def _folders(place: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in place.iterdir() if entry.is_dir())


def _prepared(folder: pathlib.Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def _check_shards(version: pathlib.Path, paths: list[Any]):
    home = version.resolve()
    for path in map(pathlib.Path, paths):
        if not path.resolve().is_relative_to(home):
            raise UserError(f"{path} leaves data.dir={version}; keep the shards in that folder")
        smallest = _SMALLEST_SHARD if ".array_record" in path.name else 1
        if not path.is_file() or path.stat().st_size < smallest:
            raise UserError(f"{path} is missing or cut short; copy or prepare it again")


def _column(feature: Any) -> Column:
    """Our view of a TFDS feature."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    if isinstance(feature, kinds.ClassLabel):
        return Column("label", tuple(feature.names))
    if isinstance(feature, kinds.Image):
        return Column("image")
    if isinstance(feature, kinds.Text):
        return Column("text")
    if isinstance(feature, (kinds.Tensor, kinds.Scalar)):
        letter = np.dtype(feature.np_dtype).kind  # pyright: ignore
        if feature.shape:
            return Column("array" if letter in "iuf" else "sequence")
        return Column(
            {"i": "integer", "u": "integer", "f": "number", "b": "bool"}.get(letter, "text")
        )
    return Column(type(feature).__name__)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
