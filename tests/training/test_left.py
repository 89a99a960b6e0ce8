"""A training leaves nothing of itself in memory to the evaluation that follows in its process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import Forked, succeed
from tests.jobs import HAVE_DEEPSPEED
from tests.recipes.small import small, words, write_prompts
from tests.training.left_job import run

KINDS = ["single", *(["zero2", "zero3"] if HAVE_DEEPSPEED else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_for_the_evaluation(kind: str, target_folder: Path, tmp_path: Path) -> None:
    """Neither weights in fp32, gradients and moments, nor DeepSpeed's buffers: in one process, the
    tensors beside the target and the drafter take less than the drafter alone."""
    settings = small(target_folder, write_prompts(tmp_path / "prompts.jsonl"))
    notes = tmp_path / "notes.json"
    given = [str(notes), "train", "recipe=tiny", f"out={tmp_path / 'run'}"]
    succeed(Forked(run, [*given, *words(settings), f"engine={kind}"]), within=240)
    found = json.loads(notes.read_text())
    assert found["left"] == []
    assert found["bytes"] < found["weights"], found
