"""The commands with drafters that have nothing to train, or no layout to go into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepspec.cli import main
from deepspec.evaluation.results import read_report
from tests.recipes.small import small, words, write_prompts

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def settings(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return small(target_folder, write_prompts(folder / "prompts.jsonl"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def call(*command: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return call


def test_lookup_is_evaluated_without_a_run(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = words(settings | {"evaluation.limit": "3", "decoding.max_new_tokens": "24"})
    command = ["evaluate", "recipe=tiny", "drafter=ngram", f"out={tmp_path}", *own]
    main([*command, "drafter.ngram_max=2"])
    assert "Lossless at temperature 0." in capsys.readouterr().out
    report = read_report(tmp_path / "report.json")
    assert report.drafter == {
        "kind": "ngram",
        "parameters": 0,
        "source": None,
        "step": None,
        "shape": {"block_size": 5, "longest": 2, "shortest": 1},
    }
    (result,) = report.results
    assert result.lookup is None  # it is its own reference
    assert result.accepted_length > 1
    rounds = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert all(row["scheduled"] <= row["proposed"] <= 5 for row in rounds)
    assert any(row["proposed"] < 5 for row in rounds)


def test_the_reference_can_be_left_out(settings: dict[str, str], tmp_path: Path) -> None:
    """And needs the prompts that plain decoding runs."""
    run = tmp_path / "run"
    train = ["train", "recipe=tiny_mtp", f"out={run}", *words(settings)]
    main([*train, "evaluation.enabled=false"])
    for change in ("evaluation.ngram=false", "evaluation.baseline_prompts=0"):
        main(["evaluate", f"run={run}", f"out={tmp_path / 'report'}", change])
        (result,) = read_report(tmp_path / "report" / "report.json").results
        assert result.lookup is None
        assert "Prompt lookup" not in (tmp_path / "report" / "report.md").read_text()


def test_there_is_nothing_to_train(refused: Refused, settings: dict[str, str]) -> None:
    for command in ("train", "plan"):
        message = refused(command, "recipe=tiny", "drafter=ngram", *words(settings))
        assert "drafter.kind=ngram needs no training" in message
        assert "deepspec evaluate recipe=tiny drafter.kind=ngram" in message


def test_what_has_to_be_trained_is_not_evaluated_by_its_recipe(refused: Refused) -> None:
    message = refused("evaluate", "recipe=tiny_eagle3")
    assert "drafter.kind=eagle3, which has to be trained first" in message
    assert "run=DIR and checkpoint=DIR" in message


def test_layers_of_an_autoregressive_drafter(refused: Refused, tmp_path: Path) -> None:
    own = ["drafter.kind=eagle3", "export.format=speculators"]
    message = refused("train", "recipe=tiny", *own, f"out={tmp_path}")
    assert "drafter.num_layers=2, but drafter.kind=eagle3 is one decoder layer" in message
    assert not (tmp_path / "answers.jsonl").exists()  # said before the work


def test_training_without_a_layout_says_so(
    settings: dict[str, str],
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    main(["train", "recipe=tiny_mtp", f"out={run}", *words(settings)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "export: none: no layout holds a drafter.kind=mtp" in shown
    assert not (run / "export").exists()
    message = refused("export", f"checkpoint={run}", f"out={tmp_path / 'export'}")
    assert (
        "export.format=flat cannot hold this drafter: it holds no mtp drafters; no layout can"
        in message
    )
    assert not (tmp_path / "export").exists()
