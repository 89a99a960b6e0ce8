"""Where a decoding round's time goes, and what bounds it: greedy, by processor time, one thread.

    OMP_NUM_THREADS=1 python benchmarks/rounds.py runs/tiny
    OMP_NUM_THREADS=1 python benchmarks/rounds.py runs/tiny --batch 16 --compile

First table: milliseconds a round of each part, exclusive of the parts inside it; medians over the
rounds of prompts of the run's benchmarks. `cache` is the writing of keys and values of target and
drafter (not told apart where it is compiled); what is in no part is `Python and small tensors`.

Second table: the target alone, over 1 to 16 tokens of one row and of 16. `products` is the same
forward's matrix products and nothing else: what verification costs more than a plain step in
arithmetic. The rest is a price a forward has, whatever its width.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from decoding import GREEDY, read_prompts
from rich.console import Console
from rich.table import Table
from torch import nn

from deepspec.commands.sources import open_source
from deepspec.commands.stages import open_target
from deepspec.decoding import Decoder
from deepspec.decoding import decoder as module
from deepspec.decoding.rows import Rows
from deepspec.drafters.cache import RowKV
from deepspec.drafters.registry import open_proposer
from deepspec.machine import describe_machine
from deepspec.targets import Target

REST = "Python and small tensors"
CONTEXT = 100  # tokens before those that the second table feeds


class Parts:
    """Exclusive seconds of wrapped functions, a list of rounds each."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._running: list[str] = []
        self._since = 0.0
        self._own: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, function: str, part: str, *, whole: bool = False) -> None:
        """Count `owner.function` as `part`; a `whole` round begins and ends with it."""
        original = getattr(owner, function)

        def counted(*args: Any, **options: Any) -> Any:
            if whole:
                self._own = defaultdict(float)
            self._charge()
            self._running.append(part)
            try:
                return original(*args, **options)
            finally:
                self._charge()
                self._running.pop()
                if whole:
                    self.rounds.append(dict(self._own))

        setattr(owner, function, counted)

    def _charge(self) -> None:
        now = time.process_time()
        if self._running:
            self._own[self._running[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder, a checkpoint, or an export")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4, help="of each benchmark")
    parser.add_argument("--compile", action="store_true", help="with decoding.compile=true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(options.run)
    target = open_target(source.config)
    proposer = open_proposer(source.kind, source.load(target), target)
    decoder = Decoder(target, proposer, options.batch, compiled=options.compile)
    prompts = read_prompts(source.config, target, options.prompts, [])
    console = Console()
    limit = source.config.decoding.max_new_tokens
    decoder.generate(prompts, GREEDY, limit)  # allocates, chooses kernels, compiles
    with torch.inference_mode():
        console.print(bounds(target))
    console.print(shares(decoder, prompts, limit))
    machine = describe_machine()
    print(f"{machine['processor']}, one thread, torch {machine['torch']}")


def shares(decoder: Decoder, prompts: list[list[int]], limit: int) -> Table:
    """A row a part of a round of whole batches."""
    proposer: Any = decoder.proposer
    parts = Parts()
    parts.watch(decoder, "_round", REST, whole=True)
    parts.watch(proposer, "propose", "draft")
    if not proposer._compiled:
        parts.watch(proposer, "_block", "draft: backbone and LM head")
        parts.watch(proposer, "_sample", "draft: sequential head, confidence, argmax")
    parts.watch(Rows, "forward", "verify: target")
    parts.watch(decoder, "_judge", "verify: LM head, argmax, judgement")
    parts.watch(proposer, "observe", "context keys and values for the drafter")
    for write in ("write", "write_packed"):
        parts.watch(RowKV, write, "cache")
    parts.watch(module, "download", "download")
    decoder.generate(prompts, GREEDY, limit)
    names = list(dict.fromkeys(name for own in parts.rounds for name in own))
    total = median(sum(own.values()) for own in parts.rounds)
    table = Table(title=f"a round, batches of {decoder.batch_size} ({len(prompts)} prompts)")
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name in sorted(names, key=lambda name: name == REST):
        own = median(own.get(name, 0.0) for own in parts.rounds)
        table.add_row(name, f"{1e3 * own:.2f}", f"{own / total:.0%}")
    table.add_row("all", f"{1e3 * total:.2f}", "")
    return table


def bounds(target: Target) -> Table:
    """A row a width: the target's forward with its head, and its matrix products alone."""
    table = Table(title=f"the target alone, context {CONTEXT}")
    for column in (
        "rows",
        "tokens each",
        "forward, ms",
        "products, ms",
        "rest, ms",
        "over 1 token",
    ):
        table.add_column(column, justify="right")
    linear = [layer for layer in target.backbone.modules() if isinstance(layer, nn.Linear)]
    weights = [*(layer.weight for layer in linear), target.head.weight]
    for count in (1, 16):
        names = [str(row) for row in range(count)]
        ids = torch.randint(target.vocab_size, (count, CONTEXT + 16))
        rows = Rows(target, names, ids[:, :CONTEXT].tolist(), 100, [])
        rows.prefill(with_context=False)
        starts = torch.full((count,), CONTEXT)
        first = None
        for width in (1, 2, 4, 6, 8, 16):
            tokens = ids[:, CONTEXT : CONTEXT + width]
            inputs = [torch.randn(count * width, weight.shape[1]) for weight in weights]

            def forward(tokens: Any = tokens, width: int = width) -> None:
                target.head(rows.forward(tokens, starts, CONTEXT + width, True).final)  # noqa: B023

            def products(inputs: Any = inputs) -> None:
                for states, weight in zip(inputs, weights, strict=True):
                    F.linear(states, weight)

            whole, bare = by_turns([forward, products])
            first = first or whole
            cells = (1e3 * whole, 1e3 * bare, 1e3 * (whole - bare))
            table.add_row(
                f"{count}", f"{width}", *(f"{cell:.2f}" for cell in cells), f"{whole / first:.2f}"
            )
    return table


def by_turns(steps: list[Callable[[], None]], repeats: int = 60) -> list[float]:
    """Median processor seconds of each, a warm-up left out."""
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 3):
        for step, own in zip(steps, taken, strict=True):
            begun = time.process_time()
            step()
            own.append(time.process_time() - begun)
    return [median(own[3:]) for own in taken]


if __name__ == "__main__":
    main()
