"""`deepspec calibrate` and `deepspec profile`, and evaluation on what they leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepspec.cli import main
from deepspec.decoding import kv_cache
from deepspec.scheduling.calibration import Scaling, calibrated, survival
from deepspec.scheduling.calibration_file import (
    NAME,
    Calibration,
    Fit,
    read_calibration,
    weights_digest,
)
from deepspec.scheduling.throughput import read_throughput
from deepspec.training.checkpoint import best_checkpoint
from tests.recipes.small import small, words, write_prompts

HELD_OUT = 6
Refused = Callable[..., str]


def train(target_folder: Path, folder: Path, *changes: str) -> Path:
    prompts = write_prompts(folder / "prompts.jsonl")
    settings = words(small(target_folder, prompts))
    quick = ["evaluation.enabled=false", "training.max_steps=1", *changes]
    main(["train", "recipe=tiny", f"out={folder / 'run'}", *settings, *quick])
    return folder / "run"


@pytest.fixture(scope="module")
def trained(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(target_folder, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to write in."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "new.jsonl"
    rows = ({"id": f"h{i}", "turns": [f"Tell of {i}."]} for i in range(HELD_OUT))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """The one error message of a command."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1
        return errors[0]

    return call


def calibrate(place: str, held_out: Path, out: Path, *changes: str) -> None:
    every = ["evaluation.limit=null", "evaluation.temperatures=[0,1]", "decoding.batch_size=3"]
    main(["calibrate", place, f"prompts=[{held_out}]", f"out={out}", *every, *changes])


def evaluate(place: str, held_out: Path, out: Path, *changes: str) -> list[dict]:
    """The traces."""
    common = [f"evaluation.benchmarks=[{held_out}]", "evaluation.limit=null", f"out={out}"]
    main(["evaluate", place, *common, "decoding.batch_size=3", *changes])
    return [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]


def expected_lengths(traces: list[dict], scaling: Scaling | None, least: float) -> list[int]:
    """Of scheduler=threshold, by the raw confidences of the traces and what was left to emit."""
    left: dict[tuple[float, str], int] = {}
    lengths = []
    for trace in traces:
        key = (trace["temperature"], trace["request"])
        remaining = left.setdefault(key, 8 - 1)
        left[key] -= trace["emitted"]
        chances = survival(calibrated(np.array(trace["confidences"]), scaling))
        limit = min(trace["proposed"], remaining - 1)
        lengths.append(min(limit, int((chances >= least).sum())))
    return lengths


@pytest.mark.parametrize(("method", "raw"), [("sts", True), ("platt", False)])
def test_fitted_saved_and_used(
    run: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    raw: bool,
) -> None:
    """`raw`: whether to decode by raw confidences too."""
    calibrate(f"run={run}", held_out, tmp_path / "report", f"method={method}")
    said = capsys.readouterr().out
    assert "Decoding at temperature 1: on held-out prompts the calibration error" in said
    best = best_checkpoint(run / "checkpoints").folder
    calibration = read_calibration(best)
    assert calibration is not None
    assert calibration == read_calibration_of(tmp_path / "report", best)
    assert {(fit.method, fit.checked) for fit in calibration.fits} == {(method, True)}
    assert [fit.temperature for fit in calibration.fits] == [0.0, 1.0]
    for fit in calibration.fits:
        assert len(fit.scaling.temperatures) == 5
        assert {name: half.prompts for name, half in fit.halves.items()} == {
            "fit": HELD_OUT // 2,
            "held_out": HELD_OUT // 2,
        }
        for half in fit.halves.values():
            assert [each.position for each in half.after] == [1, 2, 3, 4, 5]
            assert half.before[0].samples <= half.rounds
    table = (tmp_path / "report" / "calibration.md").read_text()
    assert f"{calibration.fits[0].halves['held_out'].after[0].ece:.1%}" in table
    page = (tmp_path / "report" / "calibration.html").read_text()
    assert page.count("<svg") == 4

    least = 0.3
    used = [f"decoding.threshold={least}", "decoding.scheduler=threshold", "evaluation.seeds=[1]"]
    ways = ["evaluation.temperatures=[0,1]", *used]
    for changes, through in (([], calibration), (["decoding.calibration=none"], None))[: 1 + raw]:
        traces = evaluate(f"run={run}", held_out, tmp_path / "ev", *ways, *changes)
        for temperature in (0.0, 1.0):
            own = [trace for trace in traces if trace["temperature"] == temperature]
            scaling = through.scaling(temperature, 1.0, 0) if through else None
            assert [t["scheduled"] for t in own] == expected_lengths(own, scaling, least)
    assert "no calibration.json" not in capsys.readouterr().err


