"""Weak scaling: samples a second of 1 and 2 processes, on stored features, and where the rest goes.

    deepspec extract recipe=tiny data.limit=400 out=features
    python benchmarks/scaling.py features --processes 1 2

Every process gets `--batch` samples a step, so two do twice the work. Each process has one thread.
Seconds are medians over the steps behind a warm-up, of the main process: reading features (that
which was not read ahead), forward and backward, waiting for and summing with the others (loss
weights, gradients, update). The processes of a run are started by torchrun; the best of `--repeats`
runs of each number is shown, because another program that takes a core for a while makes two
processes wait for the slower one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PARTS = ("features", "forward and backward", "sums and update", "rest")


def main() -> None:
    """Measure every number of processes and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engine", default="zero0", help="zero0, zero1, zero2 or zero3")
    parser.add_argument("--batch", type=int, default=4, help="samples a process and step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    rows = {
        count: max((run(count, options) for _ in range(options.repeats)), key=lambda r: r["rate"])
        for count in options.processes
    }
    table = Table("processes", "samples/s", "scaling", "step ms", *(f"{part} ms" for part in PARTS))
    first = rows[options.processes[0]]["rate"]
    for count, row in rows.items():
        parts = (f"{1000 * row[part]:.1f}" for part in PARTS)
        scaling = f"{row['rate'] / first:.2f}x"
        table.add_row(
            str(count), f"{row['rate']:.1f}", scaling, f"{1000 * row['step']:.1f}", *parts
        )
    Console().print(table)


def run(processes: int, options: argparse.Namespace) -> dict[str, float]:
    """One torchrun of this script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, str(options.store), "--measure"]
    command += ["--engine", options.engine, "--batch", str(options.batch)]
    command += ["--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace) -> None:
    """Train some steps in this process and print seconds by part as JSON."""
    from stored import training_on

    from deepspec.processes import world_size

    torch.set_num_threads(1)
    batch = options.batch * world_size()
    words = [f"engine={options.engine}", f"training.max_steps={options.steps}"]
    words += [f"training.batch_size={batch}", f"training.micro_batch_size={options.batch}"]
    with training_on(options.store, *words) as trainer:
        engine = trainer.engine
        seconds: dict[str, float] = defaultdict(float)
        time_calls(trainer.source, "features", "features", seconds)
        time_calls(trainer, "loss_of", "forward and backward", seconds)
        time_calls(engine, "backward", "forward and backward", seconds)
        time_calls(engine, "update", "sums and update", seconds)
        time_calls(engine, "sum", "sums and update", seconds)
        steps: list[dict[str, float]] = []
        for _ in range(options.steps):
            seconds.clear()
            begun = time.perf_counter()
            trainer.train_step()
            seconds["step"] = time.perf_counter() - begun
            seconds["forward and backward"] -= seconds["features"]  # called inside
            seconds["rest"] = seconds["step"] - sum(seconds[part] for part in PARTS[:3])
            steps.append(dict(seconds))
        warm = steps[len(steps) // 4 :]
        row = {part: median(step[part] for step in warm) for part in (*PARTS, "step")}
        row["rate"] = batch * len(warm) / sum(step["step"] for step in warm)
        if engine.is_main:
            print(json.dumps(row), flush=True)
        engine.close()


def time_calls(owner: Any, name: str, part: str, seconds: dict[str, float]) -> None:
    """Add the wall time of every call of `owner.name` to `seconds[part]`."""
    call: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments, **options)
        seconds[part] += time.perf_counter() - begun
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
