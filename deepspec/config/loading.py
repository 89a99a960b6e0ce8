"""From `recipe=NAME key=value ...` to a checked RunConfig.

A recipe is a YAML of choices over the groups in `configs/`; Hydra composes them, the dataclass
schema types them, `validation` checks what types cannot. Every mistake names the key to change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from deepspec.config.environment import (
    by_name,
    check_references,
    forbid,
    references,
    remember,
    set_aside,
    unset_variables,
)
from deepspec.config.keys import (
    KEYS,
    is_group,
    is_list,
    is_mapping,
    members,
    nearest,
    unknown_key,
    wrong_type,
)
from deepspec.config.references import for_omegaconf, literal
from deepspec.config.resources import resource
from deepspec.config.schema import RunConfig
from deepspec.config.validation import validate
from deepspec.config.values import read_value
from deepspec.errors import ConfigError
from deepspec.yaml_files import read_yaml

OmegaConf.register_new_resolver(
    "deepspec", lambda path: str(resource(path)), replace=True
)  # ${deepspec:data/tiny_target}


def recipe_path(recipe: str) -> Path:
    """The YAML behind a shipped name or a path. Raises ConfigError naming the nearest."""
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path.resolve()
        raise ConfigError(f"recipe={recipe}: no such file")
    shipped = resource("recipes") / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    names = [name for name, _ in list_recipes()]
    own = "" if "/" not in recipe else "; your own recipe is a path that ends with .yaml"
    raise ConfigError(f"recipe={recipe} is unknown{own or nearest(recipe, names)}")


def list_recipes() -> list[tuple[str, str]]:
    """(name, one line) of every shipped recipe."""
    found = []
    for path in sorted(resource("recipes").glob("*.yaml")):
        raw = read_yaml(path)
        found.append((path.stem, str(raw.get("description", ""))))
    return found


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Compose, type and check. Raises ConfigError.

    `overrides`: `drafter=dflash` chooses a file of a group, `drafter.num_layers=3` sets a key.
    """
    path = recipe_path(recipe)
    choices = [word for word in overrides if _is_choice(word)]
    for choice in choices:
        _check_choice(choice, path.parent)
    _check_files(path, [dict([choice.split("=", 1)]) for choice in choices])
    try:
        raw = _composed(path, *choices)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {_composition(error)}") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: its defaults lead back to itself; a recipe that builds on {path.stem} needs "
            "another file name"
        ) from None
    changes = [word for word in overrides if word not in choices]
    named = {"recipe": literal(path.stem), **{str(k): v for k, v in raw.items()}}
    return _resolved(named, changes)


def _composed(path: Path, *choices: str) -> dict[Any, Any]:
    """The recipe and the files of groups that it and `choices` name, `${...}` as written."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
        composed = compose(path.stem, overrides=[_search_path(), *choices])
    raw = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(raw, dict)
    return raw


def config_from(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from plain containers (a saved run's config) and `key=value` changes.

    `${...}` has a meaning in recipes only, except that what `as_dict` keeps by name is taken from
    the environment as it now is. A variable that is not set is missed when its key is read.
    """
    return _resolved(for_omegaconf(_given(raw, "")), overrides, saved=True)


def _resolved(raw: Mapping[str, Any], overrides: Iterable[str], saved: bool = False) -> RunConfig:
    """Typed, with every `${...}` of `raw` followed once, and checked. `saved`: variables of the
    environment may be missing."""
    kept: dict[str, Any] = {}
    unset: dict[str, str] = {}
    try:
        merged = OmegaConf.merge(_schema(), _shaped(raw), _shaped(_parsed(overrides)))
        assert isinstance(merged, DictConfig)
        kept = references(merged)
        unset = unset_variables(kept)
        for key, variable in unset.items():
            if not saved:
                raise ConfigError(f"{key}: the environment variable {variable} is not set; set it")
            set_aside(merged, key, kept[key])
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"{missing[0]} is not set; add {missing[0]}=... or put it in the recipe"
            )
        config = OmegaConf.to_object(merged)
        assert isinstance(config, RunConfig)
        check_references(merged, {key: kept[key] for key in kept if key not in unset})
        validate(config)
    except OmegaConfBaseException as error:
        raise ConfigError(by_name(str(_in_words(error)), kept)) from None
    except ConfigError as error:
        raise ConfigError(by_name(str(error), kept)) from None
    config.out = os.path.expanduser(config.out)  # not every shell does in `out=~/runs`
    remember(config, kept)
    forbid(config, unset)
    return config


