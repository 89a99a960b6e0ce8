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

WITHOUT_EXPORT = {"mtp"}  # kinds that no layout holds
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
    config = config_from(yaml.safe_load((out / "config.yaml").read_text()))
    exported = config.drafter.kind not in WITHOUT_EXPORT
    # the folder's contents are those that deepspec/training/run_folder.py lists
    assert {path.name for path in out.iterdir()} == {
        ".answers.jsonl.lock",
        ".lock",
        ".results.lock",
        *([".export.lock"] if exported else []),
        "answers.json",
        "answers.jsonl",
        "checkpoints",
        "config.yaml",
        *(["export"] if exported else []),
        "metrics.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "skipped.json",
        "traces.jsonl",
    }
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
    trained = load_drafter(best).state_dict()
    written = open_export(out / "export").load(target).state_dict() if exported else {}
    for key in written:
        assert written[key].equal(trained[key].bfloat16().float()), key
    # prompt lookup is in every report, on the prompts that were decoded plainly too
    for result in report.results:
        assert result.lookup is not None
        assert result.baseline is not None
        assert result.lookup.prompts == result.baseline.prompts
        assert result.lookup.drafter_accepted_length == result.accepted_length  # of one prompt
    assert "Prompt lookup (n-gram) reaches" in (out / "report.md").read_text()


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


def test_the_others_differ_from_tiny_in_the_drafter_alone() -> None:
    """And in the layers that are captured for it."""
    tiny = load_config("tiny")
    for kind, layers, size in (("eagle3", 3, 5), ("mtp", 1, 1)):
        other = load_config(f"tiny_{kind}")
        assert (other.drafter.kind, other.drafter.num_layers) == (kind, 1)
        assert (other.target.num_layer_ids, other.drafter.block_size) == (layers, size)
        assert (other.training, other.data, other.evaluation) == (
            tiny.training,
            tiny.data,
            tiny.evaluation,
        )
