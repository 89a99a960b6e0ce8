"""Recipes and words that are meant to break what reads them: one ConfigError, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deepspec.config.loading import load_config
from deepspec.config.values import read_value
from deepspec.errors import ConfigError
from deepspec.outputs import _keys
from deepspec.yaml_files import MAX_NODES, load_yaml, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], y{n}: 1}}\n" for n in range(1, 20)
)
HOSTILE = {
    "laughs": (LAUGHS, f"more than {MAX_NODES} values"),
    "merged": (MERGED, f"more than {MAX_NODES} values"),
    "deep flow": ("a: " + "[" * 100_000, "nested more than 100 levels deep"),
    "deep mappings": ("a: " + "{a: " * 100_000, "nested more than 100 levels deep"),
    "deep blocks": ("- " * 100_000, "nested more than 100 levels deep"),
    "long": ("a: " + "x" * 100_000_000, "100000003"),
    "many": ("[" + "a," * 400_000 + "]", f"more than {MAX_NODES} values"),
    "digits": ("a: " + "9" * 5000, "a number of more than 300 digits"),
    "hexadecimal": ("a: 0x" + "f" * 5000, "a number of more than 300 digits"),
    "itself": ("a: &a [*a]", "the alias *a leads to itself or to nothing"),
    "nothing": ("a: *a", "alias"),
    "no date": ("a: 2001-99-99", "month must be in 1..12"),
    "object": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "list as a key": ("? [a]\n: b", "found unhashable key"),
    "two documents": ("a: 1\n---\nb: 2", "but found another document"),
    "NUL": ("a: \0", "unacceptable character"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, words = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_yaml(text)
    assert words in str(error.value)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert _keys(recipe) == set()
    with pytest.raises(ConfigError, match=r"mine\.yaml: [^\n]+$"):
        load_config(str(recipe))
    if name != "long":  # an argument has at most 128 KiB
        with pytest.raises(ConfigError, match="is not readable: ") as refused:
            read_value("data.template_options={b: " + text + "}", typed=True)
        assert len(str(refused.value)) < 1000
    assert time.monotonic() - began < 10


def test_what_a_recipe_builds_on_is_held_to_the_same_limits(tmp_path: Path) -> None:
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "mine.yaml").write_text(LAUGHS)
    (tmp_path / "parent.yaml").write_text("defaults: [base, override drafter: mine, _self_]\n")
    (tmp_path / "child.yaml").write_text("defaults: [parent, _self_]\n")
    (tmp_path / "plain.yaml").write_text("defaults: [tiny, _self_]\n")
    for recipe, choices in (("parent", []), ("child", []), ("plain", ["drafter=mine"])):
        with pytest.raises(ConfigError, match=r"drafter/mine\.yaml: more than"):
            load_config(str(tmp_path / f"{recipe}.yaml"), choices)
    assert load_config(str(tmp_path / "plain.yaml")).recipe == "plain"


def test_aliases_of_moderate_size_are_read(tmp_path: Path) -> None:
    text = "a: &a {x: [1, 2]}\nb: [*a, *a]\nc: {<<: *a, y: 3}\n"
    expected = {"x": [1, 2]}
    assert load_yaml(text) == {"a": expected, "b": [expected] * 2, "c": {**expected, "y": 3}}
    (tmp_path / "a.yaml").write_text("a: Grüße\n", encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == {"a": "Grüße"}
