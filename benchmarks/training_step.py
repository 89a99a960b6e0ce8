"""A training step beside the plain one: packed blocks and fused objective against one sample a row
and the eager objective.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py
    OMP_NUM_THREADS=1 python benchmarks/training_step.py tiny --compile --checkpoint
    python benchmarks/training_step.py 4b                              # on a GPU

A step is the drafter's forward, the objective, and the backward of both, on one micro-batch
(`steps.py`: shapes, lengths). "rows": every sample is a row of its own, padded to the longest, and
the loss is computed for all its slots. Both sides, and what is between, are measured in turns, and
give the same loss. Memory is what a step allocates above weights and features at its peak.
"reduced": the vocabulary of Qwen3 over small hidden states, for processors; of 4b it says how the
objective behaves and nothing else. `--compile` adds training.compile, and after how many steps its
compilation has paid for itself; `--checkpoint` adds training.activation_checkpointing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import SHAPES, Problem, close, described, device_here, in_turns, peak_bytes, spread

from deepspec.config.schema import ObjectiveConfig

OURS, PLAIN = "packed, fused", "rows, eager"
SIDES = {
    OURS: {"implementation": "fused", "rows": False},
    "rows, fused": {"implementation": "fused", "rows": True},
    "packed, eager": {"implementation": "eager", "rows": False},
    PLAIN: {"implementation": "eager", "rows": True},
}


def main() -> None:
    """Measure and print a table a shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = device_here()
    usual = ["4b"] if device.type == "cuda" else ["tiny", "tiny16", "reduced"]
    parser.add_argument("shapes", nargs="*", choices=[*SHAPES, []], default=usual)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--chunk-size", type=int, default=ObjectiveConfig().chunk_size)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    options = parser.parse_args()
    console = Console()
    for name in options.shapes:
        console.print(measured(name, options, device))
    console.print(described())


def measured(name: str, options: argparse.Namespace, device: torch.device) -> Table:
    """One shape's table."""
    shape = SHAPES[name]
    problems = dict(sides(name, options, device))
    losses = {side: first_step(problem) for side, problem in problems.items()}
    close([loss for loss, _ in losses.values()], 1e-5 if device.type == "cpu" else 2e-2)
    memory = {side: peak_bytes(problem.step) for side, problem in problems.items()}
    seconds = in_turns({side: p.step for side, p in problems.items()}, options.repeats)
    plain = median(seconds[PLAIN])
    ours, batch = problems[OURS], problems[OURS].batch
    table = Table(
        title=f"{name}: V {shape.vocabulary:,}, D {shape.hidden}, {len(batch.tokens):,} tokens, "
        f"{batch.weights.numel():,} slots at {len(batch.slot_rows.unique()):,} positions; "
        f"{ours.flops / 1e9:,.1f} GFLOP by plan"
    )
    for column in ("", "ms (middle half)", "times faster", "peak MB", "of plain", "GFLOP/s"):
        table.add_column(column, justify="right" if column else "left")
    for side in problems:
        taken = median(seconds[side])
        table.add_row(
            side,
            spread(seconds[side]),
            f"{plain / taken:.2f}",
            f"{memory[side] / 1e6:,.0f}",
            f"{memory[side] / memory[PLAIN]:.2f}",
            f"{ours.flops / taken / 1e9:,.0f}",
        )
    for side, saved in compiled_sides(seconds):
        paid = f"paid back after {losses[side][1] / saved:,.0f} steps" if saved > 0 else "no gain"
        table.caption = f"{side}: {losses[side][1]:.0f} s for the first step, {paid}"
    return table


def sides(
    name: str, options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, Problem]]:
    """What is compared."""

    def problem(implementation: str, rows: bool, **training: Any) -> Problem:
        objective = ObjectiveConfig(implementation=implementation, chunk_size=options.chunk_size)
        return Problem(SHAPES[name], device, objective, rows=rows, **training)

    for side, settings in SIDES.items():
        yield side, problem(**settings)
    if options.compile:
        yield f"{OURS}, compiled", problem(**SIDES[OURS], compile=True)
    if options.checkpoint:
        yield f"{OURS}, checkpointed", problem(**SIDES[OURS], activation_checkpointing=True)


def first_step(problem: Problem) -> tuple[float, float]:
    """Its loss, and the wall seconds that it took: with it, compilation."""
    begun = time.perf_counter()
    return problem.step(), time.perf_counter() - begun


def compiled_sides(seconds: dict[str, list[float]]) -> Iterator[tuple[str, float]]:
    """Each compiled side and the seconds that it saves a step."""
    for side, taken in seconds.items():
        if side.endswith(", compiled"):
            yield side, median(seconds[OURS]) - median(taken)


if __name__ == "__main__":
    main()
