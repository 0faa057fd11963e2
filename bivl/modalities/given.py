"""What `preprocess` is given: lists of images or sounds, each named where it cannot be read."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from bivl.core.errors import Undecodable, UserError


def each(name: str, values: Any, read: Callable[[Any], Any]) -> list:
    """`read` of every value that was passed as `name`; UserError for no list and for one of them
    that cannot be read."""
    if isinstance(values, (str, bytes, os.PathLike)) or not isinstance(values, Iterable):
        raise UserError(f"preprocess got a single {name}; pass a list, {name}=[...]")
    found = []
    for place, value in enumerate(values):
        try:
            found.append(read(value))
        except Undecodable as error:
            what = value if isinstance(value, (str, os.PathLike)) else type(value).__name__
            raise UserError(
                f"preprocess: {name}[{place}] ({what}) cannot be read: {error}; correct it or "
                "leave it out"
            ) from error
    if not found:
        raise UserError(f"preprocess got no {name}; pass {name}=[...]")
    return found
