"""How a training step grows, beside what the plan says: context, anchors, vocabulary, rank.

    OMP_NUM_THREADS=1 python benchmarks/growth.py
    OMP_NUM_THREADS=1 python benchmarks/growth.py context --longest 32768

One thing grows at a time, the rest are those of recipe=tiny on a processor (one sample of 256
tokens, 32 anchors, V 4,096, rank 64) and of Qwen3-4B on a GPU (one of 4,096 tokens, 512 anchors, V
151,936, rank 256). A step is the drafter's forward, the objective and the backward of both
(`steps.py`). The plan's time is its operations over the rate of the table's last row, so that row
agrees by construction and the others say whether a step grows as predicted; its memory is what
`deepspec plan` adds up for activations, objective and gradients, and nothing is fitted.
Seconds are medians of processor time (on CUDA, wall clock).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from rich.console import Console
from rich.table import Table
from steps import SHAPES, Problem, Shape, described, device_here, in_turns, peak_bytes

from deepspec.config.schema import ObjectiveConfig
from deepspec.planning.forward import objective_bytes
from deepspec.planning.memory import activations

WHAT = ("context", "anchors", "vocabulary", "rank")


def main() -> None:
    """Measure and print a table for each of what grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], default=list(WHAT))
    parser.add_argument("--longest", type=int, default=32_768, help="tokens of the context")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    console = Console()
    for what in options.what:
        console.print(grown(what, options))
    console.print(described())


def shapes(what: str, base: Shape, longest: int) -> Iterator[tuple[int, Shape]]:
    """The values of `what`, and the shape of each."""
    if what == "context":
        length = 1024
        while length <= longest:
            yield length, replace(base, lengths=(length,))
            length *= 2
        return
    for factor in (1, 2, 4, 8):
        value = getattr(base, what) * factor // 4
        yield value, replace(base, **{what: value})


def grown(what: str, options: argparse.Namespace) -> Table:
    """One table."""
    device = device_here()
    cuda = device.type == "cuda"
    base = replace(SHAPES["4b"], lengths=(4096,)) if cuda else SHAPES["tiny"]
    base = base if cuda else replace(base, lengths=(256,))
    table = Table(title=f"{what} grows")
    for column in (what, "ms", "planned ms", "ratio", "peak MB", "planned MB", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for value, shape in shapes(what, base, options.longest):
        problem = Problem(shape, device, ObjectiveConfig())
        peak = peak_bytes(problem.step)  # the first step, whose gradients are new
        taken = median(in_turns({"": problem.step}, options.repeats)[""])
        rows.append((value, taken, problem.flops, peak, planned_bytes(problem)))
    rate = rows[-1][2] / rows[-1][1]
    for value, taken, flops, peak, expected in rows:
        planned = flops / rate
        table.add_row(
            f"{value:,}",
            f"{1e3 * taken:,.0f}",
            f"{1e3 * planned:,.0f}",
            f"{taken / planned:.2f}",
            f"{peak / 1e6:,.0f}",
            f"{expected / 1e6:,.0f}",
            f"{peak / expected:.2f}",
        )
    return table


def planned_bytes(problem: Problem) -> int:
    """The plan's peak of a step above weights and features: in the objective, or at the first layer
    of the backward, when all gradients are there."""
    job, batch = problem.job, problem.micro_batch
    kept, loss = activations(job, batch), objective_bytes(job, batch)
    gradients = 4 * job.shapes.trainable
    first = kept.total + max(loss.backward, loss.left + kept.mlp)
    last = kept.context + kept.layers[0] * (len(kept.layers) > 1) + kept.casts + kept.mlp
    return max(kept.total + loss.forward, first, last + gradients)


if __name__ == "__main__":
    main()
