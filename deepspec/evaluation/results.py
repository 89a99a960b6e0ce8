"""What an evaluation leaves behind: plain numbers, written as report.json and read back.

Everything here is JSON as it stands; the report and its figures are made from it alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from deepspec.atomic import write_text
from deepspec.errors import CheckpointError
from deepspec.json_files import as_kind, read_json

REPORT_FORMAT = 1


@dataclass(frozen=True)
class Baseline:
    """Plain cached decoding of the same target, on the benchmark's first prompts, in the same run.

    `prompts` both decoders ran; `tokens_per_second` of plain decoding; `speedup` the drafter's
    tokens a second over it, on those prompts. At temperature 0 also how far the outputs agree:
    `identical` prompts, `explained` differences within the target's own rounding noise,
    `unexplained` ones beyond it, and the `largest_gap` in logits (null where one output only ends
    earlier). None at other temperatures.
    """

    prompts: int
    tokens_per_second: float
    speedup: float
    identical: int | None = None
    explained: int | None = None
    unexplained: int | None = None
    largest_gap: float | None = None


@dataclass(frozen=True)
class Lookup:
    """Prompt lookup (drafter.kind=ngram) on the baseline's prompts, in the same run.

    `accepted_length` and `tokens_per_second` of it, with as many drafts a round as the drafter;
    `drafter_accepted_length` of the drafter on the same prompts.
    """

    prompts: int
    accepted_length: float
    tokens_per_second: float
    drafter_accepted_length: float


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
    lookup: Lookup | None = None


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
        """Write as JSON, whole or not at all. Raises OSError."""
        text = json.dumps({"format": REPORT_FORMAT, **asdict(self)}, indent=2)
        write_text(path, text + "\n")


def read_report(path: Path) -> Report:
    """The inverse of `Report.save`. Raises CheckpointError when it is not a report."""
    try:
        raw = read_json(path, CheckpointError, "evaluate again")
        if raw.get("format") != REPORT_FORMAT:
            raise CheckpointError(f"{path} was written by another version; evaluate again")
        return as_kind(Report, raw)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{path} is not a report: {error}") from None


def mean_over_seeds(results: Sequence[BenchmarkResult]) -> list[BenchmarkResult]:
    """One record a (benchmark, temperature), benchmarks in order of appearance.

    Measures are means over the seeds, counts are sums, `largest_gap` is the largest; `seed` is the
    first one. A position no round of a seed reached is left out of that position's mean.
    """
    runs: dict[str, dict[float, list[BenchmarkResult]]] = {}
    for result in results:
        runs.setdefault(result.benchmark, {}).setdefault(result.temperature, []).append(result)
    return [_merge(seeds[key]) for seeds in runs.values() for key in sorted(seeds)]


def _merge(seeds: list[BenchmarkResult]) -> BenchmarkResult:
    counts = ("prompts", "tokens", "rounds", "seconds")
    measures = ("tokens_per_second", "accepted_length", "acceptance_rate", "verify_rate")
    merged: dict[str, Any] = {name: sum(getattr(run, name) for run in seeds) for name in counts}
    merged |= {name: fmean(getattr(run, name) for run in seeds) for name in measures}
    for name in ("conditional_acceptance", "prefix_survival"):
        positions = zip(*(getattr(run, name) for run in seeds), strict=True)
        known = [[rate for rate in rates if rate is not None] for rates in positions]
        merged[name] = [fmean(rates) if rates else None for rates in known]
    baselines = [run.baseline for run in seeds if run.baseline is not None]
    merged["baseline"] = _merge_baselines(baselines) if baselines else None
    lookups = [run.lookup for run in seeds if run.lookup is not None]
    merged["lookup"] = _merge_lookups(lookups) if lookups else None
    return replace(seeds[0], **merged)


def _merge_baselines(baselines: list[Baseline]) -> Baseline:
    counts: dict[str, Any] = {}
    for name in ("identical", "explained", "unexplained"):
        known = [count for base in baselines if (count := getattr(base, name)) is not None]
        counts[name] = sum(known) if known else None
    gaps = [base.largest_gap for base in baselines if base.largest_gap is not None]
    return Baseline(
        prompts=sum(base.prompts for base in baselines),
        tokens_per_second=fmean(base.tokens_per_second for base in baselines),
        speedup=fmean(base.speedup for base in baselines),
        largest_gap=max(gaps, default=None),
        **counts,
    )


def _merge_lookups(lookups: list[Lookup]) -> Lookup:
    return Lookup(
        prompts=sum(lookup.prompts for lookup in lookups),
        accepted_length=fmean(lookup.accepted_length for lookup in lookups),
        tokens_per_second=fmean(lookup.tokens_per_second for lookup in lookups),
        drafter_accepted_length=fmean(lookup.drafter_accepted_length for lookup in lookups),
    )
