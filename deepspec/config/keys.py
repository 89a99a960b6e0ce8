"""Every key of the configuration, dotted, with its type; and what to say about a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from deepspec.config.schema import RunConfig
from deepspec.errors import ConfigError

TYPES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
}


def _keys_of(schema: type, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        if isinstance(hint, UnionType):  # `int | None`
            hint = next(part for part in get_args(hint) if part is not NoneType)
        found[f"{prefix}{name}"] = hint
        if is_group(hint):
            found |= _keys_of(hint, f"{prefix}{name}.")
    return found


def is_group(hint: Any) -> bool:
    """Whether a key of this type holds keys itself."""
    return is_dataclass(hint)


def is_list(hint: Any) -> bool:
    """Whether a key of this type holds a list."""
    return get_origin(hint) is list


# {"training": TrainingConfig, "training.epochs": float, ...}; an optional key has its inner type
KEYS = _keys_of(RunConfig)


def members(group: str) -> dict[str, str]:
    """{name: dotted key} of what is directly in `group`; an empty name is the top."""
    return {key.rpartition(".")[2]: key for key in KEYS if key.rpartition(".")[0] == group}


def unknown_key(key: str) -> ConfigError:
    """The error for `key`: it names the nearest valid key, or what the group has."""
    group, _, name = key.rpartition(".")
    here = members(group)
    elsewhere = {valid.rpartition(".")[2]: valid for valid in reversed(KEYS)}
    near = (
        _near(name, here, 0.6)
        or _near(name, elsewhere, 0.8)
        or _near(key, {valid: valid for valid in KEYS}, 0.7)
    )
    while group and not members(group):
        group = group.rpartition(".")[0]
    listed = f"; {group or 'the top level'} has {', '.join(members(group))}"
    return ConfigError(f"unknown key {key}{f'; did you mean {near}?' if near else listed}")


def wrong_type(key: str, value: Any) -> ConfigError:
    """The error for a `value` that the type of `key` does not allow."""
    hint = KEYS[key]
    if is_group(hint):
        names = list(members(key).values())
        return ConfigError(
            f"{key}={value}: {key} holds {len(names)} keys; set those, such as {names[0]}=..."
        )
    return ConfigError(f"{key}={value} must be {TYPES[hint]}")


def nearest(name: str, names: Iterable[str]) -> str:
    """How to go on where `name` is not among `names`."""
    names = list(names)
    near = _near(name, {name: name for name in names}, 0.5)
    return f"; did you mean {near}?" if near else f"; choose from {', '.join(names)}"


def _near(name: str, names: dict[str, str], cutoff: float) -> str | None:
    found = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return names[found[0]] if found else None
