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
    dict[str, str]: "a mapping of texts, written {a: b}",
    dict[str, Any]: "a mapping, written {a: b}",
}


def _keys_of(schema: type, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        if name == "written":  # what the keys of a group are written as
            continue
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


def is_mapping(hint: Any) -> bool:
    """Whether a key of this type holds a mapping as its value."""
    return get_origin(hint) is dict


# {"training": TrainingConfig, "training.epochs": float, ...}; an optional key has its inner type
KEYS = _keys_of(RunConfig)


def members(group: str) -> dict[str, str]:
    """{name: dotted key} of what is directly in `group`; an empty name is the top."""
    return {key.rpartition(".")[2]: key for key in KEYS if key.rpartition(".")[0] == group}


def unknown_key(key: str) -> ConfigError:
    """The error for `key`: it names the nearest valid key, or what the group has."""
    group, _, name = key.rpartition(".")
    if here := members(group):
        near = [here[found] for found in _near(name, here, 0.6)]
    else:
        near = _near(key, KEYS, 0.7)  # the group's name is the wrong part
    if not near:
        names = _near(name, [valid.rpartition(".")[2] for valid in KEYS], 0.8)
        near = [valid for valid in KEYS if valid.rpartition(".")[2] in names]
    if near:
        return ConfigError(f"unknown key {key}; did you mean {' or '.join(near)}?")
    while not members(group):
        group = group.rpartition(".")[0]
    known = ", ".join(members(group))
    return ConfigError(f"unknown key {key}; {group or 'a recipe'} has {known}")


def wrong_type(key: str, value: Any) -> ConfigError:
    """The error for a `value` that the type of `key` does not allow; `a.b[0]` is an element."""
    name, bracket, _ = key.partition("[")
    hint = KEYS[name]
    if is_group(hint):
        names = list(members(name).values())
        return ConfigError(
            f"{key}={_shown(value)}, but {key} holds {len(names)} keys; set those, such as "
            f"{names[0]}=..."
        )
    if bracket:
        element = TYPES[get_args(hint)[0]]
        return ConfigError(f"{key}={_shown(value)} must be {element}; lists are written [a, b]")
    return ConfigError(f"{key}={_shown(value)} must be {TYPES[hint]}")


def nearest(name: str, names: Iterable[str]) -> str:
    """How to go on where `name` is not among `names`."""
    names = list(names)
    near = _near(name, names, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(names)}"


def _near(name: str, names: Iterable[str], cutoff: float) -> list[str]:
    """The nearest name, or none."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)


def _shown(value: Any) -> Any:
    return "null" if value is None else value
