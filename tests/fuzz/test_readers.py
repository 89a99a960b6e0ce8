"""Readers return or raise a DeepSpecError, whatever they are given.

FUZZ_SECONDS: how long each reader is fed; FUZZ_SEED: which inputs are drawn.
"""

from __future__ import annotations

import json
import os
from copy import copy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from starlette.exceptions import HTTPException
from transformers import AutoTokenizer

from deepspec.config.loading import load_config
from deepspec.config.resources import resource
from deepspec.data import rendering
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.data.files import read_rows
from deepspec.errors import DeepSpecError
from deepspec.export.files import read_config, read_headers
from deepspec.export.layouts import open_export, write_export
from deepspec.features.server import FeatureServer
from deepspec.features.store_index import UNPROTECTED, StoreHeader, read_header, read_index
from deepspec.json_files import parse_json
from deepspec.targets import Target
from deepspec.training.checkpoint import DESCRIPTION, FORMAT, read_checkpoint
from tests.conftest import CALLING, MARKED
from tests.export.conftest import make_drafter
from tests.fuzz.harness import Reader, failures

SEED = int(os.environ.get("FUZZ_SEED", "1"))
QUICK = 1.0
SLOW = float(os.environ.get("FUZZ_SECONDS", "600"))
RECIPE = Path("recipes/tiny.yaml").resolve()
TENSORS = save({"input_ids": torch.arange(6), "lengths": torch.tensor([2, 4])})
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
HOSTILE = (b"{% for a in range(9999) %}x{% endfor %}", b"{{ 'x' * 10 ** 8 }}{{ 9 ** 9 }}")
STORE = StoreHeader("a", {"weights": "b"}, [1, 2], 8, "bfloat16", 1, "c")


def ours(error: Exception) -> bool:
    return isinstance(error, DeepSpecError)


def _file(folder: Path, name: str, raw: bytes) -> Path:
    (folder / name).write_bytes(raw)
    return folder / name


def _wanted(_: Path, raw: bytes) -> object:
    server = SimpleNamespace(
        _target=SimpleNamespace(vocab_size=100), _config=SimpleNamespace(max_tokens=1000)
    )
    return FeatureServer._wanted(server, raw)  # type: ignore[arg-type]


def _words(_: Path, raw: bytes) -> object:
    return load_config("tiny", raw.decode("utf-8", "replace").split("\n"))


def _recipe(folder: Path, raw: bytes) -> object:
    return load_config(str(_file(folder, "r.yaml", raw)))


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(resource("data/tiny_target")))


def _template(_: Path, raw: bytes) -> object:
    rendering.SECONDS = 0.5  # of the forked process alone
    tokenizer = copy(_tokenizer())
    tokenizer.chat_template = raw.decode("utf-8", "replace") or " "
    rows = [Conversation(id="a", messages=tuple(MESSAGES))]
    return encode_all(rows, ChatEncoder(tokenizer, 64), SkipCounts())


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


CHECKPOINT = {
    **{"format": FORMAT, "step": 1, "kind": "dspark", "shape": {}, "identity": {}, "target": ""},
    **{"config": {}, "metrics": {"a": 0.5}, "sha256": {"a": "b"}, "places": {}},
}


READERS = {
    "json": Reader(
        lambda _, raw: parse_json(raw), [_json(MESSAGES)], lambda e: isinstance(e, ValueError)
    ),
    "rows": Reader(
        lambda folder, raw: list(read_rows(_file(folder, "a.jsonl", raw))),
        [_json({"id": "a", "messages": MESSAGES}) + b"\n"],
        ours,
    ),
    "checkpoint": Reader(
        lambda folder, raw: read_checkpoint(_file(folder, DESCRIPTION, raw).parent),
        [_json(CHECKPOINT)],
        ours,
    ),
    "store": Reader(
        lambda folder, raw: read_header(_file(folder, "store.json", raw).parent),
        [_json({"format": UNPROTECTED, **asdict(STORE)})],
        ours,
    ),
    "index": Reader(
        lambda folder, raw: read_index(_file(folder, "0.json", raw), STORE),
        [_json({"sha256": "a", "samples": [{"id": "a", "length": 3, "digest": "b"}]})],
        ours,
    ),
    "export config": Reader(
        lambda folder, raw: read_config(_file(folder, "config.json", raw).parent),
        [_json({"architectures": ["A"], "deepspec": {"format": 1}})],
        ours,
    ),
    "headers": Reader(
        lambda folder, raw: read_headers(_file(folder, "model.safetensors", raw).parent),
        [TENSORS],
        ours,
    ),
    "requests": Reader(
        _wanted, [TENSORS], lambda e: isinstance(e, HTTPException) and 400 <= e.status_code < 500
    ),
    "recipes": Reader(_recipe, [RECIPE.read_bytes()], ours),
    "templates": Reader(_template, [MARKED.encode(), CALLING.encode(), *HOSTILE], ours),
    "words": Reader(_words, [b"data.limit=3\nseed=1", b"data={limit: 3}", b"out=[a, b]"], ours),
}


def _hold(name: str, folder: Path, seconds: float) -> None:
    found = failures(READERS[name], folder, SEED, seconds)
    again = f"again: FUZZ_SEED={SEED} FUZZ_SECONDS={seconds:g} pytest tests/fuzz -k '{name}'"
    assert not found, "\n".join([*found, again])


@pytest.mark.parametrize("name", READERS)
def test_damaged_input_is_refused(name: str, tmp_path: Path) -> None:
    _hold(name, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_damaged_input_is_refused_for_long(name: str, tmp_path: Path) -> None:
    _hold(name, tmp_path, SLOW)


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_damaged_configs_of_exports_are_refused(
    layout: str, target: Target, tmp_path: Path
) -> None:
    drafter, out = make_drafter(target, "vanilla"), tmp_path / "export"
    write_export(layout, "dspark", drafter, target, out, "full", 32, lambda *_: "a card\n")
    valid = [(out / "config.json").read_bytes()]
    reader = Reader(lambda _, raw: open_export(_file(out, "config.json", raw).parent), valid, ours)
    found = failures(reader, tmp_path, SEED, QUICK)
    assert not found, "\n".join(found)
