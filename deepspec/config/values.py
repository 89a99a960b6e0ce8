"""The value of a `key=value` word, as it is written on a command line."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from deepspec.errors import ConfigError
from deepspec.yaml_files import load_yaml

NULL = "tag:yaml.org,2002:null"


class _Texts(yaml.BaseLoader):
    """YAML whose scalars are texts, but for a bare null; keys have types of their own."""


_Texts.add_implicit_resolver(NULL, re.compile("null$"), ["n"])
_Texts.add_constructor(NULL, lambda loader, node: None)


class _Values(yaml.SafeLoader):
    """YAML without dates, which no key has."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, signs) for tag, signs in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_value(word: str, typed: bool = False) -> Any:
    """What stands behind the `=` of `word`: as it stands, so that a path or a prompt may hold any
    sign; what begins like a list, a mapping or a quoted text is YAML, and null is None.
    `typed`: a scalar inside YAML has the type that YAML gives it; else it is a text.

    Raises ConfigError for YAML that cannot be read.
    """
    text = word.partition("=")[2]
    if not text.startswith(("[", "{", "'", '"')):
        return None if text == "null" else text
    try:
        value = load_yaml(text, _Values if typed else _Texts)
    except ValueError as error:
        raise ConfigError(f"{word:.200} is not readable: {error}") from None
    # YAML reads {a:b} as the key "a:b" without a value
    pairs = value.items() if isinstance(value, dict) else ()
    if any(":" in str(key) and inner in (None, "") for key, inner in pairs):
        raise ConfigError(f"{word} is not readable: put a space after the colon: {{a: b}}")
    return value
