"""Values from the environment: the config has them, and whatever is written has their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepspec.config.loading import config_from, load_config
from deepspec.config.schema import RunConfig, as_dict, dotted, group_of
from deepspec.errors import ConfigError
from deepspec.training.decisive import changed

SECRET = "hunter2's \\ \"canary\" \u00e9{}$"
CASES: list[tuple[str, str, Any, Any]] = [
    ("data: {system_prompt: '${oc.env:A}'}", "data.system_prompt", SECRET, "${oc.env:A}"),
    (
        "data: {system_prompt: 'key ${oc.env:A}, ${oc.env:B}; ${seed}'}",
        "data.system_prompt",
        f"key {SECRET}, 5; 0",
        "key ${oc.env:A}, ${oc.env:B}; 0",
    ),
    ("data: {system_prompt: '${oc.env:A,plain}'}", "data.system_prompt", SECRET, "${oc.env:A,plain}"),
    (
        "data: {system_prompt: '${oc.env:NONE,\"it''s, ok}\\\\\"}'}",
        "data.system_prompt",
        "it's, ok}\\",
        "${oc.env:NONE,'it\\'s, ok}\\\\'}",
    ),
    ("data: {system_prompt: '${oc.env:NONE,null}'}", "data.system_prompt", None, "${oc.env:NONE,null}"),
    ("data: {system_prompt: '${tracking.project}'}\ntracking: {project: 'x ${oc.env:A}'}",
     "data.system_prompt", f"x {SECRET}", "x ${oc.env:A}"),
    ("data: {system_prompt: 'C:\\\\${oc.env:B} \\${5} \\${oc.env:A}'}",
     "data.system_prompt", "C:\\5 ${5} ${oc.env:A}", "C:\\\\${oc.env:B} ${5} \\${oc.env:A}"),
    ("data: {path: [a.jsonl, '${oc.env:A}/b.jsonl']}", "data.path",
     ["a.jsonl", f"{SECRET}/b.jsonl"], ["a.jsonl", "${oc.env:A}/b.jsonl"]),
    ("data: {path: '${oc.env:A}'}", "data.path", [SECRET], ["${oc.env:A}"]),
    ("data: {template_options: {key: '${oc.env:A}', deep: ['${oc.decode:${oc.env:B}}'], n: 1}}",
     "data.template_options", {"key": SECRET, "deep": [5], "n": 1},
     {"key": "${oc.env:A}", "deep": ["${oc.decode:${oc.env:B}}"], "n": 1}),
    ("seed: ${oc.env:B}", "seed", 5, "${oc.env:B}"),
    ("seed: ${oc.decode:${oc.env:B}}", "seed", 5, "${oc.decode:${oc.env:B}}"),
    ("data: {limit: '${oc.env:${oc.env:NAME}}'}", "data.limit", 5, "${oc.env:${oc.env:NAME}}"),
    ("target: {path: '${deepspec:${oc.env:P}}'}", "target.path", None, "${deepspec:${oc.env:P}}"),
    ("out: ~/${oc.env:B}", "out", str(Path.home() / "5"), "~/${oc.env:B}"),
    ("features: {servers: ['http://u:${oc.env:B}@h']}", "features.servers", ["http://u:5@h"],
     ["http://u:${oc.env:B}@h"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A": SECRET, "B": "5", "NAME": "B", "P": "data/tiny_target"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NONE", raising=False)


def load(folder: Path, text: str) -> RunConfig:
    path = folder / "own.yaml"
    path.write_text(f"defaults: [tiny, _self_]\n{text}\n", encoding="utf-8")
    return load_config(str(path))


def reread(config: RunConfig, *words: str) -> RunConfig:
    return config_from(yaml.safe_load(yaml.safe_dump(as_dict(config), allow_unicode=True)), words)


@pytest.mark.parametrize(("text", "key", "value", "written"), CASES)
def test_the_name_is_written_and_read_again(
    text: str, key: str, value: Any, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(tmp_path, text)
    group, name = group_of(config, key)
    assert value is None or getattr(group, name) == value
    assert dotted(as_dict(config))[key] == written
    assert SECRET not in yaml.safe_dump(as_dict(config), allow_unicode=True)
    assert reread(config) == config
    monkeypatch.setenv("A", "changed")
    later = reread(config)
    assert as_dict(later) == as_dict(config)
    assert changed(as_dict(later), as_dict(config)) == {}


def test_a_changed_value_is_written_and_a_changed_group_keeps_names(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {system_prompt: '${oc.env:A}', limit: '${oc.env:B}'}")
    config = replace(config, data=replace(config.data, limit=7))
    assert as_dict(config)["data"]["limit"] == 7
    assert as_dict(config)["data"]["system_prompt"] == "${oc.env:A}"
    assert reread(config, "data.system_prompt=${oc.env:A}").data.system_prompt == "${oc.env:A}"


def test_a_missing_variable_is_missed_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "data: {system_prompt: '${oc.env:A}', limit: '${oc.env:B}'}\ntarget: {path: '${oc.env:A}'}"
    config = load(tmp_path, text)
    monkeypatch.delenv("A")
    monkeypatch.delenv("B")
    found = reread(config)
    assert as_dict(found) == as_dict(config)
    assert found.data.split == config.data.split
    for key in ("data.system_prompt", "data.limit", "target.path"):
        group, name = key.split(".")
        with pytest.raises(ConfigError, match=f"{key} comes from the environment variable [AB], "):
            getattr(getattr(found, group), name)
    given = reread(config, "data.system_prompt=x", "data.limit=3")
    assert (given.data.system_prompt, given.data.limit) == ("x", 3)
    with pytest.raises(ConfigError, match="the environment variable A is not set"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "seed: ${oc.env:A}",
        "data: {date: '${oc.env:A}'}",
        "drafter: {kind: '${oc.env:A}'}",
        "target: {layer_ids: ['${oc.env:A}']}",
        "regenerate: {api_key_env: '${oc.env:A}'}",
        "seed: ${oc.decode:${oc.env:A}}",
    ],
)
@pytest.mark.parametrize("value", ["pin", "[not yaml"])
def test_errors_name_the_variable(
    text: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A", value)
    raw = {"recipe": "r", "target": {"path": "t"}, "data": {"path": ["d"]}}
    for group, keys in yaml.safe_load(text).items():
        raw[group] = {**raw.get(group, {}), **keys} if isinstance(keys, dict) else keys
    with pytest.raises(ConfigError) as error:
        config_from(raw)
    assert value not in str(error.value)


def test_what_cannot_be_kept_by_name_is_refused(tmp_path: Path) -> None:
    text = "data: {system_prompt: '${oc.select:${oc.env:NAME2},none}'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAME2", "seed")
        with pytest.raises(ConfigError, match="data.system_prompt refers to the environment in a"):
            load(tmp_path, text)


def test_passwords_in_urls_are_not_written(tmp_path: Path) -> None:
    text = """\
features: {servers: ['http://me:sesame1@h:1', 'http://token99@h', 'http://h:2/v1?key=sesame2']}
regenerate: {server: 'https://me:sesame3@h/v1'}"""
    config = load(tmp_path, text)
    written = as_dict(config)
    assert written["features"]["servers"] == [
        "http://me:***@h:1", "http://***@h", "http://h:2/v1?key=***",
    ]  # fmt: skip
    assert written["regenerate"]["server"] == "https://me:***@h/v1"
    assert changed(written, as_dict(reread(config))) == {}
    assert config.features.servers[0] == "http://me:sesame1@h:1"
    with pytest.raises(ConfigError, match=r"write the signs / \? # of its password") as error:
        load(tmp_path, "features: {servers: ['http://me:ses/ame@h']}")
    assert "ame" not in str(error.value).partition("of its")[0].replace("name", "")
