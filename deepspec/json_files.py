"""JSON that others wrote, or that a disk has damaged: read within limits, and one kind of error."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from deepspec.errors import DeepSpecError

T = TypeVar("T")
MAX_BYTES = 256 * 2**20  # of a file that describes others; data is read by rows instead
MAX_DEPTH = 200  # what walks through a value must not meet the limit of Python's stack
SHOWN = 3


def parse_json(raw: bytes | str) -> Any:
    """Return the value of `raw`. Raises ValueError, in words, for anything that is not JSON in
    UTF-8, is nested more than MAX_DEPTH deep, or has a number of more than 4,300 digits."""
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    too_deep = ValueError(f"nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise too_deep
    return value


def beyond(error: Exception) -> str:
    """Return what an error of `parse_json` says, without Python's advice on its limit of digits."""
    return str(error).partition("; use sys.")[0]


def read_json(file: Path, error: type[DeepSpecError], way_out: str) -> dict[str, Any]:
    """Return the object in `file`.

    Raises FileNotFoundError where nothing is there, and `error` with `way_out` for anything else
    that keeps it from being read.
    """
    return read_as(dict[str, Any], file, error, way_out)


def read_as(kind: type[T], file: Path, error: type[DeepSpecError], way_out: str) -> T:
    """Return what is in `file` as `kind`: a dataclass, or a type such as `list[Row]`.

    Types are held strictly (1.0 and true are no integers), and so are the bounds of annotations.
    Raises as `read_json`, naming the fields that are missing or wrong.
    """
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_BYTES}")
        return _as_kind(kind, file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise FileNotFoundError(*problem.args) from None
    except (OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise error(f"{file} is damaged or unreadable ({why}); {way_out}") from None


def as_kind(kind: type[T], value: Any) -> T:
    """Return the parsed `value` as `kind`, as `read_as`. Raises ValueError that names the fields
    that are missing or wrong."""
    return _as_kind(kind, to_json(value))


def _as_kind(kind: type[T], raw: bytes) -> T:
    try:
        return _adapter(kind).validate_json(raw, strict=True)  # type: ignore[arg-type]
    except ValidationError as problem:
        raise ValueError(_in_words(problem)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _in_words(problem: ValidationError) -> str:
    found = problem.errors(include_url=False, include_context=False)
    lines = []
    for each in found[:SHOWN]:
        place = ".".join(str(part) for part in each["loc"])
        shown = each["type"] not in ("missing", "json_invalid")
        value = f", found {each['input']!r:.40}" if shown else ""
        lines.append(f"{place}: {each['msg']}{value}".removeprefix(": "))
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(lines) + more


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        parts = (each.values() if isinstance(each, dict) else each for each in layer)
        layer = [part for each in parts for part in each if isinstance(part, dict | list)]
    return bool(layer)
