"""`deepspec check`: a table of what holds, and exit codes that a script can go by."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec.checks.decoding import DecodingCheck
from deepspec.checks.target import check_texts
from deepspec.cli import main
from deepspec.targets import Target
from deepspec.targets.families import Family


def test_a_target_of_which_everything_holds(
    target_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", f"target={target_folder}", "target.num_layer_ids=3", "engine.device=cpu"])
    shown = capsys.readouterr().out
    assert shown.endswith("all checks hold\n")
    for what in ("captured features", "logits", "a training step", "rollback", "rows"):
        assert what in shown
    assert "fails" not in shown


def test_what_does_not_hold_is_said_and_exits_with_1(
    target_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "soft_cap", lambda self, config: 1.0)
    with pytest.raises(SystemExit) as end:
        main(["check", f"target={target_folder}", "target.num_layer_ids=3", "engine.device=cpu"])
    assert end.value.code == 1
    output = capsys.readouterr()
    assert "logits: does not hold" in output.err
    assert "fails" in output.out
    assert output.out.splitlines()[-1].endswith("do not hold")


def test_each_result_is_printed_when_it_is_there(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    decoding = DecodingCheck(target, check_texts(target), 3)
    for finding in decoding.findings():
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{finding.what}: holds (")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give exactly one of target=..."),
        (["./model"], "did you mean target=./model?"),
        (["target={folder}", "recipe=tiny"], "recipe has no part in a check of a target"),
        (["target={folder}", "training.epochs=2"], "training.epochs has no part"),
        (["target={folder}", "target.rollback=crop"], "target.rollback=crop must be one of auto"),
        (["target={folder}"], "target.num_layer_ids=5 does not fit a target of 6 layers"),
        (["target=./nowhere"], "no config.json there"),
    ],
)
def test_mistakes_exit_with_2(
    words: list[str], expected: str, target_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", *(word.format(folder=target_folder) for word in words)])
    assert end.value.code == 2
    assert expected in capsys.readouterr().err