def read_calibration_of(report: Path, drafter: Path):
    """The copy in a report's folder, as if it lay beside the drafter."""
    beside = Path(shutil.copytree(drafter, report / "beside"))
    shutil.copy(report / NAME, beside / NAME)
    return read_calibration(beside)


def test_prompts_of_the_training_are_refused(
    run: Path, held_out: Path, refused: Refused, tmp_path: Path
) -> None:
    """In other words around it, too: what counts is the text of the first turn."""
    mixed = tmp_path / "mixed.jsonl"
    mine = [{"id": "mine", "messages": [{"role": "user", "content": " Say  3.\n"}]}]
    mixed.write_text(held_out.read_text() + "".join(json.dumps(row) + "\n" for row in mine))
    whole = ["evaluation.limit=null", f"run={run}"]
    message = refused("calibrate", *whole, f"prompts=[{mixed}]")
    assert "was trained on 1 of these 7 prompts: mixed/mine; name files of others" in message
    message = refused("calibrate", *whole, f"prompts=[{run.parent / 'seen.jsonl'}]")
    assert "neither a benchmark nor a .jsonl file" in message
    seen = write_prompts(tmp_path / "seen.jsonl")
    (run / "answers.jsonl").unlink()  # then by what data.path names: its first eight
    message = refused("calibrate", *whole, f"prompts=[{seen}]")
    assert (
        "trained on 8 of these 10 prompts: seen/p0, seen/p1, seen/p2, seen/p3, seen/p4" in message
    )
    assert "and 3 more" in message
    message = refused("calibrate", *whole, f"prompts=[{seen}]", "data.path=[gone.jsonl]")
    assert (
        "cannot be compared with what the drafter was trained on: data.path=gone.jsonl" in message
    )
    assert not list(run.rglob(NAME))


def test_prompts_of_a_store_are_refused(run: Path, held_out: Path, refused: Refused) -> None:
    """A store has tokens only."""
    target = json.loads(
        (best_checkpoint(run / "checkpoints").folder / "checkpoint.json").read_text()
    )
    made = [
        f"data.path=[{run / 'answers.jsonl'}]",
        "regenerate.enabled=false",
        "data.max_length=64",
    ]
    place = [f"target.path={target['target']}", "target.num_layer_ids=2", f"out={run / 'store'}"]
    main(["extract", "recipe=tiny", "engine.device=cpu", *made, *place])
    seen = write_prompts(run / "seen.jsonl")
    stored = ["features.source=stored", f"features.path={run / 'store'}"]
    message = refused(
        "calibrate", f"run={run}", f"prompts=[{seen}]", "evaluation.limit=null", *stored
    )
    assert "was trained on 8 of these 10 prompts: seen/p0" in message
    calibrate(f"run={run}", held_out, run / "report", *stored)
    found = read_calibration(best_checkpoint(run / "checkpoints").folder)
    assert found is not None
    assert all(fit.checked for fit in found.fits)


