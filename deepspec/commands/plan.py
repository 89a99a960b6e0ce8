"""Say what a training needs before it starts: memory, disk, traffic, steps.

Loads no weights. Where something cannot fit, it names the first setting under which it would.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspec.config.schema import RunConfig
    from deepspec.planning.plan import Plan, Room

SETTINGS = (
    "recipe=R, gpus=N (processes, one a GPU), memory=80GB (of each; else that of this machine), "
    "tflops=400 (that each does in a second), tokens=950 (of a sample, where data are not here), "
    "and overrides of the config"
)
EXAMPLES = """\
  deepspec plan recipe=tiny
  deepspec plan recipe=qwen3 gpus=8 memory=80GB engine=zero2
  deepspec plan recipe=qwen3 target.path=./my-qwen3-finetune gpus=1 memory=24GB
"""
HAS_CONFIG = True

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Print the table, and a warning for each thing that does not fit."""
    from pathlib import Path

    from deepspec.commands.settings import given_keys, print_config, recipe_config, take

    values, words = take(settings, "gpus", "memory", "tflops", "tokens", "recipe")
    if "recipe" in values:
        words = [f"recipe={values['recipe']}", *words]
    config = recipe_config(words)
    gpus, tokens = _processes(values.get("gpus"), config), _count("tokens", values.get("tokens"))
    memory = _bytes(values["memory"]) if "memory" in values else None
    rate = _rate(values.get("tflops"))
    if options.cfg:
        print_config(config)
        return
    from rich.table import Table
    from rich.text import Text

    from deepspec.commands.beginnings import adopt_origin
    from deepspec.streams import visible
    from deepspec.terminal import Terminal

    config = adopt_origin(config, given_keys(words), Path(config.out) / "checkpoints")
    plan, room, origin = _plan(config, gpus, memory, tokens)
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for what, size, how in (
        *_counts(plan, origin),
        *_hours(plan, rate),
        *_memory(plan, room),
        *_disk(plan, room),
    ):
        table.add_row(*map(visible, (what, size, how)))
    Terminal().print(table)
    for warning in _warnings(plan, room):
        Terminal().print(Text.assemble(("does not fit:", "yellow"), f" {visible(warning)}"))


def _plan(
    config: RunConfig, gpus: int | None, memory: int | None, tokens: int | None
) -> tuple[Plan, Room, str | None]:
    from pathlib import Path

    import psutil
    import torch

    from deepspec.atomic import free_bytes
    from deepspec.commands.stages import check_trained, quiet_libraries
    from deepspec.planning.plan import Room, make_plan
    from deepspec.planning.shapes import Job, shapes_of
    from deepspec.planning.target import plan_target
    from deepspec.planning.workload import read_workload

    check_trained(config)
    quiet_libraries()
    device = config.engine.device
    there = torch.cuda.is_available()
    cuda = device == "cuda" or (device == "auto" and (there or gpus is not None))
    target, origin = plan_target(config.target)
    job = Job(config, shapes_of(target, config.drafter), gpus or 1, cuda)
    if memory is None and cuda:
        memory = torch.cuda.get_device_properties(0).total_memory if there else None
    elif memory is None:  # the processes share it
        memory = psutil.virtual_memory().total // job.world
    plan = make_plan(job, read_workload(config, target.tokenizer, tokens))
    return plan, Room(memory, free_bytes(Path(config.out))), origin


def _counts(plan: Plan, origin: str | None) -> Iterator[tuple[str, str, str]]:
    job, config, batch = plan.job, plan.job.config, plan.batch
    yield "target", f"{job.shapes.target_parameters:,}", f"parameters of {config.target.path}"
    if origin is not None:
        yield "", "", f"shape: {origin}"
    yield "drafter", f"{job.shapes.trainable:,}", "trainable parameters"
    samples = "unknown" if plan.workload.samples is None else f"{plan.workload.samples:,}"
    yield "samples", samples, f"{plan.workload.mean_tokens(config):,.0f} tokens on average"
    yield "", "", f"lengths: {plan.workload.source}"
    steps = "unknown" if plan.steps is None else f"{plan.steps:,}"
    epoch = "unknown" if plan.steps_an_epoch is None else f"{plan.steps_an_epoch:,}"
    yield "steps", steps, f"{epoch} an epoch; {job.micro_batches} micro-batches a step and process"
    yield "micro-batch", f"{batch.tokens:,}", f"tokens, {batch.slots:,} slots: the largest"


