"""The YAML that people read against the dataclasses that validate: two descriptions of one thing.

Both are read with plain tools (yaml, dataclasses), not with the loader.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from deepspec.config.resources import resource
from deepspec.config.schema import RunConfig
from deepspec.drafters.registry import DRAFTERS

CONFIGS = resource("configs")
GROUPS = [field.name for field in fields(RunConfig) if is_dataclass(field.default_factory)]
FILES = sorted(CONFIGS.glob("*/*.yaml"))
WHOLE = [path for path in FILES if "defaults:" not in path.read_text()]


def read(path: Path) -> dict[str, Any]:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw.pop("defaults", None)
    return raw


def keys(node: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in node.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def schema(group: str) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(RunConfig), resolve=False)
    return container[group]


def test_every_group_has_a_folder_and_a_default() -> None:
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(GROUPS)
    defaults = yaml.safe_load((CONFIGS / "base.yaml").read_text())["defaults"]
    assert defaults[-1] == "_self_"
    chosen = {group: name for entry in defaults[:-1] for group, name in entry.items()}
    assert set(chosen) == set(GROUPS)
    assert all((CONFIGS / group / f"{name}.yaml") in WHOLE for group, name in chosen.items())


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_keys_and_defaults_are_those_of_the_schema(path: Path) -> None:
    assert keys(read(path)) == keys(schema(path.parent.name))
    assert read(path) == schema(path.parent.name)


@pytest.mark.parametrize("kind", [kind for kind in DRAFTERS if kind != "dspark"])
def test_other_drafters_change_keys_of_dspark(kind: str) -> None:
    changed = read(CONFIGS / "drafter" / f"{kind}.yaml")
    assert keys(changed) < keys(schema("drafter"))
    assert changed["kind"] == kind


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_is_described_in_the_line_above_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if re.match(r'\s*"?\w+"?:', line):
            assert re.match(r"\s*# .*\w.*[.;)]$", above), f"{path}: {line!r} is not described"
