"""`key=value` words of a command line: the command's own keys, and overrides of the config."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspec.errors import ConfigError

if TYPE_CHECKING:
    from deepspec.config.schema import RunConfig


def take(settings: Sequence[str], *own: str) -> tuple[dict[str, str], list[str]]:
    """The values of the command's `own` keys, and all other words.

    Raises ConfigError for a word without `=` and for an own key given twice.
    """
    values: dict[str, str] = {}
    others = []
    for word in settings:
        key, equals, value = word.partition("=")
        if not (key and equals):
            given = any(other.startswith(f"{own[0]}=") for other in settings)
            hint = (
                "put quotes around values with spaces"
                if given
                else f"did you mean {own[0]}={word}?"
            )
            raise ConfigError(f"{word!r} is not key=value; {hint}")
        if key not in own:
            others.append(word)
        elif key in values:
            raise ConfigError(f"{key}= is given twice: {values[key]} and {value}")
        else:
            values[key] = value
    return values, others


def whole_number(name: str, word: str) -> int:
    """The value of the command's own key `name`. Raises ConfigError for less than 1."""
    if not word.isdecimal() or int(word) < 1:
        raise ConfigError(f"{name}={word} must be a whole number of at least 1{_lists(word)}")
    return int(word)


def non_negative(name: str, word: str) -> float:
    """The value of the command's own key `name`. Raises ConfigError for less than 0."""
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{name}={word} must be a number of at least 0{_lists(word)}")
    return number


def positive(name: str, word: str) -> float:
    """The value of the command's own key `name`. Raises ConfigError for 0 and less."""
    number = non_negative(name, word)
    if not number:
        raise ConfigError(f"{name}={word} must be a number above 0")
    return number


def _lists(word: str) -> str:
    return "; lists are written [a, b]" if "," in word else ""


def listed(name: str, word: str) -> list[str]:
    """The value of the command's own key `name`: the parts of `[a, "b,c"]`, or the one that is not
    in brackets. Raises ConfigError for a list of anything but texts."""
    from deepspec.config.values import read_value

    parts = read_value(f"{name}={word}")
    parts = parts if isinstance(parts, list) else [parts]
    if not all(isinstance(part, str) and part for part in parts):
        raise ConfigError(f"{name}={word} must be a list; lists are written [a, b]")
    return parts


def command_line(command: str, *words: str) -> str:
    """`deepspec command words`, as a shell takes it."""
    return shlex.join(["deepspec", command, *words])


def given_keys(settings: Sequence[str]) -> set[str]:
    """The keys on the command line."""
    return {word.partition("=")[0] for word in settings}


def recipe_config(settings: Sequence[str]) -> RunConfig:
    """The config of `recipe=NAME key=value ...`. Raises ConfigError."""
    from deepspec.config.loading import load_config

    values, overrides = take(settings, "recipe")
    if "recipe" not in values:
        raise ConfigError(
            "recipe= is missing; for example recipe=tiny, or the path of your own YAML "
            "(deepspec recipes lists those that are shipped)"
        )
    return load_config(values["recipe"], overrides)


def print_config(config: RunConfig) -> None:
    """The resolved config as YAML, escaped where standard output cannot hold its signs."""
    import sys

    import yaml

    from deepspec.config.schema import as_dict

    holds_all = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=holds_all), end="")
