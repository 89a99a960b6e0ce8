"""The fused objective against the eager one: time and peak memory, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/objective.py
    OMP_NUM_THREADS=1 python benchmarks/objective.py --vocabulary 4096 32768 --chunk-size 64 256
    python benchmarks/objective.py                                     # on a GPU

On a processor the problem is Qwen3's vocabulary over small hidden states, fp32: V 151,936, D 512, R
256, 896 slots; on a GPU it is Qwen3-4B's in bf16: D 2,560, 3,584 slots. The slots are those of
blocks of 7 at anchors drawn from `--answer` tokens (one sample's), so several are held against the
same position of the target. All sides are measured in turns and give the same loss. Memory is the
most that is allocated above inputs and head weights, gradients included. "of the peak" is the
matrix work of the fused version (every position once) over what the device does at most
(`machine.peak_flops`; on a processor, what a square product reaches).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from steps import close, described, device_here, in_turns, peak_bytes, spread

from deepspec.config.schema import ObjectiveConfig
from deepspec.machine import peak_flops
from deepspec.objective import LossInputs, compute_loss
from deepspec.targets import FrozenHead

BLOCK = 7


def main() -> None:
    """Measure every combination and print the table."""
    device = device_here()
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151_936])
    parser.add_argument("--slots", type=int, nargs="+", default=[3584 if cuda else 896])
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[ObjectiveConfig().chunk_size])
    parser.add_argument("--answer", type=int, default=1024 if cuda else 256)
    parser.add_argument("--hidden", type=int, default=2560 if cuda else 512)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    parser.add_argument("--compile", action="store_true", help="also where it is not the default")
    options = parser.parse_args()
    table = Table()
    for column in ("V", "slots", "positions", "", "ms (middle half)", "times faster"):
        table.add_column(column, justify="right" if column else "left")
    for column in ("peak MB", "times less", "of the peak"):
        table.add_column(column, justify="right")
    for vocabulary, slots in product(options.vocabulary, options.slots):
        for row in measured(vocabulary, slots, options, device):
            table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(described())


def measured(
    vocabulary: int, slots: int, options: argparse.Namespace, device: torch.device
) -> list[tuple[str, ...]]:
    """The rows of one problem, eager first."""
    inputs, head = problem(vocabulary, slots, options, device)
    sides = {"eager": ObjectiveConfig(implementation="eager")}
    ways = ["never", "always"] if options.compile or device.type == "cuda" else ["never"]
    for size, way in product(options.chunk_size, ways):
        name = f"fused, chunk {size}" + (", compiled" if way == "always" else "")
        sides[name] = ObjectiveConfig(chunk_size=size, compile=way)
    steps = {name: step(inputs, head, config) for name, config in sides.items()}
    close([run() for run in steps.values()], 1e-4 if device.type == "cpu" else 2e-2)
    memory = {name: peak_bytes(run) for name, run in steps.items()}
    seconds = in_turns(steps, options.repeats, warm_up=0)
    positions = len(inputs.target_rows.unique())
    size, rank = options.hidden, options.rank
    work = vocabulary * (2 * size * positions + (4 * size + 6 * rank) * slots)
    peak = peak_flops(device, "bf16" if device.type == "cuda" else "fp32")
    rows = []
    for name, taken in seconds.items():
        share = "unknown" if peak is None else f"{work / median(taken) / peak:.0%}"
        rows.append(
            (
                f"{vocabulary:,}",
                f"{slots:,}",
                f"{positions:,}",
                name,
                spread(taken),
                f"{median(seconds['eager']) / median(taken):.2f}",
                f"{memory[name] / 1e6:,.0f}",
                f"{memory['eager'] / memory[name]:.1f}",
                share,
            )
        )
    return rows


def step(inputs: LossInputs, head: FrozenHead, config: ObjectiveConfig) -> Callable[[], float]:
    """Forward and backward; gives the loss."""
    denominator = float(inputs.weights.sum())

    def run() -> float:
        for leaf in (inputs.hidden, inputs.latent, inputs.bias_weight, inputs.confidence_logits):
            assert leaf is not None
            leaf.grad = None
        loss = compute_loss(inputs, head, head, config, denominator).loss
        loss.backward()
        return float(loss.detach())

    return run


def problem(
    vocabulary: int, slots: int, options: argparse.Namespace, device: torch.device
) -> tuple[LossInputs, FrozenHead]:
    """Random slots, all of them counted; latents are those of the previous token."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int, std: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        values = torch.empty(shape, dtype=kind, device=device)
        return values.normal_(std=std, generator=generator)

    draw = torch.Generator().manual_seed(0)
    answer, size, rank = options.answer, options.hidden, options.rank
    often = torch.rand(answer + BLOCK, generator=draw) ** 3 * vocabulary
    tokens = often.long().to(device)
    anchors = torch.randperm(answer, generator=draw)[: -(-slots // BLOCK)].sort().values.to(device)
    rows = (anchors[:, None] + torch.arange(BLOCK, device=device)).flatten()[:slots]
    previous = tokens[rows]
    latents = normal(vocabulary, rank)
    inputs = LossInputs(
        hidden=normal(slots, size).requires_grad_(),
        latent=latents[previous].requires_grad_(),
        bias_weight=normal(vocabulary, rank, std=0.02, kind=torch.float32).requires_grad_(),
        confidence_logits=normal(slots, kind=torch.float32).requires_grad_(),
        target_final=normal(answer + BLOCK, size),
        target_rows=rows,
        labels=torch.randint(vocabulary, (slots,), generator=generator, device=device),
        weights=torch.ones(slots, device=device),
        latent_ids=previous,
    )
    return inputs, FrozenHead(normal(vocabulary, size, std=size**-0.5))


if __name__ == "__main__":
    main()
