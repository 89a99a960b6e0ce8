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
from deepspec.secrets import masked
from deepspec.training.decisive import changed

SECRET = 'hunter2\'s \\ "canary" \u00e9{}$'
# of one recipe: what stands there, what the config has, and what is written
CASES: dict[str, tuple[Any, Any, Any]] = {
    "description": ("${oc.env:A}", SECRET, "${oc.env:A}"),
    "tracking.project": (
        "key ${oc.env:A}, ${oc.env:B}; ${recipe}",
        f"key {SECRET}, 5; own",
        "key ${oc.env:A}, ${oc.env:B}; own",
    ),
    "regenerate.server_model": ("${oc.env:A,plain}", SECRET, "${oc.env:A,plain}"),
    "data.subset": (
        r"""${oc.env:NONE,"it's, ok}\\"}""",
        "it's, ok}\\",
        r"${oc.env:NONE,'it\'s, ok}\\'}",
    ),
    "target.revision": ("${oc.env:NONE,null}", None, "${oc.env:NONE,null}"),
    "data.system_prompt": ("x ${description}", f"x {SECRET}", "x ${oc.env:A}"),
    "drafter.init_from": (
        r"C:\\${oc.env:B} \${5} \${oc.env:A}",
        r"C:\5 ${5} ${oc.env:A}",
        r"C:\\${oc.env:B} ${5} \${oc.env:A}",
    ),
    "data.path": (
        ["a.jsonl", "${oc.env:A}/b.jsonl"],
        ["a.jsonl", f"{SECRET}/b.jsonl"],
        ["a.jsonl", "${oc.env:A}/b.jsonl"],
    ),
    "evaluation.benchmarks": ("${oc.env:A}", [SECRET], ["${oc.env:A}"]),
    "data.template_options": (
        {"key": "${oc.env:A}", "deep": ["${oc.decode:${oc.env:B}}"], "n": 1},
        {"key": SECRET, "deep": [5], "n": 1},
        {"key": "${oc.env:A}", "deep": ["${oc.decode:${oc.env:B}}"], "n": 1},
    ),
    "seed": ("${oc.env:B}", 5, "${oc.env:B}"),
    "regenerate.seed": ("${oc.decode:${oc.env:B}}", 5, "${oc.decode:${oc.env:B}}"),
    "evaluation.limit": ("${seed}", 5, "${oc.env:B}"),
    "data.limit": ("${oc.env:${oc.env:NAME}}", 5, "${oc.env:${oc.env:NAME}}"),
    "target.path": ("${deepspec:${oc.env:P}}", None, "${deepspec:${oc.env:P}}"),
    "out": ("~/${oc.env:B}", str(Path.home() / "5"), "~/${oc.env:B}"),
    "features.servers": (
        ["http://u:${oc.env:B}@h"],
        ["http://u:5@h"],
        ["http://u:${oc.env:B}@h"],
    ),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.secrets._hidden", {})  # other tests print what is hidden here
    for name, value in {"A": SECRET, "B": "5", "NAME": "B", "P": "data/tiny_target"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NONE", raising=False)


def load(folder: Path, text: str) -> RunConfig:
    path = folder / "own.yaml"
    path.write_text(f"defaults: [tiny, _self_]\n{text}\n", encoding="utf-8")
    return load_config(str(path))


def reread(config: RunConfig, *words: str) -> RunConfig:
    return config_from(yaml.safe_load(yaml.safe_dump(as_dict(config), allow_unicode=True)), words)


def test_names_are_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = {}
    for key, (text, _, _) in CASES.items():
        group, _, name = key.rpartition(".")
        (recipe.setdefault(group, {}) if group else recipe)[name] = text
    config = load(tmp_path, yaml.safe_dump(recipe, allow_unicode=True))
    written = as_dict(config)
    for key, (_, value, saved) in CASES.items():
        group, name = group_of(config, key)
        assert key == "target.path" or getattr(group, name) == value, key
        assert dotted(written)[key] == saved, key
    assert SECRET not in yaml.safe_dump(written, allow_unicode=True)
    assert reread(config) == config
    monkeypatch.setenv("A", "changed")
    later = reread(config)
    assert later.data.system_prompt == "x changed"
    assert as_dict(later) == written
    assert changed(as_dict(later), written) == {}


def test_a_changed_value_is_written_and_a_changed_group_keeps_names(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {system_prompt: '${oc.env:A}', limit: '${oc.env:B}'}")
    config = replace(config, data=replace(config.data, limit=7))
    assert as_dict(config)["data"]["limit"] == 7
    assert as_dict(config)["data"]["system_prompt"] == "${oc.env:A}"
    assert reread(config, "data.system_prompt=${oc.env:A}").data.system_prompt == "${oc.env:A}"


def test_a_missing_variable_is_missed_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "data: {system_prompt: '${oc.env:A}', limit: '${oc.env:B}'}\ntarget: {path: '${oc.env:A}'}"
    )
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
def test_errors_name_the_variable(text: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with pytest.raises(ConfigError, match=r"data\.system_prompt refers to the environment in"):
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


def test_what_is_hidden_from_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are; numbers are not, nor the folder that out= names."""
    monkeypatch.setenv("B", "1234567")
    monkeypatch.setenv("P", "/scratch/me")
    load(
        tmp_path,
        "seed: ${oc.env:B}\nout: ${oc.env:P}/run\n"
        "data: {system_prompt: '${oc.env:A}', path: '${oc.env:P}/a'}",
    )
    text = f"{SECRET} 1234567 /scratch/me/run"
    assert masked(text) == "${oc.env:A} 1234567 /scratch/me/run"
