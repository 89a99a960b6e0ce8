"""`deepspec load` and `deepspec simulate` on a drafter of two tiny steps."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path

import pytest

from deepspec.cli import main
from deepspec.commands.simulations import deviations
from deepspec.serving.record import LoadRecord, read_records
from tests.commands.test_scheduling import Refused, held_out, refused, train, trained

__all__ = ["held_out", "refused", "trained"]  # fixtures

FIELDS = [field.name for field in fields(LoadRecord)]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        reader = csv.DictReader(stream)
        assert reader.fieldnames == FIELDS
        return list(reader)


def load(run: Path, held_out: Path, out: Path, *changes: str) -> None:
    common = [f"evaluation.benchmarks=[{held_out}]", f"out={out}"]
    main(["load", f"run={run}", *common, *changes])


def test_measured_and_simulated(trained: Path, held_out: Path, tmp_path: Path) -> None:
    """Every policy and level has a line in both; what is simulated needs no run."""
    out = tmp_path / "load"
    levels = ["concurrency=[1,3]", "seconds=0.1", "temperature=0", f"against=[{trained}]"]
    load(trained, held_out, out, *levels, "decoding.compile=true")  # which plays no part here
    lines = rows_of(out / "load.csv")
    policies = ["plain", "fixed", "threshold", "algorithm1", "async"]
    names = [(policy, "dspark" if policy != "plain" else "") for policy in policies]
    expected = [(*name, n) for n in ("1", "3") for name in [*names, ("fixed", "dspark-2")]]
    assert [(row["policy"], row["drafter"], row["concurrency"]) for row in lines] == expected
    assert all(float(row["throughput"]) > 0 and row["wait_p90"] == "" for row in lines)
    assert {row["budget"] for row in lines if row["policy"] == "plain"} == {"1.0"}
    main(["simulate", f"load={out}", "seconds=1"])
    assert [tuple(row.values())[:3] for row in rows_of(out / "simulate.csv")] == expected
    other = tmp_path / "gpu"
    made_up = ["throughput=synthetic", "concurrency=64", "rates=[5,50]", "policies=[fixed:2]"]
    main(["simulate", f"load={out}", *made_up, f"out={other}"])
    lines = rows_of(other / "simulate.csv")
    assert [row["rate"] for row in lines] == ["5.0", "5.0", "50.0", "50.0"]
    assert all(float(row["wait_p90"]) >= 0 for row in lines)
    about = json.loads((other / "simulate.json").read_text())["about"]
    assert "synthetic_gpu" in about["throughput"]["dspark"]


@pytest.mark.slow
def test_simulated_throughput_is_that_of_the_real_loop(
    target_folder: Path, held_out: Path, tmp_path: Path
) -> None:
    """Within 15 % for every policy and level, on a machine that does little else."""
    run = train(target_folder, tmp_path, "decoding.max_new_tokens=48", "training.max_steps=20")
    out = tmp_path / "load"
    load(run, held_out, out, "concurrency=[1,4,16]", "seconds=6")
    main(["simulate", f"load={out}", "seconds=60"])
    simulated, _ = read_records(out / "simulate.json")
    measured, _ = read_records(out / "load.json")
    found = deviations(simulated, measured)
    assert len(found) == 15
    assert max(map(abs, found)) < 0.15


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("load",), "give one of run=DIR and checkpoint=DIR"),
        (("load", "run=a", "policies=[best]"), "best must be one of plain, fixed, threshold"),
        (("load", "run=a", "policies=[]"), "policies=[] must be one or several of plain"),
        (("load", "run=a", "policies=[threshold:2]"), "threshold:2 must be one of"),
        (("load", "run=a", "concurrency=[0]"), "concurrency=0 must be a whole number"),
        (("load", "run=a", "rates=[1]"), "need one concurrency=N"),
        (("load", "run=a", "rates=[0]"), "rates=0 must be a number above 0"),
        (("load", "run=a", "concurrency=[]"), "concurrency=[] must be one or several whole"),
        (("load", "run=a", "concurrency=[[1]]"), "lists are written [a, b]"),
        (("load", "run=a", "seconds=0"), "seconds=0 must be a number above 0"),
        (("load", "run={run}", "evaluation.benchmarks=[]"), "nothing to decode"),
        (("calibrate", "run={run}", "prompts=[]"), "nothing to decode"),
        (("load", "run={run}", 'against=["moved,run"]'), "moved,run does not exist"),
        (("load", "run={run}", "against=moved,run"), "moved,run does not exist"),
        (("load", "run=a"), "a does not exist"),
        (("simulate",), "give one of load=DIR and traces=FILE"),
        (("simulate", "load=a"), "a/load.json holds no load"),
        (("simulate", "traces=a"), "traces=FILE needs throughput=FILE"),
        (("simulate", "load=a", "batch=2"), "batch is no key of deepspec simulate"),
    ],
)
def test_mistakes(refused: Refused, trained: Path, words: tuple[str, ...], expected: str) -> None:
    assert expected in refused(*(word.format(run=trained) for word in words))
