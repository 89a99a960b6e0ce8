"""A damaged checkpoint: one typed error, which resuming and the choice of the best pass over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.atomic import sha256
from deepspec.errors import CheckpointError
from deepspec.training.checkpoint import (
    DESCRIPTION,
    WEIGHTS,
    best_checkpoint,
    load_drafter,
    read_checkpoint,
    step_folder,
)
from deepspec.training.resume import _sound
from deepspec.training.trainer import Trainer
from tests.trainers import MakeTrainer

RAW = {
    "high bit": b'{"format": 1, "kind": "\xe1"}',
    "deep nesting": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"format": ' + b"9" * 5000 + b"}",
    "empty": b"",
    "list": b"[]",
}
# what stands in the description instead, and the words that name it
CHANGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "metrics": (lambda raw: raw["metrics"].update(validation_accept_length="x"), "metrics"),
    "sha256": (lambda raw: raw.update(sha256={WEIGHTS: 3}), "sha256"),
    "step": (lambda raw: raw.update(step=7), "found 7 in the folder of another step"),
    "huge step": (lambda raw: raw.update(step=10**12), "step"),
    "no kind": (lambda raw: raw.pop("kind"), "kind: Field required"),
}
SHAPES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "cleared": (lambda shape: shape.clear(), "hidden_size: Field required"),
    "huge": (lambda shape: shape.update(hidden_size=10**12), "hidden_size is 1000000000000"),
    "layers": (lambda shape: shape.update(num_layers=10**9), "num_layers is 1000000000"),
    "block": (lambda shape: shape.update(block_size=10**9), "block_size is 1000000000"),
    "none": (lambda shape: shape.update(block_size=0), "block_size is 0, expected 1 or more"),
    "nan": (lambda shape: shape.update(rms_norm_eps=float("nan")), "expected a finite number"),
    "text": (lambda shape: shape.update(num_layers="2"), "num_layers: .* integer, found '2'"),
    "other": (lambda shape: shape.update(what=1), r"unexpected keys \['what'\]"),
    "another size": (lambda shape: shape.update(hidden_size=2**24), "has shape"),
}


@pytest.fixture
def checkpoints(make_trainer: MakeTrainer) -> Path:
    """Those of a run of two steps, each saved."""
    trainer: Trainer = make_trainer("run", "training.max_steps=2", "training.save_every=1")
    trainer.train()
    return trainer.folder.checkpoints


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / DESCRIPTION).read_text())
    change(raw)
    (folder / DESCRIPTION).write_text(json.dumps(raw))


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_json_is_a_checkpoint_error(name: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_bytes(RAW[name])
    with pytest.raises(CheckpointError, match="damaged or unreadable"):
        read_checkpoint(tmp_path)


def test_damaged_ones_are_passed_over(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, words in CHANGED.values():
        copy = Path(shutil.copytree(checkpoints, tmp_path / "copy"))
        edit(step_folder(copy, 2), change)
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(step_folder(copy, 2))
        assert best_checkpoint(copy).step == 1
        assert [each.step for each in _sound(copy)] == [1]
        assert capsys.readouterr().err.count("passed over: ") == 2
        shutil.rmtree(copy)


def test_shapes_that_do_not_fit_are_named(checkpoints: Path) -> None:
    folder = step_folder(checkpoints, 2)
    whole = (folder / DESCRIPTION).read_bytes()
    for change, words in SHAPES.values():
        edit(folder, lambda raw, change=change: change(raw["shape"]))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=words) as caught:
            load_drafter(read_checkpoint(folder))
        assert DESCRIPTION in str(caught.value)
        (folder / DESCRIPTION).write_bytes(whole)
    assert load_drafter(read_checkpoint(folder))


def test_tensors_that_do_not_fit_are_named(checkpoints: Path) -> None:
    folder = step_folder(checkpoints, 2)
    for change, words in (
        (lambda tensors: tensors.popitem(), "has shape None, expected"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more has shape .*, expected None"),
    ):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        digest = sha256(folder / WEIGHTS)
        edit(folder, lambda raw, digest=digest: raw["sha256"].update({WEIGHTS: digest}))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=words):
            load_drafter(read_checkpoint(folder))