@cache
def _schema() -> Any:
    return OmegaConf.structured(RunConfig)


def _in_words(error: OmegaConfBaseException) -> ConfigError:
    key = str(error.full_key)
    if isinstance(error, ValidationError) and key.partition("[")[0] in KEYS:
        return wrong_type(key, error.value)
    return ConfigError(f"{key}: {str(error).splitlines()[0]}")  # ${...} to nowhere


def _parsed(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as nested containers."""
    changes = OmegaConf.create()
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not (key and equals):
            raise ConfigError(f"{word!r} is not key=value")
        if key not in KEYS:
            raise unknown_key(key)
        typed = KEYS[key] == dict[str, Any]  # the schema does not have the types of its values
        OmegaConf.update(changes, key, literal(_given(read_value(word, typed), key)))
    return OmegaConf.to_container(changes, resolve=False)  # type: ignore[return-value]


def _given(node: Any, key: str) -> Any:
    """Return `node`. Raises ConfigError for ???, which OmegaConf would pass over."""
    if isinstance(node, Mapping):
        return {name: _given(value, f"{key}.{name}".lstrip(".")) for name, value in node.items()}
    if isinstance(node, list):
        return [_given(value, key) for value in node]
    if node == MISSING:
        raise ConfigError(f"{key}={node} sets nothing: a recipe marks by it what has to be given")
    return node


def _shaped(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`node` with a single value for a list as a list of one. Raises ConfigError for its keys."""
    shaped = {}
    for name, value in node.items():
        name = "yes" if name is True else name  # what YAML makes of a bare `yes:`
        key = f"{prefix}{name}"
        if key not in KEYS:
            raise unknown_key(key)
        if is_group(KEYS[key]):
            if not isinstance(value, Mapping):
                raise wrong_type(key, value)
            value = _shaped(value, f"{key}.")
        elif isinstance(value, Mapping) != is_mapping(KEYS[key]):
            raise wrong_type(key, value)
        elif is_list(KEYS[key]):
            value = [value] if isinstance(value, str | int | float) else value
            for index, element in enumerate(value or []):
                if isinstance(element, list | Mapping):
                    raise wrong_type(f"{key}[{index}]", element)
        shaped[str(name)] = value
    return shaped


def _is_choice(word: str) -> bool:
    key, _, value = word.partition("=")
    return key in members("") and is_group(KEYS[key]) and not value.startswith("{")


def _check_choice(choice: str, beside: Path) -> None:
    """The file must exist among the shipped ones or `beside` the recipe."""
    group, _, name = choice.partition("=")
    folders = (resource("configs") / group, beside / group)
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    if name not in names:
        raise ConfigError(
            f"{choice} must be one of {', '.join(names)}; a key of the group {group} is set "
            f"by its whole name, such as {next(iter(members(group).values()))}=..."
        )


def _check_files(recipe: Path, choices: Sequence[Any]) -> None:
    """Raise ConfigError for a file beside `recipe`, or itself, that is beyond the limits of YAML:
    Hydra reads them, and those that they build on, without any."""
    waiting, found = [recipe], set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        try:
            raw = read_yaml(path)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        defaults = raw.get("defaults") if isinstance(raw, dict) else None
        entries = [*(defaults if isinstance(defaults, list) else ()), *choices]
        for name in (name for entry in entries for name in _parents(entry)):
            waiting += [place / f"{name}.yaml" for place in (recipe.parent, path.parent)]


def _parents(entry: Any) -> list[str]:
    """The files that an entry of a recipe's defaults may mean, without their suffix."""
    pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
    return [
        f"{str(group).split()[-1].partition('@')[0]}/{name}" if group else str(name).split("@")[0]
        for group, names in pairs
        for name in (names if isinstance(names, list) else [names])
    ]


def _search_path() -> str:
    """Hydra's grammar wants quotes around folders with spaces or brackets in their names."""
    folders = [f"file://{resource(name)}" for name in ("configs", "recipes")]
    quoted = ["'" + re.sub(r"(\\*)'", r"\1\1\\'", folder) + "'" for folder in folders]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def _composition(error: Exception) -> str:
    """Hydra's words without its advice, which holds for its own command line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r" (Config search path:|To append to your) .*", "", text)
    missing = "No match in the defaults list" in text
    return f"{text} The recipe's defaults must begin with base or a recipe" if missing else text
