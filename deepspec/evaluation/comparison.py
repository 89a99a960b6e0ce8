"""Accepted lengths of several drafters on the same prompts, with seeds and spread.

Read from the traces.jsonl that `deepspec train` and `deepspec evaluate` leave. Runs that differ by
their seed are pooled: accepted length is tokens over rounds of all of them. The standard error is
that of the prompts: a bootstrap that draws prompts anew within each domain, the same ones for all
sides, and takes all rounds of a prompt along, for they depend on each other. It says nothing about
other trainings; the lengths of the single runs are kept for that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepspec.data.files import read_jsonl
from deepspec.errors import DataError

DRAWS = 10_000
Floats = NDArray[np.float64]
Setting = tuple[float, str]  # temperature, domain


class Counts:
    """(tokens, rounds) of every request, by temperature and domain."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells: dict[Setting, dict[str, Floats]] = defaultdict(
            lambda: defaultdict(lambda: np.zeros(2))
        )
        traces = folder / "traces.jsonl"
        if not traces.is_file():
            raise DataError(f"{traces} is missing; run deepspec evaluate run={folder} out={folder}")
        for _, row in read_jsonl(traces):
            cell = self.cells[row["temperature"], row["benchmark"]]
            cell[row["request"]] += (row["accepted"] + 1, 1)

    def of(self, setting: Setting, requests: Sequence[str]) -> Floats:
        """[requests, 2]. Raises DataError where this run decoded others."""
        cell = self.cells.get(setting, {})
        if set(cell) != set(requests):
            temperature, domain = setting
            raise DataError(
                f"{self.folder} decoded {len(cell)} prompts of {domain} at temperature "
                f"{temperature:g}, not the {len(requests)} of the first run; evaluate all "
                "runs with the same evaluation.benchmarks, limit and temperatures"
            )
        return np.stack([cell[request] for request in requests])


@dataclass(frozen=True)
class Lengths:
    """Accepted lengths of one side: of all runs together, of each, and by the bootstrap [DRAWS]."""

    pooled: float
    runs: list[float]
    drawn: Floats

    def __str__(self) -> str:
        single = " ".join(f"{length:.2f}" for length in self.runs)
        return f"{self.pooled:.3f}" + (f" ({single})" if len(self.runs) > 1 else "")


def compare(
    sides: Sequence[Sequence[Counts]], setting: Setting, generator: np.random.Generator
) -> list[Lengths]:
    """The sides' lengths at one temperature on one domain, with the same prompts drawn for all."""
    requests = sorted(sides[0][0].cells[setting])
    even = np.full(len(requests), 1 / len(requests))
    times = generator.multinomial(len(requests), even, size=DRAWS)  # [DRAWS, requests]
    found = []
    for runs in sides:
        counts = np.stack([run.of(setting, requests) for run in runs])  # [runs, requests, 2]
        found.append(
            Lengths(
                pooled=float(ratio(counts.sum(axis=(0, 1)))),
                runs=ratio(counts.sum(axis=1)).tolist(),
                drawn=ratio(times @ counts.sum(axis=0)),
            )
        )
    return found


def mean(sides: Sequence[Lengths]) -> Lengths:
    """Over domains, each counting once, as the report averages."""
    return Lengths(
        pooled=float(np.mean([side.pooled for side in sides])),
        runs=np.mean([side.runs for side in sides], axis=0).tolist(),
        drawn=np.mean([side.drawn for side in sides], axis=0),
    )


def ratio(counts: Floats) -> Floats:
    """Counts [.., 2] -> tokens over rounds [..]."""
    return np.asarray(counts[..., 0] / counts[..., 1])