def test_an_export_is_calibrated_unchecked(
    run: Path, held_out: Path, target_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"checkpoint={run / 'export'}"
    target = [f"target.path={target_folder}", "target.num_layer_ids=2"]
    changes = [*target, "decoding.max_new_tokens=8", "engine.device=cpu"]
    calibrate(place, held_out, run / "report", *changes)
    assert "that the prompts are new is not checked" in capsys.readouterr().err
    found = read_calibration(run / "export")
    assert found is not None
    assert not any(fit.checked for fit in found.fits)
    assert found.weights == weights_digest(run / "export")
    threshold = ["decoding.scheduler=threshold", "evaluation.temperatures=[0]"]
    evaluate(place, held_out, run / "ev", *changes, *threshold)
    assert "no calibration.json" not in capsys.readouterr().err
    main(["export", f"checkpoint={run}", f"out={run / 'export'}"])  # replaced: other weights
    assert not (run / "export" / NAME).exists()


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_an_export_carries_the_scaling(run: Path, layout: str, refused: Refused) -> None:
    """In its config.json, where decoding finds it; that of other weights is refused."""
    best = best_checkpoint(run / "checkpoints").folder
    fit = Fit(1.0, 1.0, 0, Scaling((1.5, 0.5), (0.1, 0.0)), {}, "platt")
    Calibration((replace(fit, benchmarks=("mine",)),), weights_digest(best)).save(best)
    main(["export", f"checkpoint={run}", f"out={run / 'new'}", f"export.format={layout}"])
    found = read_calibration(run / "new")
    assert found == Calibration((fit,))
    Calibration((fit,), weights="others").save(best)
    command = ["export", f"checkpoint={run}", f"out={run / 'new'}", f"export.format={layout}"]
    assert "fitted to other weights" in refused(*command)
    main([*command, "decoding.calibration=none"])
    assert read_calibration(run / "new") is None


def test_calibration_that_does_not_fit(run: Path, held_out: Path, refused: Refused) -> None:
    one = ["evaluation.temperatures=[0]", "evaluation.baseline_prompts=0"]
    calibrate(f"run={run}", held_out, run / "report", *one)
    alone = ["calibrate", f"run={run}", f"prompts=[{held_out}]", "evaluation.limit=1", *one]
    assert "no draft was verified on the held_out half of the prompts" in refused(*alone)
    threshold = ["evaluate", f"run={run}", "decoding.scheduler=threshold"]
    message = refused(*threshold, "evaluation.temperatures=[1]")
    assert "no fit for decoding at temperature 1 (top_p 1, top_k 0), only for 0 (1, 0)" in message
    assert "decoding.calibration=none" in message
    best = best_checkpoint(run / "checkpoints").folder
    calibrate(f"run={run}", held_out, run / "report", "evaluation.temperatures=[1]")
    found = read_calibration(best)
    assert found is not None
    assert [fit.temperature for fit in found.fits] == [0.0, 1.0]  # what there was is kept
    path = best / NAME
    path.write_text(path.read_text().replace('"weights": "', '"weights": "0'))
    assert "fitted to other weights" in refused(*threshold, *one)


def test_drafters_without_confidence(
    target_folder: Path,
    held_out: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(target_folder, tmp_path, "drafter=dflash")
    message = refused("calibrate", f"run={run}", f"prompts=[{held_out}]")
    assert "deepspec calibrate needs a drafter with a confidence head" in message
    message = refused("evaluate", f"run={run}", "decoding.scheduler=threshold")
    assert "decoding.scheduler=threshold needs a drafter with a confidence head" in message
    assert "set decoding.scheduler=fixed, or none" in message
    fixed = ["decoding.scheduler=fixed", "decoding.verify_length=2"]
    traces = evaluate(f"run={run}", held_out, tmp_path / "ev", *fixed)
    assert {trace["scheduled"] for trace in traces} == {0, 1, 2}


def test_profiled_table_schedules(
    run: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sps.json"
    sizes = ["rows=2", "context=16", "repeats=4", "tokens=[1,5,2,12]"]
    main(["profile", f"run={run}", *sizes, f"out={file}"])
    said = capsys.readouterr().out
    assert f"throughput: {file}" in said
    table = read_throughput(str(file))
    assert [point.tokens for point in table.points] == [1, 2, 5, 12]
    assert all(point.steps_per_second > 0 for point in table.points)
    assert all(point.spread is not None and point.spread >= 0 for point in table.points)
    assert (table.about["rows"], table.about["context"], table.about["temperature"]) == (2, 16, 1.0)
    assert str(run) in table.about["drafter"]
    for scheduler in ("algorithm1", "async"):
        words = [f"decoding.scheduler={scheduler}", f"decoding.throughput={file}"]
        traces = evaluate(f"run={run}", held_out, tmp_path / scheduler, *words)
        report = json.loads((tmp_path / scheduler / "report.json").read_text())
        assert report["config"]["decoding"]["scheduler"] == scheduler
        assert report["results"][0]["baseline"]["identical"] == 1
        assert all(trace["scheduled"] <= trace["proposed"] for trace in traces)
    assert "the scheduler takes confidences as they are" in capsys.readouterr().err


def test_target_alone_is_profiled(target_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "sps.json"
    place = [f"target.path={target_folder}", "target.num_layer_ids=2", "engine.device=cpu"]
    drafts = ["drafter.block_size=1", "rows=3", "context=8", "repeats=2", "temperature=0"]
    main(["profile", "recipe=tiny", *place, *drafts, f"out={file}"])
    table = read_throughput(str(file))
    assert [point.tokens for point in table.points] == [1, 2, 3, 4, 6]
    assert table.about["drafter"] is None


def test_a_profile_compiles_what_decoding_would(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions run as they are: only that they would be compiled is asked here."""
    called = set()

    def plainly(function):
        called.add(function.__name__)
        return function

    monkeypatch.setattr(kv_cache, "compiled", plainly)
    place = [f"target.path={target_folder}", "target.num_layer_ids=2", "engine.device=cpu"]
    drafts = ["drafter.block_size=1", "rows=2", "context=8", "repeats=1", "decoding.compile=true"]
    main(["profile", "recipe=tiny", *place, *drafts, f"out={tmp_path / 'sps.json'}"])
    assert called == {"_forward"}
    assert read_throughput(str(tmp_path / "sps.json")).about["compiled"] is True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("calibrate",), "give one of run=DIR and checkpoint=DIR"),
        (("calibrate", "run=a", "checkpoint=b"), "give one of run=DIR and checkpoint=DIR"),
        (("calibrate", "run=a", "method=vector"), "method=vector must be sts or platt"),
        (("calibrate", "run=a"), "a does not exist"),
        (("profile",), "give one of recipe=R, run=DIR and checkpoint=DIR"),
        (("profile", "recipe=tiny", "rows=0"), "rows=0 must be a whole number of at least 1"),
        (("profile", "recipe=tiny", "tokens=[4]"), "tokens=[4] must be at least two numbers"),
        (("profile", "recipe=tiny", "tokens=[1,x]"), "tokens=x must be a whole number"),
        (("profile", "recipe=tiny", "temperature=-1"), "temperature=-1 must be a number"),
        (
            ("profile", "recipe=tiny", "rows=2", "tokens=[1,99]"),
            "2 rows have at most 5 drafts and one token each, 12 in all; raise rows=",
        ),
        (
            ("train", "recipe=tiny", "decoding.scheduler=algorithm1"),
            "decoding.scheduler=algorithm1 needs decoding.throughput=FILE",
        ),
        (
            ("train", "recipe=tiny", "decoding.scheduler=fixed"),
            "decoding.scheduler=fixed needs decoding.verify_length=N",
        ),
        (("train", "recipe=tiny", "decoding.threshold=1.5"), "decoding.threshold=1.5 must be"),
    ],
)
def test_mistakes(refused: Refused, words: tuple[str, ...], expected: str) -> None:
    assert expected in refused(*words)


def test_missing_table_is_named_before_any_work(run: Path, refused: Refused) -> None:
    words = ["decoding.scheduler=async", "decoding.throughput=gone.csv"]
    message = refused("evaluate", f"run={run}", *words)
    assert "decoding.throughput=gone.csv does not exist; deepspec profile makes" in message
