"""Metrics of optimizer steps: (numerator, denominator) pairs, summed first and divided last."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.atomic import naming, write_text
from deepspec.json_files import parse_json
from deepspec.objective import LossOutput
from deepspec.progress import say
from deepspec.records import BlockBatch

SHOWN = 5


class Ratios:
    """Sums of named (numerator, denominator) pairs."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, numerator: float | Tensor, denominator: float | Tensor) -> None:
        """One more share of `name`."""
        pair = self._sums[name]
        pair[0] += float(numerator)
        pair[1] += float(denominator)

    def add_loss(self, output: LossOutput, batch: BlockBatch) -> None:
        """A micro-batch: the loss's terms, and the expected accepted length."""
        weight = batch.weights.sum()
        self.add("ce", output.ce_sum, weight)
        self.add("l1", output.l1_sum, weight)
        self.add("confidence", output.confidence_sum, weight)
        lengths = expected_accept_length(output.acceptance, batch.weights)
        counted = batch.weights[:, 0] > 0  # not where a process without samples only takes part
        self.add("accept_length", lengths[counted].sum(), counted.sum())

    def divided(self, summed: Callable[..., list[float]]) -> dict[str, float]:
        """Every ratio whose denominator is not zero, after `summed` added up the processes'."""
        if not self._sums:
            return {}
        sums = iter(summed(*(value for pair in self._sums.values() for value in pair)))
        pairs = {name: (next(sums), next(sums)) for name in self._sums}
        return {name: a / b for name, (a, b) in pairs.items() if b}


def expected_accept_length(acceptance: Tensor, weights: Tensor) -> Tensor:
    """Tokens a round yields in expectation, bonus counted, [N].

    `acceptance` [N*K], `weights` [N, K]: 1 + sum_j prod_{i<=j} (1 - 0.5 ||p_d - p_t||_1), along the
    target's own text. Slots behind the end of the answer count as rejected.
    """
    kept = torch.where(weights > 0, acceptance.view_as(weights), 0)
    return 1 + kept.cumprod(dim=1).sum(dim=1)


class MetricsLog:
    """metrics.jsonl: one row an event, always written; a resumed run drops what it will repeat.

    Lines that are no rows are moved to metrics.damaged.jsonl: a log stops no training.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        rows, damaged = _split(path)
        if damaged:
            aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
            with naming(aside), aside.open("ab") as stream:
                stream.writelines(line.rstrip(b"\r\n") + b"\n" for line in damaged.values())
            say(f"{_which(path, damaged)}: moved to {aside.name}")
        # of a training that begins anew nothing is kept, whatever the file holds
        kept = [row for row in rows if row["step"] <= step] if step else []
        # a link to another disk stays a link
        write_text(path.resolve(), "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with naming(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, and say which lines are none."""
    rows, damaged = _split(path)
    if damaged:
        say(f"{_which(path, damaged)}: left out")
    return rows


def _split(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Return the rows, and by number the lines that are none. A half-written last line is neither:
    a training that goes on, or was killed, leaves it."""
    rows: list[dict[str, Any]] = []
    damaged: dict[int, bytes] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no row")
            rows.append(row)
        except ValueError:
            if number < len(lines) or line.endswith(b"\n") or not line.startswith(b"{"):
                damaged[number] = line
    return rows, damaged


def _which(path: Path, damaged: Mapping[int, bytes]) -> str:
    numbers = list(map(str, damaged))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    lines = "line" if len(numbers) == 1 else "lines"
    return f"{path}: no row of metrics in {lines} {', '.join(numbers[:SHOWN])}{more}"
