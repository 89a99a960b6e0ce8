"""Metrics of optimizer steps: (numerator, denominator) pairs, summed first and divided last."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.atomic import naming, write_text
from deepspec.errors import TrainingError
from deepspec.objective import LossOutput
from deepspec.records import BlockBatch


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
    """metrics.jsonl: one row an event, always written; a resumed run drops what it will repeat."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        # of a training that begins anew nothing is kept, whatever the file holds
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        # a link to another disk stays a link
        write_text(path.resolve(), "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with naming(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written last line, which a killed process leaves, is left
    out. Raises TrainingError for any other line that is no row."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except ValueError:  # not UTF-8, or not JSON
            if line.startswith(b"{") and not line.endswith(b"\n"):
                break
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise TrainingError(
                f"{path}, line {number}: not a row of metrics, found {line[:40]!r}; delete the "
                "line, or move the file away: a training goes on without it"
            )
        rows.append(row)
    return rows
