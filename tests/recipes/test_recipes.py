"""Every recipe that this machine can run, from the command line: two steps, then a third."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deepspec.cli import main
from deepspec.config.loading import config_from, list_recipes, load_config
from deepspec.evaluation.results import read_report
from deepspec.export import open_export
from deepspec.targets import Target, load_target
from deepspec.training.checkpoint import best_checkpoint, list_checkpoints, load_drafter
from deepspec.training.metrics import read_metrics
from tests.recipes.small import STEPS, small, words, write_prompts

# these need a cluster and the hub: test_needs.py plans them
LARGE = {name for name, _ in list_recipes() if not name.startswith("tiny")}
RECIPES = [name for name, _ in list_recipes() if name not in LARGE]


@pytest.fixture(scope="module", params=RECIPES)
def run(
    request: pytest.FixtureRequest, target_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[str], Path]:
    """(recipe, the command's words, run folder) after two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = small(target_folder, write_prompts(folder / "prompts.jsonl"))
    out = folder / "run"
    command = ["train", f"recipe={request.param}", f"out={out}", *words(settings)]
    main(command)
    return request.param, command, out


@pytest.fixture
def target(target_folder: Path) -> Target:
    """Loaded as `small` asks for it."""
    config = load_config("tiny", [f"target.path={target_folder}", "target.num_layer_ids=2"])
    return load_target(config.target, "cpu")


def steps(out: Path) -> list[int]:
    return [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def test_leaves_what_it_promises(run: tuple[str, list[str], Path], target: Target) -> None:
    name, command, out = run
    # the folder's contents are those that deepspec/training/run_folder.py lists
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "answers.json",
        "answers.jsonl",
        "checkpoints",
        "config.yaml",
        "export",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "skipped.json",
        "traces.jsonl",
    }
    config = config_from(yaml.safe_load((out / "config.yaml").read_text()))
    assert config == load_config(name, command[2:])
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {row["id"] for row in answers} == {f"p{i}" for i in range(8)}
    assert all(row["messages"][-1]["role"] == "assistant" for row in answers)
    assert steps(out) == [1, STEPS]
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == [
        "step-00000001",
        "step-00000002",
    ]
    rounds = len((out / "traces.jsonl").read_text().splitlines())
    report = read_report(out / "report.json")
    assert sum(result.rounds for result in report.results) == rounds > 0
    assert all(result.baseline.unexplained == 0 for result in report.results if result.baseline)
    assert report.title == name in (out / "report.html").read_text()

    best = best_checkpoint(out / "checkpoints")
    assert best.kind == report.drafter["kind"] == config.drafter.kind
    trained, exported = load_drafter(best), open_export(out / "export").load(target)
    for key, value in trained.state_dict().items():
        assert exported.state_dict()[key].equal(value.bfloat16().float()), key


def test_goes_on_to_a_third_step(
    run: tuple[str, list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, command, out = run
    answers = (out / "answers.jsonl").read_bytes()
    second = out / "checkpoints" / f"step-{STEPS:08d}"
    main([*command, f"training.max_steps={STEPS + 1}", f"training.resume={second}"])
    assert f"going on from {second}" in capsys.readouterr().err
    assert steps(out) == [1, STEPS, STEPS + 1]
    assert (out / "answers.jsonl").read_bytes() == answers
    best, report = best_checkpoint(out / "checkpoints"), read_report(out / "report.json")
    assert report.drafter["step"] == report.training[-1]["step"] == best.step


def test_dflash_is_tiny_without_its_heads() -> None:
    tiny, dflash = load_config("tiny"), load_config("tiny_dflash")
    assert dflash.drafter.kind == "dflash"
    assert dflash.drafter.markov_rank == 0
    assert not dflash.drafter.confidence_head
    assert (dflash.training, dflash.data, dflash.target) == (tiny.training, tiny.data, tiny.target)
