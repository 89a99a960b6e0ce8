"""Exports that are meant to break what reads them: one typed error, before anything is built."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from deepspec.checks.export import check_export
from deepspec.errors import CheckpointError
from deepspec.export import open_export, write_export
from deepspec.targets import Target
from tests.deepseek_v4 import load_v4, make_native, save_v4
from tests.export.conftest import make_drafter
from tests.export.test_eagle3 import make_eagle3

SIZES: dict[str, Any] = {
    "num_hidden_layers": 10**9,
    "block_size": 10**9,
    "dspark_block_size": 10**9,
    "speculative_tokens": 10**9,
    "head_dim": 10**9,
    "hidden_size": 10**12,
    "vocab_size": 10**15,
    "n_routed_experts": 10**9,
    "markov_rank": float("nan"),
    "rms_norm_eps": float("nan"),
    "rope_theta": float("inf"),
    "target_layer_ids": ["x"],
    "architectures": {"a": 1},
    "deepspec": [1],
    "identity": [1],
    "sha256": {"model.safetensors": [1]},
    "rope_parameters": {"rope_type": ["yarn"], "rope_theta": "x"},
}
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
RAW = {
    "deep": DEEP,
    "not UTF-8": b'{"a": "\xe1"}',
    "digits": b'{"num_hidden_layers": ' + b"9" * 5000 + b"}",
    "list": b"[]",
    "NUL": b"\0" * 1000,
}


def header(*tensors: tuple[str, str, list[int], list[int]], size: int | None = None) -> bytes:
    """A safetensors file of such a header, with 64 bytes of values."""
    named = {name: {"dtype": t, "shape": s, "data_offsets": o} for name, t, s, o in tensors}
    text = json.dumps(named).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(64)


WEIGHTS = {
    "overlap": header(("a", "BF16", [16], [0, 32]), ("b", "BF16", [16], [16, 48])),
    "beyond": header(("a", "BF16", [10**12], [0, 2 * 10**12])),
    "overflow": header(("a", "BF16", [2**62, 2**62], [0, 64])),
    "backwards": header(("a", "BF16", [16], [32, 0])),
    "unknown type": header(("a", "X7", [32], [0, 64])),
    "huge header": header(("a", "BF16", [32], [0, 64]), size=2**62),
    "deep header": (len(DEEP)).to_bytes(8, "little") + DEEP,
    "other tensors": header(("a", "F32", [16], [0, 64])),
    "empty": b"",
}
LAYOUTS = ["flat", "speculators", "eagle3", "flat_eagle3", "deepseek_v4"]


@pytest.fixture(scope="module")
def exports(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exports(layout)`: one that is whole, to be mended by who breaks it."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def export(layout: str) -> Path:
        if layout not in made:
            ends, kind, name = target, "dspark", layout
            if layout == "deepseek_v4":
                ends = load_v4(save_v4(folder / "v4"))
                drafter: Any = make_native(ends)
                kind = "dspark_v4"
            elif layout.endswith("eagle3"):
                kind, name = "eagle3", "flat" if layout == "flat_eagle3" else "speculators"
                drafter = make_eagle3(target, qk_norm=layout == "eagle3")
            else:
                drafter = make_drafter(target, "vanilla")
            made[layout] = folder / layout
            write_export(name, kind, drafter, ends, made[layout], "serving", 32, lambda *_: "card")
            assert check_export(made[layout]).fine
        return made[layout]

    return export


def places_of(value: Any, key: str) -> list[dict[str, Any]]:
    """Every object in `value` that has `key`."""
    if isinstance(value, list):
        return [found for part in value for found in places_of(part, key)]
    if not isinstance(value, dict):
        return []
    deeper = [found for part in value.values() for found in places_of(part, key)]
    return [value, *deeper] if key in value else deeper


def opened_whole(folder: Path) -> None:
    open_export(folder).load()


def assert_refused(folder: Path) -> str:
    began = time.monotonic()
    assert check_export(folder).faults
    with pytest.raises(CheckpointError) as error:
        opened_whole(folder)
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_held_to_limits(exports: Callable[[str], Path], layout: str) -> None:
    file = exports(layout) / "config.json"
    whole = file.read_text()
    tried = 0
    for key, value in SIZES.items():
        config = json.loads(whole)
        for holder in places_of(config, key)[:1]:
            holder[key] = value
            file.write_text(json.dumps(config))
            if isinstance(value, int | float):
                assert_refused(file.parent)
                tried += 1
                continue
            check_export(file.parent)
            with suppress(CheckpointError):  # layouts that do not read the key mind nothing
                opened_whole(file.parent)
        file.write_text(whole)
    assert tried >= 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_and_weights_that_are_none(exports: Callable[[str], Path], layout: str) -> None:
    folder = exports(layout)
    for name, broken in (("config.json", RAW), ("model.safetensors", WEIGHTS)):
        file = folder / name
        whole = file.read_bytes()
        for raw in broken.values():
            file.write_bytes(raw)
            assert str(folder) in assert_refused(folder)
        file.write_bytes(whole)


def test_as_many_layers_as_the_tensors_show(exports: Callable[[str], Path]) -> None:
    file = exports("flat") / "config.json"
    whole = file.read_text()
    file.write_text(json.dumps({**json.loads(whole), "num_hidden_layers": 4000}))
    assert "4000 layers, but" in assert_refused(file.parent)
    file.write_text(whole)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../../elsewhere/model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": 1}},
        {"weight_map": ["a"]},
        {"weight_map": {"a": "model.safetensors\0"}},
        {},
        [],
    ],
)
@pytest.mark.parametrize("layout", ["flat", "deepseek_v4"])
def test_an_index_names_files_beside_it(
    exports: Callable[[str], Path], layout: str, index: Any
) -> None:
    folder = exports(layout)
    file = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    file.write_text(json.dumps(index))
    single.rename(folder / "kept")  # else it goes before the index, as in Transformers
    try:
        assert_refused(folder)
    finally:
        file.unlink()
        (folder / "kept").rename(single)


def test_stages_are_counted_by_the_tensors_that_are_there(exports: Callable[[str], Path]) -> None:
    folder = exports("deepseek_v4")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for index in ("999", "9" * 5000):
        tensors = load_file(file)
        tensors[f"mtp.{index}.norm.weight"] = tensors["mtp.0.attn_norm.weight"].clone()
        save_file(tensors, file)
        assert_refused(folder)
        file.write_bytes(whole)
