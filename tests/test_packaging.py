"""The wheel stands alone: built, unpacked somewhere else, and run from a third place."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from deepspec.config.loading import list_recipes
from deepspec.config.resources import resource

ROOT = Path(__file__).resolve().parents[1]
UNREACHABLE = ("No matching distribution found for hatchling", "Could not find a version")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents. Building it needs hatchling from a package index."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if built.returncode and any(words in built.stderr for words in UNREACHABLE):
        pytest.skip("the package index that has hatchling is not reachable")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("deepspec-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def from_wheel(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m deepspec` of the wheel, from a folder without a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "deepspec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_every_file_that_is_read_at_run_time_is_inside(unpacked: Path) -> None:
    bundled = unpacked / "deepspec" / "_bundled"
    for name in ("recipes", "configs", "data/prompts", "data/tiny_target"):
        for path in resource(name).rglob("*"):
            if path.suffix in (".yaml", ".jsonl", ".json", ".safetensors", ".jinja"):
                copy = bundled / name / path.relative_to(resource(name))
                assert copy.read_bytes() == path.read_bytes(), path
    for path in (ROOT / "deepspec").rglob("*"):
        if path.suffix in (".py", ".j2"):
            assert (unpacked / path.relative_to(ROOT)).is_file(), path


def test_nothing_else_is_inside(unpacked: Path) -> None:
    top = {path.name.partition("-")[0] for path in unpacked.iterdir()}
    assert top == {"deepspec"}  # the package and its dist-info
    names = {path.name for path in unpacked.rglob("*")}
    assert not names & {"tests", "conftest.py", "__pycache__", "runs", ".venv"}


def test_the_wheel_runs_elsewhere(unpacked: Path, tmp_path: Path) -> None:
    listed = from_wheel(unpacked, tmp_path, "recipes")
    assert listed.returncode == 0, listed.stderr
    assert all(f"{name} " in listed.stdout for name, _ in list_recipes())
    assert f"files: {unpacked}" in listed.stdout

    (tmp_path / "own.yaml").write_text("defaults: [tiny, _self_]\nseed: 5\n")
    for recipe, seed in (("tiny", 0), ("own.yaml", 5)):
        shown = from_wheel(unpacked, tmp_path, "train", f"recipe={recipe}", "--cfg")
        assert shown.returncode == 0, shown.stderr
        config = yaml.safe_load(shown.stdout)
        assert config["seed"] == seed
        for path in (config["target"]["path"], *config["data"]["path"]):
            assert Path(path).is_relative_to(unpacked)
            assert Path(path).exists()
