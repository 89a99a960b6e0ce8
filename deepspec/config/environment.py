"""Values that come from the environment: a config keeps their names, `${oc.env:NAME}`.

A recipe may refer to a variable in any text, through other keys or through ${oc.decode:...} too.
What is written and printed has the reference (`as_dict` puts it back), and what reads it again
takes the variable from the environment of then. A value is seen where it is used: the folder of
out=, the project of a tracker, and in the tokens of stores what the model reads, such as a system
prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from deepspec.config.keys import KEYS
from deepspec.config.references import (
    each_text,
    for_omegaconf,
    for_saving,
    literal,
    texts_in,
    variables_of,
)
from deepspec.config.resources import resource
from deepspec.config.schema import RunConfig, addresses, dotted, group_of
from deepspec.errors import ConfigError
from deepspec.secrets import hide, hide_url

_RESOLVER = re.compile(r"(?<!\\)((?:\\\\)*)\$\{\s*(?:oc\.)?(env|decode|deepspec)\s*:")
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_/.][\w/.-]*", re.IGNORECASE)
_OPEN, _CLOSE = "\ue000", "\ue001"  # for ${ and } of references, until all others are escaped


def references(merged: DictConfig) -> dict[str, Any]:
    """Return by dotted key the values that depend on the environment, as they are saved: with
    references instead of what the variables hold. References to other keys are followed.

    Raises ConfigError for one that cannot be saved.
    """
    raw = OmegaConf.to_container(merged, resolve=False)
    if not any("oc.env" in text for text in texts_in(raw)):
        return {}
    named = each_text(raw, lambda text: _RESOLVER.sub(r"\1${named.\2:", text))
    resolved = OmegaConf.to_container(OmegaConf.create(named), resolve=True)
    found = {}
    for key, value in dotted(resolved).items():  # type: ignore[arg-type]
        if any(_OPEN in text for text in texts_in(value)):
            found[key] = each_text(for_saving(value), _as_reference)
    for key, value in dotted(named).items():
        if key not in found and any("${named.env:" in text for text in texts_in(value)):
            raise _unsaved(key)
    return found


def unset_variables(kept: Mapping[str, Any]) -> dict[str, str]:
    """Return by key of `kept` the variable that it needs and that is not set."""
    found = {}
    for key, written in kept.items():
        missing = [name for name in variables_of(written) if name not in os.environ]
        if missing and not _can_be_resolved(written):
            found[key] = missing[0]
    return found


def set_aside(merged: DictConfig, key: str, written: Any) -> None:
    """Replace the value of `key`, which cannot be had, by its default or else by its reference."""
    schema = OmegaConf.to_container(OmegaConf.structured(RunConfig), resolve=False)
    default = dotted(schema)[key]  # type: ignore[arg-type]
    chosen = literal(written) if default in ("???", [], {}) else default
    OmegaConf.update(merged, key, chosen, merge=False)


def check_references(merged: DictConfig, kept: Mapping[str, Any]) -> None:
    """Raises ConfigError where `kept`, read again, is not what `merged` has."""
    again = merged.copy()
    for key, written in kept.items():
        OmegaConf.update(again, key, for_omegaconf(written), merge=False)
        if OmegaConf.select(again, key) != OmegaConf.select(merged, key):
            raise _unsaved(key)


def _unsaved(key: str) -> ConfigError:
    return ConfigError(
        f"{key} refers to the environment in a way that cannot be saved by name; write "
        "${oc.env:NAME} or ${oc.decode:${oc.env:NAME}} in this key itself"
    )


def by_name(message: str, kept: Mapping[str, Any]) -> str:
    """Return `message` with names of variables instead of what they hold, however short that is."""
    for name in variables_of(dict(kept)):
        if value := os.environ.get(name):
            shown = f"${{oc.env:{name}}}"
            message = shown.join(re.split(rf"(?<!\w){re.escape(value)}(?!\w)", message))
    return message


def remember(config: RunConfig, kept: Mapping[str, Any]) -> None:
    """Attach `kept` to `config`, and hide what the variables hold from what is printed."""
    seen = variables_of(kept.get("out"))  # everybody sees the folder
    for key, written in kept.items():
        group, name = group_of(config, key)
        value = getattr(group, name)
        group.written[name] = (written, value)
        if key == "out" or KEYS[key] in (int, float, bool):  # a number is no secret
            continue
        for variable in variables_of(written):
            if variable not in seen:
                hide(os.environ.get(variable, ""), f"${{oc.env:{variable}}}")
        if any("oc.decode:" in text for text in texts_in(written)):
            for text in texts_in(value):
                hide(text, f"[{key}]")
    for url in addresses(config):
        hide_url(url)


def forbid(config: RunConfig, unset: Mapping[str, str]) -> None:
    """Have the keys of `unset` raise ConfigError as soon as they are read."""
    for key, variable in unset.items():
        group, name = group_of(config, key)
        message = (
            f"{key} comes from the environment variable {variable}, which is not set here; set it, "
            f"or give {key}=..."
        )
        kind = type(group)
        group.__class__ = type(kind.__name__, (kind,), {name: _forbidden(message)})


def _forbidden(message: str) -> property:
    def read(_: Any) -> Any:
        raise ConfigError(message)

    return property(read)


def _can_be_resolved(written: Any) -> bool:
    try:
        OmegaConf.to_container(OmegaConf.create({"it": for_omegaconf(written)}), resolve=True)
    except Exception:  # whatever a resolver raises
        return False
    return True


def _as_reference(text: str) -> str:
    return re.sub(rf"(\\*){_OPEN}", r"\1\1${", text).replace(_CLOSE, "}")


def _named_variable(name: str, *default: Any) -> str:
    if not default:
        return f"{_OPEN}oc.env:{name}{_CLOSE}"
    text = "null" if default[0] is None else str(default[0])
    if default[0] is not None and not _PLAIN.fullmatch(text):
        text = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text))
        text = f"'{text}'"
    return f"{_OPEN}oc.env:{name},{text}{_CLOSE}"


def _named_decoded(expression: str | None, _parent_: Any, _node_: Any) -> Any:
    if expression is not None and _OPEN in expression:
        return f"{_OPEN}oc.decode:{expression}{_CLOSE}"
    return oc.decode(expression, _parent_, _node_)


def _named_path(path: str) -> str:
    return f"{_OPEN}deepspec:{path}{_CLOSE}" if _OPEN in path else str(resource(path))


OmegaConf.register_new_resolver("named.env", _named_variable, replace=True)
OmegaConf.register_new_resolver("named.decode", _named_decoded, replace=True)
OmegaConf.register_new_resolver("named.deepspec", _named_path, replace=True)
