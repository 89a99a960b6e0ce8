"""What the head of a large recipe says it needs is what `deepspec plan` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepspec.cli import main
from deepspec.config.loading import load_config, recipe_path
from tests.recipes.shapes import SHAPES, stand_in
from tests.recipes.test_recipes import LARGE

ROWS = {
    "memory a GPU": r"([\d.]+ \w+) of each taken",
    "a checkpoint": r"([\d.]+ \w+) a checkpoint",
    "stored features, bfloat16": r"([\d.]+ \w+) of disk for features=stored in bfloat16",
    "stored features, float8": r"([\d.]+ \w+) in float8",
    "training": r"([\d.]+ hours) at 400 TFLOP/s a GPU",
}
NAMES = sorted(LARGE - {"deepseek_v4"})  # another name for deepseek_v4_flash


@pytest.mark.parametrize("name", NAMES)
def test_needs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = re.sub(r"\n# ?", " ", recipe_path(name).read_text().split("\ndescription:")[0])
    command = re.search(r"`deepspec (plan [^`]+)`", head)
    assert command is not None
    assert f"recipe={name} " in command[1]
    target = load_config(name).target.path
    assert target in SHAPES
    main([*command[1].split(), f"target.path={stand_in(target, tmp_path)}"])
    shown = capsys.readouterr().out
    for row, stated in ROWS.items():
        said = re.search(stated, head)
        assert said is not None, row
        assert re.search(rf"{row} +{re.escape(said[1])}", shown), (row, said[1], shown)
    assert "on a device of" not in shown  # it fits
