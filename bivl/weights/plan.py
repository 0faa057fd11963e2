"""What a family says of a file: which of our configs it is, with which sizes and rule table.

`weights/` may not import configs: a plan names a file under configs/ and what to change in it, and
the program that converts (`bivl/convert.py`) loads and changes it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bivl.core.errors import UserError
from bivl.weights.rules import Rule
from bivl.weights.stored import shown

HEAD_DIM = 64  # of a head, where nothing says how many heads there are
OTHERS = {1280: 16, 1408: 16}  # published widths whose heads are wider: ViT-H, ViT-g
HEADS = ("num_attention_heads", "encoder_attention_heads", "attention_heads", "num_heads")
NO_HEAD = "the file has no regression head"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a file becomes a checkpoint of ours."""

    config: str
    """File under configs/, with options: `pretrain/data2vec_image.py:size=base`."""
    changes: Mapping[str, Any]
    """Dotted config key -> value, read from the shapes and the file's own config."""
    table: tuple[Rule, ...]
    fresh: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Start of a parameter path -> why the file has none; such are initialised as in training."""
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Config key -> why the file does not tell it; the command line must."""
    teacher: tuple[Rule, ...] = ()
    """The table of the averaged model in the same file, where there is one."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a family's models are stored."""

    recognise: Callable[[Any, bool], bool]
    """(weights, whether the user named the family) -> whether this is it, from names and config."""
    plan: Callable[[Any, Any], Plan]
    """(weights, the folder they lie in or None) -> Plan; UserError for a model that we have not."""


def shape(weights, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that every file of a layout has."""
    if name not in weights.tensors:
        raise UserError(f"the file has no {name}; it is not whole, or of another family (--family)")
    found = tuple(weights.tensors[name].shape)
    if len(found) != rank or not all(found):
        raise UserError(f"{name} has shape {found}, wanted {rank} axes; give a file that is whole")
    return found


def count(weights, pattern: str) -> int:
    """How many different numbers stand at the one group of `pattern` in the names."""
    found = (re.match(pattern, name) for name in weights.tensors)
    return len({match[1] for match in found if match})


def prefix(weights, ending: str) -> str | None:
    """What stands before `ending` in the shortest name that ends so; None if no name does."""
    found = [name[: -len(ending)] for name in weights.tensors if name.endswith(ending)]
    found = [start for start in found if re.fullmatch(r"(?:[\w-]+\.)*", start)]
    return min(found, key=len) if found else None


def setting(config: Mapping, *names: str, default=None):
    """The first value that a file's config has under one of `names`, at any depth (fairseq nests
    `cfg.model...`, or `args`); an outer one goes before a nested one."""
    level: Sequence[Mapping] = [config]
    for _ in range(6):
        for name in names:
            for mapping in level:
                if mapping.get(name) is not None and not isinstance(mapping[name], Mapping):
                    return mapping[name]
        level = [v for mapping in level for v in mapping.values() if isinstance(v, Mapping)]
    return default


def encoder_sizes(weights, blocks: str, width: int, mlp: int) -> tuple[dict, dict]:
    """(changes, unknown) for an encoder; `blocks` matches a name in each block, its number as a
    group."""
    depth = count(weights, blocks)
    said = setting(weights.config, "num_hidden_layers", "encoder_layers")
    if isinstance(said, int) and said != depth:
        first = min((name for name in weights.tensors if re.match(blocks, name)), default="")
        raise UserError(
            f"the file has {depth} layers ({first}, ...), its config {shown(said)}; get all files "
            "of the model, its own config among them"
        )
    changes = {"model.width": width, "model.depth": depth, "model.mlp_dim": mlp}
    changes |= {"model.scan": depth > 4, "dtype": "float32"}
    given = setting(weights.config, *HEADS)
    if isinstance(given, int) and given > 0:
        return changes | {"model.num_heads": given}, {}
    if width % HEAD_DIM == 0:
        return changes | {"model.num_heads": OTHERS.get(width, width // HEAD_DIM)}, {}
    why = f"the file does not say, and its width {width} is no multiple of {HEAD_DIM}"
    return changes, {"model.num_heads": why}


def size(width: int) -> str:
    """The published size whose training settings are nearest."""
    return "large" if width >= 1024 else "base"


def pretraining(depth: int, top: int) -> dict:
    """What pre-training configs have besides."""
    return {"teacher_dtype": "float32", "top_k_layers": min(top, depth)}


def require(config: Mapping, wanted: Mapping[str, Any]) -> None:
    """UserError for a setting that would make another model of the same weights."""
    for name, value in wanted.items():
        found = config.get(name, value)
        if found != value:
            raise UserError(
                f"the model's config has {name}={found!r}, which is not supported ({value!r} is); "
                "give another file"
            )


def require_post_norm(weights) -> None:
    """UserError for a model of fairseq's whose norms come first; its weights look the same."""
    if setting(weights.config, "layer_norm_first"):
        raise UserError(
            "the model's config has layer_norm_first=True, which is not supported (False is); give "
            "another file"
        )