def _hours(plan: Plan, rate: float | None) -> Iterator[tuple[str, str, str]]:
    from deepspec.planning.work import H100

    yield "work a step", f"{plan.step_flops / 1e12:,.1f} TFLOP", "matrix products, all processes"
    if rate is None and plan.job.cuda:
        rate = H100
    if rate is not None and (hours := plan.hours(rate)) is not None:
        each = f"at {rate / 1e12:,.0f} TFLOP/s a GPU (tflops=); answers are not in it"
        yield "training", f"{hours:,.1f} hours", each


def _memory(plan: Plan, room: Room) -> Iterator[tuple[str, str, str]]:
    job, memory = plan.job, plan.memory
    kind = "GPU" if job.cuda else "process"
    yield f"memory a {kind}", shown(memory.peak), f"most in a step, at: {memory.when}"
    if room.device is not None:
        yield "  there is", shown(room.device), ""
    for name, size in memory.parts.items():
        rough = name == "target's forward" and job.shapes.text.model_type == "deepseek_v4"
        yield f"  {name}", shown(size), "a guess: its attention is not modelled" if rough else ""
    if memory.host:
        yield "beside it, a process", shown(memory.host), "engine.offload=cpu"


def _disk(plan: Plan, room: Room) -> Iterator[tuple[str, str, str]]:
    from deepspec.planning.plan import token_bytes

    job, config = plan.job, plan.job.config
    yield "a checkpoint", shown(plan.checkpoint), "weights and two moments, fp32"
    yield "checkpoints", shown(plan.checkpoints), f"most at a time; {shown(room.disk)} free at out="
    tokens = plan.workload.tokens(config)
    step = config.training.batch_size * plan.workload.mean_tokens(config)
    for dtype in ("bfloat16", "float8"):
        each = token_bytes(job, dtype)
        total = "unknown" if tokens is None else shown(tokens * each)
        yield f"stored features, {dtype}", total, f"at most {each:,} bytes a token"
        yield f"remote features, {dtype}", shown(step * each), "on the wire a step"


def _warnings(plan: Plan, room: Room) -> Iterator[str]:
    import torch

    from deepspec.features.encoding import resolve_dtype
    from deepspec.planning.advice import advise
    from deepspec.planning.plan import make_plan, token_bytes

    if room.device is not None and plan.need > room.device:
        change = advise(plan.job, lambda job: make_plan(job, plan.workload).need, room.device)
        words = [f"{key.removesuffix('.kind')}={value}" for key, value in (change or {}).items()]
        yield f"{shown(plan.need)} on a device of {shown(room.device)}; " + (
            f"{' '.join(words)} would" if words else "no setting helps: it needs a larger device"
        )
    tokens = plan.workload.tokens(plan.job.config)
    if plan.job.config.features.source == "hybrid" and tokens is not None:
        dtype = resolve_dtype(
            plan.job.config.extract.dtype, {2: torch.bfloat16}.get(plan.job.value, torch.float32)
        )
        size = tokens * token_bytes(plan.job, dtype)
        if plan.checkpoints + size > room.disk:
            yield (
                f"stored features of {shown(size)} on a disk with {shown(room.disk)} free; set "
                "features.path= to another one"
                + ("" if dtype == "float8" else ", or extract.dtype=float8")
            )
    if plan.checkpoints > room.disk:
        yield (
            f"checkpoints of {shown(plan.checkpoints)} on a disk with {shown(room.disk)} free; set "
            "out= to another one"
            + (", or training.keep_last=1" if plan.job.config.training.keep_last > 1 else "")
        )


def _processes(word: str | None, config: RunConfig) -> int | None:
    from deepspec.errors import ConfigError

    count = _count("gpus", word)
    if count is not None and count > 1 and config.engine.kind == "single":
        raise ConfigError(
            f"gpus={word}, but engine=single is one process; set engine=zero0 (replicas), zero1, "
            "zero2 or zero3 (sharded by DeepSpeed)"
        )
    return count


def _count(name: str, word: str | None) -> int | None:
    from deepspec.commands.settings import whole_number

    return None if word is None else whole_number(name, word)


def _rate(word: str | None) -> float | None:
    from deepspec.errors import ConfigError

    if word is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", word) is None or not float(word):
        raise ConfigError(f"tflops={word} must be a number above 0, such as 400")
    return float(word) * 1e12


def _bytes(word: str) -> int:
    from deepspec.errors import ConfigError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", word.upper())
    if found is None or not float(found[1]):
        raise ConfigError(f"memory={word} must be a size with its unit, such as 80GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


def shown(size: float) -> str:
    """Bytes in the largest unit that leaves a whole: 1234567 -> 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
