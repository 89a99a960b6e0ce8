"""Paths in a config: the same place written in two ways, and found again from another folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from deepspec.config.schema import dotted

PATHS = (
    "target.path",
    "target.offload_folder",
    "data.path",
    "drafter.init_from",
    "features.path",
    "decoding.throughput",
    "evaluation.benchmarks",
)
Place = str | list[str] | None


def places_of(config: Mapping[str, Any]) -> dict[str, Place]:
    """The values of `config` whose relative paths exist now, with these made absolute, by key."""
    known, found = dotted(config), {}
    for key in PATHS:
        # a benchmark's bare name is not the folder that happens to be called so
        only = os.path.isfile if key == "evaluation.benchmarks" else _exists
        absolute = _each(known.get(key), partial(_absolute, only))
        if absolute != known.get(key):
            found[key] = absolute
    return found


def located(config: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
    """`config` with paths that lead to `places`, the `places_of` it where it was saved.

    A path stays as written where it leads to the same place from here, or where that place is gone
    and something is there: the project was moved as a whole.
    """
    changed = deepcopy(dict(config))
    for key, place in places.items():
        *groups, name = key.split(".")
        node = changed
        for group in groups:
            node = node.get(group, {})
        written = node.get(name)
        if isinstance(written, str) and isinstance(place, str):
            node[name] = _either(written, place)
        elif isinstance(written, list) and isinstance(place, list):
            node[name] = [_either(*pair) for pair in zip(written, place, strict=True)]
    return changed


def same_place(one: Place, other: Place) -> bool:
    """Whether both lead to the same files, or are the same names on the hub."""
    return one == other or _each(one, _real) == _each(other, _real)


def _each(value: Place, change: Callable[[str], str]) -> Place:
    if isinstance(value, list):
        return [change(each) for each in value]
    return None if value is None else change(value)


def _absolute(is_there: Callable[[str], bool], path: str) -> str:
    place = os.path.expanduser(path)
    return os.path.abspath(place) if is_there(place) else path


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _exists(path: str) -> bool:
    place = os.path.expanduser(path)
    return os.path.exists(place) or bool(glob.glob(place, recursive=True))


def _either(written: str, absolute: str) -> str:
    if _real(written) == _real(absolute) or (_exists(written) and not _exists(absolute)):
        return written
    return absolute
