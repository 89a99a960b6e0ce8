"""A target's own files that are damaged or hostile: a TargetError that names the file."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.targets import load_text_side
from deepspec.targets.files import WeightFiles

RAW = {
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"a": "\xe1"}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "half": b'{"a": ',
}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folder(target_folder: Path, tmp_path: Path) -> Path:
    """A copy of the target, to break."""
    return Path(shutil.copytree(target_folder, tmp_path / "target"))


def refused(folder: Path) -> str:
    began = time.monotonic()
    with pytest.raises(TargetError, match=r"^[^\n]+$") as error:
        load_text_side(TargetConfig(path=str(folder)))
    assert time.monotonic() - began < 10
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(folder: Path, name: str) -> None:
    for raw in RAW.values():
        (folder / name).write_bytes(raw)
        assert f"{folder / name} is damaged or unreadable" in refused(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"vocab_size": float("nan")}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"model_type": ["x"]}),
        ("generation_config.json", {"eos_token_id": ["x"]}),
        ("generation_config.json", {"eos_token_id": {"x": 1}}),
        ("tokenizer.json", {"model": ["x"]}),
        ("tokenizer.json", {"added_tokens": {"x": 1}}),
    ],
)
def test_wrong_values_are_refused(folder: Path, name: str, change: dict[str, Any]) -> None:
    file = folder / name
    whole = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(whole | change))
    message = refused(folder)
    assert str(file if change.keys() - {"hidden_size", "model_type"} else folder) in message


def test_a_broken_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(RAW["deep"])
    assert "adapter_config.json is damaged or unreadable" in refused(tmp_path)


def test_an_index_names_files_beside_it(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    with pytest.raises(TargetError, match=r"index\.json names '\.\./x', which is no file"):
        WeightFiles(TargetConfig(path=str(folder)))


def test_a_bad_gguf_is_named_by_its_own_path(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 100)
    message = refused(file)
    assert str(file) in message
    assert "/tmp/tmp" not in message
