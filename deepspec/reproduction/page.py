"""The report of a reproduction: one page with every figure that is complete, and a CSV of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepspec import __version__
from deepspec.atomic import write_text
from deepspec.evaluation.report import environment
from deepspec.machine import describe_machine
from deepspec.reproduction import confidences, lengths, loads, positions
from deepspec.reproduction.finding import Finding
from deepspec.reproduction.plan import Plan

PAGE = "reproduction.html"
MAKERS: dict[str, Callable[[Plan], Finding]] = {
    "table1": lengths.table1,
    "positions": positions.positions,
    "depth": lengths.depth,
    "blocks": lengths.blocks,
    "thresholds": confidences.thresholds,
    "reliability": confidences.reliability,
    "throughput": loads.throughput,
    "budget": loads.budget,
}


def findings(plan: Plan, done: Collection[str]) -> list[Finding]:
    """Of the figures whose jobs are all `done`."""
    complete = [name for name, jobs in plan.figures.items() if set(jobs) <= set(done)]
    return [MAKERS[name](plan) for name in complete]


def write_page(plan: Plan, found: list[Finding], failed: Mapping[str, Path]) -> Path:
    """Write the page and the CSVs into the plan's folder; gives the page."""
    for finding in found:
        finding.save(plan.out)
    have = {finding.name for finding in found}
    context: dict[str, Any] = {
        "findings": found,
        "missing": {
            name: [job for job in jobs if job in failed]
            for name, jobs in plan.figures.items()
            if name not in have
        },
        "config": plan.config,
        "settings": asdict(plan.config.reproduce),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": describe_machine(),
    }
    path = plan.out / PAGE
    write_text(path, environment().get_template(f"{PAGE}.j2").render(context))
    return path
