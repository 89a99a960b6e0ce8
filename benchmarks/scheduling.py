"""What a scheduler costs a round, and what it saves: positions that are not verified.

    OMP_NUM_THREADS=1 python benchmarks/scheduling.py
    OMP_NUM_THREADS=1 python benchmarks/scheduling.py --requests 64 --block 7

First table: microseconds a round of each scheduler at 256 requests of 16 drafts, from confidences
(calibrated) to a length a row, beside a greedy round of the embedded target with a drafter of
recipe=tiny's shape (untrained: what it says does not matter here) that algorithm 1 schedules.
Medians of processor time, which a busy machine disturbs less. The algorithm 1 of the last row goes
a draft at a time, as the paper writes it.

Second table: one target forward of a batch whose longest row has 8 tokens and all others fewer,
padded to it and packed, in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from deepspec.config.resources import resource
from deepspec.config.schema import DrafterConfig, TargetConfig
from deepspec.decoding import Decoder, Sampling
from deepspec.decoding.rows import Rows
from deepspec.drafters.registry import drafter_kind, open_proposer
from deepspec.machine import describe_machine
from deepspec.records import Proposal
from deepspec.scheduling.calibration import Floats, Scaling
from deepspec.scheduling.schedulers import (
    Algorithm1,
    Asynchronous,
    ConfidenceSchedule,
    Ints,
    Threshold,
)
from deepspec.scheduling.throughput import Point, Throughput
from deepspec.targets import Target, load_target

THROUGHPUT = Throughput((Point(1, 100.0), Point(512, 60.0), Point(8192, 5.0)))
CONTEXT = 64


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = TargetConfig(str(resource("data/tiny_target")), dtype="float32", num_layer_ids=4)
    target = load_target(config, "cpu")
    with torch.inference_mode():
        tables = [
            cost(target, options.requests, options.block, options.repeats),
            packing(target, max(5, options.repeats // 10)),
        ]
    machine = describe_machine()
    console = Console()
    console.print(f"{machine['processor']}, one thread, torch {torch.__version__}")
    for table in tables:
        console.print(table)


def cost(target: Target, requests: int, block: int, repeats: int) -> Table:
    """Microseconds of each scheduler, and their share of a round."""
    confidence = torch.from_numpy(np.random.default_rng(0).beta(4, 1, (requests, block)))
    proposal = Proposal(torch.zeros(requests, block, dtype=torch.int64), None, confidence.float())
    scaling = Scaling((1.2,) * block, (-0.1,) * block)
    policies: dict[str, Callable[[Floats, Ints], Ints]] = {
        "threshold": Threshold(0.5),
        "algorithm 1": Algorithm1(THROUGHPUT),
        "asynchronous": Asynchronous(THROUGHPUT),
        "algorithm 1, a draft at a time": one_by_one,
    }
    whole, verified = a_round(target, requests, block, ConfidenceSchedule(policies["algorithm 1"]))
    table = Table(
        title=f"{requests} requests, {block} drafts each; a round, {verified:.0f} drafts verified: "
        f"{1e3 * whole:.0f} ms"
    )
    for name in ("scheduler", "microseconds a round", "of the round", "drafts admitted"):
        table.add_column(name, justify="left" if name == "scheduler" else "right")
    for name, policy in policies.items():
        schedule = ConfidenceSchedule(policy, scaling)
        limits = [block] * requests
        admitted = sum(schedule(proposal, limits))
        taken = median(seconds(lambda: schedule(proposal, limits), repeats))  # noqa: B023
        table.add_row(name, f"{1e6 * taken:,.0f}", f"{taken / whole:.2%}", f"{admitted:,}")
    return table


def a_round(
    target: Target, requests: int, block: int, schedule: ConfidenceSchedule
) -> tuple[float, float]:
    """Processor seconds from one call of `schedule` to the next, and drafts verified, medians."""
    kind = drafter_kind("dspark")
    shape = DrafterConfig(num_layers=2, block_size=block, markov_rank=64)
    drafter = kind.build(kind.resolve(shape, target)).eval()
    moments, verified = [], []

    def timed(proposal: Proposal, limits: Sequence[int]) -> Sequence[int]:
        moments.append(time.thread_time())
        lengths = schedule(proposal, limits)
        verified.append(sum(lengths))
        return lengths

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(target.vocab_size, (requests, CONTEXT), generator=generator).tolist()
    decoder = Decoder(target, open_proposer("dspark", drafter, target), requests, [], timed)
    decoder.generate(prompts, Sampling(), 12)
    return median(np.diff(moments).tolist()), median(verified)


def one_by_one(survival: Floats, limits: Ints) -> Ints:
    """Algorithm 1 without vectors."""
    steps = THROUGHPUT.steps_per_second(np.arange(survival.size + len(limits) + 1)).tolist()
    entries = [
        (-chance, row)
        for row, (chances, limit) in enumerate(zip(survival.tolist(), limits, strict=True))
        for chance in chances[:limit]
    ]
    entries.sort(key=lambda entry: entry[0])
    lengths = np.zeros(len(limits), dtype=np.int64)
    tau, tokens = float(len(limits)), len(limits)
    for negative, row in entries:
        if (tau - negative) * steps[tokens + 1] <= tau * steps[tokens]:
            break
        tau, tokens = tau - negative, tokens + 1
        lengths[row] += 1
    return lengths


def packing(target: Target, repeats: int) -> Table:
    """Milliseconds of a forward, padded and packed."""
    table = Table(title="a target forward of rows of different lengths, context 64")
    for name in ("rows", "tokens", "padded to", "padded, ms", "packed, ms", "saved"):
        table.add_column(name, justify="right")
    for requests in (2, 8, 32):
        rows, tokens, starts = prefilled(target, requests, 8)
        for shorter in (8, 6, 4, 2, 1):
            lengths = [8] + [shorter] * (requests - 1)
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(repeats):
                for pack, taken in times.items():
                    rows._state._can_pack = pack
                    taken += seconds(
                        lambda: forward(target, rows, tokens, starts, lengths),  # noqa: B023
                        4,
                    )
            padded, packed = (1e3 * median(taken) for taken in times.values())
            table.add_row(
                f"{requests}",
                f"{sum(lengths)}",
                f"{8 * requests}",
                f"{padded:.1f}",
                f"{packed:.1f}",
                f"{1 - packed / padded:.0%}",
            )
    return table


def prefilled(target: Target, requests: int, width: int) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """Rows that have read CONTEXT tokens, and `width` next ones of each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (requests, CONTEXT + width), generator=generator)
    names = [str(row) for row in range(requests)]
    rows = Rows(target, names, ids[:, :CONTEXT].tolist(), 100, [])
    rows.prefill(with_context=False)
    return rows, ids[:, CONTEXT:], torch.full((requests,), CONTEXT)


def forward(
    target: Target, rows: Rows, tokens: torch.Tensor, starts: torch.Tensor, lengths: list[int]
) -> None:
    """The same step again each time: what was written behind the context is overwritten."""
    width = max(lengths)
    output = rows.forward(tokens[:, :width], starts, CONTEXT + width, False, lengths)
    target.head(output.final)


def seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Processor seconds of each call, two warm-up calls left out."""
    taken = []
    for _ in range(repeats + 2):
        begun = time.thread_time()
        step()
        taken.append(time.thread_time() - begun)
    return taken[2:]


if __name__ == "__main__":
    main()
