"""The line that a command ends with, what to do next, is one that a shell runs."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from deepspec.cli import main
from deepspec.commands.settings import recipe_config


def words_behind_next(capsys: pytest.CaptureFixture[str]) -> list[str]:
    *_, line = capsys.readouterr().out.splitlines()
    label, program, *words = shlex.split(line)
    assert (label, program) == ("next:", "deepspec")
    return words


def test_of_own_recipes_and_overrides(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copy(recipe, tmp_path / "my rec=1.yaml")
    given = [f"recipe={own}", "target.num_layer_ids=2", "data.limit=4", "data.fields.id=key"]
    answers = tmp_path / "my answers.jsonl"
    main(["regenerate", *given, "regenerate.max_new_tokens=8", f"out={answers}"])
    command, *words = words_behind_next(capsys)
    config = recipe_config(words)
    assert command == "train"
    assert (config.recipe, config.target.num_layer_ids) == ("my rec=1", 2)
    assert (config.data.path, config.data.limit) == ([str(answers)], None)  # limit: of prompts
    assert config.data.fields.id[0] == "id"
    assert not config.regenerate.enabled

    main(["extract", *words, "features=online", f"out={tmp_path / 'my store'}"])
    run = tmp_path / "my run"
    main([*words_behind_next(capsys), "training.max_steps=1", f"out={run}"])
    assert words_behind_next(capsys) == ["evaluate", f"run={run}", "decoding.batch_size=8"]
