"""Foreign weight files of every kind as one: names of tensors, read when asked for, and a config.

Nothing in a file is executed, PyTorch is not needed, and no more of a file is in memory than the
tensors that were read and are still held. The content of a file says what it is, not its name.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from bivl.core.errors import UserError
from bivl.weights import parts as parts_of
from bivl.weights.archive import entries
from bivl.weights.npz import open_npz
from bivl.weights.safetensors import MAX_HEADER, json_object, open_safetensors
from bivl.weights.stored import File, shown
from bivl.weights.tensors import Tensor
from bivl.weights.torch_files import LEGACY_START, open_legacy, open_zip, refuse_tar

# In the order in which transformers prefers them.
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_MAX_CONFIG = 2**24
_MAX_SHARDS = 10_000
_OTHERS = (  # how files start that are mistaken for weights: what they are and what to do
    (b"version https://git-lfs", "is a pointer of Git LFS", "run: git lfs pull"),
    (b"<", "is a web page or XML", "download the file itself"),
    (b"\x89HDF", "is HDF5", "convert it to safetensors"),
    (b"GGUF", "is GGUF", "take the safetensors or PyTorch file of the model"),
    (b"\x80", "is a pickle that torch.save did not write", "save its arrays as safetensors"),
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file or a Hugging Face folder holds.

    tensors: name -> tensor of the part that is used, in the file's order.
    config: config.json of a folder, `cfg` or `args` of a checkpoint, metadata of safetensors.
    files: names of the files read.
    kind: "torch", "torchscript", "safetensors", "npz" or "huggingface" (a folder).
    part: the top-level key that `tensors` came from, "" for the top itself.
    parts: every part with its tensors: model, model_ema, optimizer and so on.
    left: what else there is and not in `tensors` or `config`: name -> what it is.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    files: tuple[str, ...]
    kind: str
    part: str = ""
    parts: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_weights(path: str | pathlib.Path, part: str | None = None) -> Weights:
    """The weights at `path`: .pt, .pth, .bin, .safetensors, .npz, or a Hugging Face folder.

    part: the top-level key of a checkpoint to use. Without it: `model`, `module`, `state_dict` or
      `model_state_dict`, the first that has tensors; else the top itself; else the only one.

    Raises:
      UserError: the file and what is wrong: missing, truncated, damaged, an unknown format, objects
        other than tensors, containers, numbers and argparse.Namespace, tensors that do not fit.
        Reading a tensor raises it too, for bytes that their checksum contradicts.
    """
    path = pathlib.Path(path).expanduser()
    try:
        folder = path.is_dir()
    except (OSError, ValueError):
        folder = False
    return _open_folder(path, part) if folder else _open_file(File.at(path), part)


def _open_file(file: File, part: str | None) -> Weights:
    start = file.read(0, min(file.size, 512))
    name = (file.path.name,)
    if not start:
        raise file.error("is empty")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        found = entries(file)
        if not any(entry.endswith("/data.pkl") for entry in found):
            if not found or not all(entry.endswith(".npy") for entry in found):
                raise file.error("is a zip archive without weights", "choose another file")
            tensors = open_npz(file, found)
            return _single(file, tensors, {}, "npz", part)
        opened = open_zip(file, found)
    elif LEGACY_START.match(start):
        opened = open_legacy(file)
    elif start[257:262] == b"ustar":
        raise refuse_tar(file)
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        tensors, metadata = open_safetensors(file)
        return _single(file, tensors, metadata, "safetensors", part)
    else:
        raise _unknown(file, start)
    parts, others, config = parts_of.split(opened)
    chosen = parts_of.choose(file, parts, part)
    left = parts_of.left_out(parts, chosen) | others
    kind = "torchscript" if opened.script else "torch"
    return Weights(parts[chosen], config, name, kind, chosen, parts, left)


def _single(
    file: File, tensors: dict[str, Tensor], config: Mapping[str, Any], kind: str, part: str | None
) -> Weights:
    """A file that has no parts."""
    parts = {"": tensors} if tensors else {}
    chosen = parts_of.choose(file, parts, part)
    return Weights(tensors, config, (file.path.name,), kind, chosen, parts)


def _unknown(file: File, start: bytes) -> UserError:
    for first, what, cure in _OTHERS:
        if start.lstrip().startswith(first):
            return file.error(what, cure)
    return file.error(
        "is no PyTorch, safetensors or npz file",
        "choose a file of these, whole, or a Hugging Face folder",
    )


def _open_folder(folder: pathlib.Path, part: str | None) -> Weights:
    """A folder as `save_pretrained` writes and `huggingface_hub` caches it."""
    config, files = {}, []
    if (folder / "config.json").exists():
        config = _json(_member(folder, "config.json"), _MAX_CONFIG)
        files = ["config.json"]
    for name in _IN_FOLDER:
        index = f"{name}.index.json"
        if (folder / name).exists():
            whole = _open_file(_member(folder, name), part)
            left = whole.left
            tensors, parts, chosen = whole.tensors, whole.parts, whole.part
            return Weights(tensors, config, (*files, name), "huggingface", chosen, parts, left)
        if (folder / index).exists():
            tensors, shards = _sharded(folder, index)
            if part:
                raise _member(folder, index).error("has no parts", "leave part out")
            names = (*files, index, *shards)
            return Weights(tensors, config, names, "huggingface", "", {"": tensors})
    raise UserError(
        f"weights {shown(folder)}: the folder has no {' or '.join(_IN_FOLDER)}, whole or with an "
        "index; name the folder that has it, or a file"
    )


def _sharded(folder: pathlib.Path, index: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(tensors, names of the files) of a model in several files, each tensor where the index has
    it and nowhere else."""
    file = _member(folder, index)
    places = _json(file, MAX_HEADER).get("weight_map")
    if type(places) is not dict or not all(type(shard) is str for shard in places.values()):
        raise file.error("has no weight_map of names")
    shards = tuple(dict.fromkeys(places.values()))
    if not 0 < len(shards) <= _MAX_SHARDS:
        raise file.error(f"names {len(shards)} files")
    opened = {shard: _open_file(_member(folder, shard, file), None).tensors for shard in shards}
    for name, shard in places.items():
        if name not in opened[shard]:
            raise file.error(f"says that {shown(name)} is in {shown(shard)}, where it is not")
    for shard, found in opened.items():
        for name in found:
            if places.get(name) != shard:
                raise file.error(f"does not say that {shown(name)} is in {shown(shard)}")
    return {name: opened[shard][name] for name, shard in places.items()}, shards


def _member(folder: pathlib.Path, name: str, index: File | None = None) -> File:
    """A file of the folder.

    It must lie there, whatever the index says and wherever links lead; or where huggingface_hub
    keeps what snapshots link to: MODEL/snapshots/REVISION/FILE is a link to MODEL/blobs/HASH.
    """
    if not re.fullmatch(r"[\w.+-]{1,255}", name) or name in (".", ".."):
        source = index or File.at(folder / name)
        raise source.error(f"names the file {shown(name)}, which is not in its folder")
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(f"weights {shown(path)}: is missing; get all files of the model") from None
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if target.parent != root and not cached:
        raise UserError(
            f"weights {shown(path)}: is a link that leaves its folder; put the file itself there"
        )
    return File.at(path)


def _json(file: File, limit: int) -> dict[str, Any]:
    if file.size > limit:
        raise file.error(f"has {file.size} bytes, more than a model needs")
    return json_object(file, file.read(0, file.size))
