"""Accepted length of one kind of drafter over another, by domain and temperature.

    python benchmarks/acceptance.py runs/tiny --against runs/tiny_dflash
    python benchmarks/acceptance.py runs/tiny-{0,1,2} --against runs/tiny_dflash-{0,1,2}

Reads the traces.jsonl of each folder, as `deepspec train` and `deepspec evaluate` leave them; both
sides must have decoded the same prompts. Runs that differ by their seed are pooled: accepted length
is tokens over rounds of all of them. The standard error of the gain is that of the prompts: a
bootstrap that draws prompts anew within each domain, the same ones for both sides, and takes all
rounds of a prompt along, for they depend on each other. It says nothing about other trainings; the
lengths of the single runs are printed for that.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from deepspec.data.conversations import read_jsonl
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
            raise DataError(f"{self.folder}: other prompts of {setting} than the first run's")
        return np.stack([cell[request] for request in requests])


@dataclass(frozen=True)
class Side:
    """One setting of one side: counts [runs, requests, 2]."""

    counts: Floats

    @property
    def length(self) -> float:
        """Accepted length, all runs together."""
        tokens, rounds = self.counts.sum(axis=(0, 1))
        return float(tokens / rounds)

    @property
    def runs(self) -> str:
        """Accepted length of each run."""
        sums = self.counts.sum(axis=1)
        return " ".join(f"{tokens / rounds:.2f}" for tokens, rounds in sums)

    def drawn(self, times: Floats) -> Floats:
        """Accepted lengths [draws] when request i counts `times[draw, i]` times."""
        tokens, rounds = (times @ self.counts.sum(axis=0)).T
        return np.asarray(tokens / rounds)


def main() -> None:
    """Read, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a traces.jsonl")
    parser.add_argument("--against", nargs="+", type=Path, required=True, help="the baseline's")
    options = parser.parse_args()
    ours, theirs = ([Counts(path) for path in side] for side in (options.runs, options.against))

    table = Table(title=f"accepted length, {names(options.runs)} over {names(options.against)}")
    for column in ("T", "domain", "prompts", "first", "runs", "second", "runs", "gain"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    generator = np.random.default_rng(0)
    settings = sorted(ours[0].cells)
    for temperature in sorted({setting[0] for setting in settings}):
        pairs, draws = [], []
        for setting in (s for s in settings if s[0] == temperature):
            requests = sorted(ours[0].cells[setting])
            pair = [
                Side(np.stack([counts.of(setting, requests) for counts in side]))
                for side in (ours, theirs)
            ]
            times = generator.multinomial(
                len(requests), np.full(len(requests), 1 / len(requests)), size=DRAWS
            ).astype(float)
            drawn = [side.drawn(times) for side in pair]
            pairs.append([side.length for side in pair])
            draws.append(drawn)
            cells = [text for side in pair for text in (f"{side.length:.3f}", side.runs)]
            table.add_row(
                f"{temperature:g}",
                setting[1],
                str(len(requests)),
                *cells,
                gain(pairs[-1][0] / pairs[-1][1], drawn[0] / drawn[1]),
            )
        first, second = np.mean(pairs, axis=0)  # over domains, as the report averages
        drawn_mean = np.mean(draws, axis=0)
        table.add_row(
            f"{temperature:g}",
            "mean",
            "",
            f"{first:.3f}",
            "",
            f"{second:.3f}",
            "",
            gain(first / second, drawn_mean[0] / drawn_mean[1]),
            end_section=True,
        )
    Console().print(table)


def gain(ratio: float, drawn: Floats) -> str:
    """Relative gain and its standard error, in percent."""
    return f"{100 * (ratio - 1):+.1f} ± {100 * drawn.std(ddof=1):.1f} %"


def names(folders: Sequence[Path]) -> str:
    """The folders' names."""
    return ", ".join(folder.name for folder in folders)


if __name__ == "__main__":
    main()
