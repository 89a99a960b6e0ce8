"""From `recipe=NAME key=value ...` to a checked RunConfig.

A recipe is a YAML of choices over the groups in `configs/`; Hydra composes them, the dataclass
schema types them, `validation` checks what types cannot. Every mistake names the key to change.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepspec.config.resources import resource
from deepspec.config.schema import RunConfig
from deepspec.config.validation import validate
from deepspec.errors import ConfigError

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
    raise ConfigError(f"recipe={recipe} is unknown{_nearest(recipe, names)}")


def list_recipes() -> list[tuple[str, str]]:
    """(name, one line) of every shipped recipe."""
    found = []
    for path in sorted(resource("recipes").glob("*.yaml")):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        found.append((path.stem, str(raw.get("description", ""))))
    return found


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Compose, type and check. Raises ConfigError."""
    path = recipe_path(recipe)
    _check_overrides(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
            composed = compose(
                path.stem,
                overrides=[
                    f"hydra.searchpath=[file://{resource('configs')},file://{resource('recipes')}]",
                    *[_added(override) for override in overrides],
                ],
            )
        raw = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_plain(path, error)) from None
    assert isinstance(raw, dict)
    return config_from({"recipe": path.stem, **{str(k): v for k, v in raw.items()}})


def config_from(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from plain containers (a saved run's config) and `key=value` changes."""
    schema = OmegaConf.structured(RunConfig)
    overrides = list(overrides)
    _check_overrides(overrides)
    try:
        changes = OmegaConf.from_dotlist(overrides)
        plain = OmegaConf.to_container(changes)
        unknown = sorted({*_keys(raw), *_keys(plain)} - set(schema_keys()))  # type: ignore[arg-type]
        if unknown:
            key = unknown[0]
            raise ConfigError(f"unknown key {key}{_nearest(key, schema_keys())}")
        merged = OmegaConf.merge(schema, OmegaConf.create(dict(raw)), changes)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"{missing[0]} is not set; add {missing[0]}=... or put it in the recipe"
            )
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_typed(error)) from None
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def schema_keys() -> list[str]:
    """Every key there is, dotted."""
    return list(_keys(OmegaConf.to_container(OmegaConf.structured(RunConfig))))  # type: ignore[arg-type]


def _keys(node: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        yield dotted
        if isinstance(value, Mapping) and value != MISSING:
            yield from _keys(value, f"{dotted}.")


def _groups() -> set[str]:
    return {entry.name for entry in resource("configs").iterdir() if entry.is_dir()}


def _check_overrides(overrides: Iterable[str]) -> None:
    """Keys of `key=value` must exist; a group name alone (`engine=zero2`) chooses a file."""
    known = schema_keys()
    groups = _groups()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not key=value")
        key = key.lstrip("+")
        if key in groups and "." not in key and not value.startswith("{"):
            options = sorted(path.stem for path in (resource("configs") / key).glob("*.yaml"))
            if value not in options:
                raise ConfigError(f"{key}={value}: not one of {', '.join(options)}")
        elif key not in known:
            raise ConfigError(f"unknown key {key}{_nearest(key, known)}")


def _added(override: str) -> str:
    """Recipes state only what they choose, so a schema key may be new to the composed file."""
    key = override.partition("=")[0]
    return override if key in _groups() or key.startswith("+") else f"++{override}"


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not near:
        last = name.rpartition(".")[2]
        near = [key for key in names if key.rpartition(".")[2] == last][:1]
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(names[:12])}"


def _typed(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    first = str(error).strip().splitlines()[0]
    return f"{key}: {first}" if key else first


def _plain(path: Path, error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{path}: {text}"
