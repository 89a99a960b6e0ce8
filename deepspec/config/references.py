"""Texts with references to the environment, `${oc.env:NAME}`, as they are saved.

Of a saved text only the resolvers in `KNOWN` have a meaning: any other `${` stands for itself, and
so does one of `KNOWN` behind a backslash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

KNOWN = r"(?:oc\.env|oc\.decode|deepspec):"


def for_saving(value: Any) -> Any:
    """Return `value` with its texts escaped, which `for_omegaconf` takes as they stand."""
    return each_text(value, lambda text: re.sub(rf"(\\*)\$\{{(?={KNOWN})", r"\1\1\\${", text))


def for_omegaconf(value: Any) -> Any:
    """Return the saved `value` as OmegaConf reads it: every `${` without a meaning is escaped."""
    return each_text(value, lambda text: re.sub(rf"(\\*)\$\{{(?!{KNOWN})", r"\1\1\\${", text))


def literal(value: Any) -> Any:
    """Return `value` with every `${` escaped for OmegaConf."""
    return each_text(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def variables_of(value: Any) -> list[str]:
    """Return the names of the variables that the texts in `value` refer to."""
    return [name for text in texts_in(value) for name in re.findall(r"\{oc\.env:(\w+)", text)]


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value`, a text or a container, with all its texts changed."""
    if isinstance(value, Mapping):
        return {name: each_text(inner, change) for name, inner in value.items()}
    if isinstance(value, list):
        return [each_text(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def texts_in(value: Any) -> Iterator[str]:
    """The texts in `value`, a text or a container; names in mappings are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(inner)
