"""What an evaluation leaves behind: plain numbers, written as report.json and read back.

Everything here is JSON as it stands; the report and its figures are made from it alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepspec.errors import CheckpointError

REPORT_FORMAT = 1


@dataclass(frozen=True)
class Baseline:
    """Plain cached decoding of the same target, on the benchmark's first prompts, in the same run.

    `prompts` both decoders ran; `tokens_per_second` of plain decoding; `speedup` the drafter's
    tokens a second over it, on those prompts. At temperature 0 also how far the outputs agree:
    `identical` prompts, `explained` differences within the target's own rounding noise,
    `unexplained` ones beyond it, and the `largest_gap` in logits of any difference. None at other
    temperatures.
    """

    prompts: int
    tokens_per_second: float
    speedup: float
    identical: int | None = None
    explained: int | None = None
    unexplained: int | None = None
    largest_gap: float | None = None


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark at one temperature and seed.

    `accepted_length`: tokens a round, bonus counted (as the paper's table 1). `acceptance_rate`:
    accepted drafts over verified ones. `verify_rate`: verified drafts over proposed ones.
    `conditional_acceptance` [K]: acceptance at each position given that all earlier ones were
    accepted (null where no round got there). `prefix_survival` [K]: share of rounds in which all
    drafts up to a position were accepted.
    """

    benchmark: str
    temperature: float
    seed: int
    prompts: int
    tokens: int
    rounds: int
    seconds: float
    tokens_per_second: float
    accepted_length: float
    acceptance_rate: float
    verify_rate: float
    conditional_acceptance: list[float | None]
    prefix_survival: list[float | None]
    baseline: Baseline | None = None


@dataclass(frozen=True)
class Average:
    """Mean over benchmarks (each first averaged over its seeds) at one temperature."""

    temperature: float
    accepted_length: float
    tokens_per_second: float
    speedup: float | None


@dataclass(frozen=True)
class Report:
    """One evaluation of one drafter.

    `drafter`: kind, shape, number of parameters, where it was read from, optimizer step.
    `machine`: processor, cores, memory, device, versions. `skipped`: rows left out by reason, by
    stage ("training data", "regeneration", ...). `training`: rows of metrics.jsonl (step, loss,
    ce, l1, confidence, accept_length, learning_rate, gradient_norm; validation_* rows in between);
    empty when the run is not at hand.
    """

    title: str
    created: str
    version: str
    target: str
    identity: dict[str, str]
    drafter: dict[str, Any]
    machine: dict[str, Any]
    config: dict[str, Any]
    results: list[BenchmarkResult]
    averages: list[Average]
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        text = json.dumps({"format": REPORT_FORMAT, **asdict(self)}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """The inverse of `Report.save`. Raises CheckpointError when it is not a report."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != REPORT_FORMAT:
            raise CheckpointError(f"{path} was written by another version; evaluate again")
        raw["results"] = [
            BenchmarkResult(**{**row, "baseline": row["baseline"] and Baseline(**row["baseline"])})
            for row in raw["results"]
        ]
        raw["averages"] = [Average(**row) for row in raw["averages"]]
        return Report(**raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a report: {error}") from None
