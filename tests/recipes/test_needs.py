"""What the head of a large recipe says it needs is what `deepspec plan` says, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from deepspec.cli import main
from deepspec.config.loading import recipe_path
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
def test_needs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    head = re.sub(r"\n# ?", " ", recipe_path(name).read_text().split("\ndescription:")[0])
    command = re.search(r"`deepspec (plan [^`]+)`", head)
    assert command is not None
    assert f"recipe={name} " in command[1]
    main(command[1].split())
    shown = capsys.readouterr().out
    assert "shape: shipped with the recipes: offline (HF_HUB_OFFLINE)" in shown
    for row, stated in ROWS.items():
        said = re.search(stated, head)
        assert said is not None, row
        assert re.search(rf"{row} +{re.escape(said[1])}", shown), (row, said[1], shown)
    assert "on a device of" not in shown  # it fits
