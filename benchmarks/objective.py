"""The fused objective against the eager one: seconds and peak memory, forward and backward, fp32.

    python benchmarks/objective.py
    python benchmarks/objective.py --threads 1 --repeats 3 --chunk-size 256

The problem is a Qwen3-sized vocabulary: V 151,936, D 512, R 256, 896 slots (128 blocks of 7). Each
implementation runs in a process of its own. Seconds are the median of the repeats after a small
warm-up: wall clock, and processor time, which a busy machine disturbs less. Memory is the process's
peak resident set over the whole measurement, above what it held before the first call (inputs and
head weights: 0.7 GiB), so the gradients that stay behind are counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from statistics import median

import psutil
import torch
from rich.console import Console
from rich.table import Table

from deepspec.config.schema import ObjectiveConfig
from deepspec.machine import describe_machine
from deepspec.objective import LossInputs, compute_loss
from deepspec.targets import FrozenHead

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
WARM_UP_SLOTS = 4


@dataclass(frozen=True)
class Measured:
    """Medians over the repeats; `memory` in bytes; `loss` shows that both computed the same."""

    wall: float
    cpu: float
    memory: int
    loss: float


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--slots", type=int, default=896)
    parser.add_argument("--chunk-size", type=int, default=ObjectiveConfig().chunk_size)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", choices=("eager", "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(asdict(measure(options))))
        return
    eager, fused = measure_apart("eager"), measure_apart("fused")

    table = Table(title=f"objective, {options.slots} slots, V {options.vocabulary}")
    for column in ("", "wall s", "CPU s", "peak MiB", "loss"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in (("eager", eager), (f"fused, chunk {options.chunk_size}", fused)):
        memory = f"{found.memory / 2**20:.0f}"
        table.add_row(name, f"{found.wall:.2f}", f"{found.cpu:.2f}", memory, f"{found.loss:.6f}")
    table.add_row(
        "eager / fused",
        *(f"{getattr(eager, x) / getattr(fused, x):.2f}" for x in ("wall", "cpu", "memory")),
    )
    machine = describe_machine()
    Console().print(table)
    print(f"{machine['processor']}, {options.threads} threads, torch {machine['torch']}")


def measure_apart(implementation: str) -> Measured:
    """`measure` in a new process, so that peaks do not mix."""
    command = [sys.executable, *sys.argv, "--measure", implementation]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout))


def measure(options: argparse.Namespace) -> Measured:
    """One implementation, in this process."""
    torch.set_num_threads(options.threads)
    config = ObjectiveConfig(implementation=options.measure, chunk_size=options.chunk_size)
    inputs, head = problem(options)
    few = {
        name: getattr(inputs, name)[:WARM_UP_SLOTS].detach()
        for name in ("hidden", "latent", "confidence_logits", "target_final", "labels", "weights")
    }
    compute_loss(replace(inputs, **few), head, head, config, 1.0)

    before = psutil.Process().memory_info().rss
    walls, cpus = [], []
    for _ in range(options.repeats):
        for leaf in (inputs.hidden, inputs.latent, inputs.bias_weight, inputs.confidence_logits):
            assert leaf is not None
            leaf.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        output = compute_loss(inputs, head, head, config, float(inputs.weights.sum()))
        output.loss.backward()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return Measured(median(walls), median(cpus), peak - before, output.loss.item())


def problem(options: argparse.Namespace) -> tuple[LossInputs, FrozenHead]:
    """Random slots, all of them counted. Made in place: a temporary here would raise the peak."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, trained: bool = False) -> torch.Tensor:
        values = torch.empty(shape).normal_(std=std, generator=generator)
        return values.requires_grad_(trained)

    vocabulary, size, slots = options.vocabulary, options.hidden, options.slots
    inputs = LossInputs(
        hidden=normal(slots, size, trained=True),
        latent=normal(slots, options.rank, trained=True),
        bias_weight=normal(vocabulary, options.rank, std=0.02, trained=True),
        confidence_logits=normal(slots, trained=True),
        target_final=normal(slots, size),
        labels=torch.randint(vocabulary, (slots,), generator=generator),
        weights=torch.ones(slots),
    )
    return inputs, FrozenHead(normal(vocabulary, size, std=size**-0.5))


if __name__ == "__main__":
    main()
