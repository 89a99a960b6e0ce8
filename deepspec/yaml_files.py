"""YAML of others within limits: a few lines can be huge once their aliases are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_SIZE = 2**20  # characters
MAX_DEPTH = 100
MAX_NODES = 20_000  # values, aliases followed
MAX_DIGITS = 300


def load_yaml(text: str, loader: Any = yaml.SafeLoader) -> Any:
    """Return the value of `text`. Raises ValueError, in one line, for what is not YAML, for a date
    that there is not, and for what `check_yaml` refuses."""
    try:
        check_yaml(text)
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place and place.line else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ValueError(f"{problem}{line}") from None


def read_yaml(file: Path) -> Any:
    """Return the value of the YAML `file`. Raises as `load_yaml`, and OSError."""
    if (size := file.stat().st_size) > 4 * MAX_SIZE:  # the longest character has four bytes
        raise ValueError(f"{size} bytes, expected at most {MAX_SIZE} characters")
    return load_yaml(file.read_text(encoding="utf-8"))


def check_yaml(text: str) -> None:
    """Raise ValueError unless `text` is within the limits, without building anything of it."""
    if len(text) > MAX_SIZE:
        raise ValueError(f"{len(text)} characters, expected at most {MAX_SIZE}")
    sizes: dict[str, int] = {}  # of each anchor, in nodes
    opened: list[tuple[str | None, int]] = []  # collections that have not ended, by their anchors
    nodes = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, first = opened.pop()
            if anchor is not None:
                sizes[anchor] = nodes - first
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} leads to itself or to nothing")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.implicit[0] and len(event.value) > MAX_DIGITS and _is_number(event.value):
                raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        if nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values, with aliases followed")
        if len(opened) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _is_number(text: str) -> bool:
    return not set(text) - set("0123456789abcdefABCDEFxXoO_+-.:")
