"""Drafters under load: what `deepspec load` measures, set up from drafters on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from deepspec import __version__
from deepspec.commands.confidences import calibration_of
from deepspec.commands.sources import Source
from deepspec.commands.stages import open_target
from deepspec.config.schema import RunConfig
from deepspec.decoding import Decoder, NoDrafts, Sampling
from deepspec.drafters.base import Drafter, Proposer
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import ConfigError
from deepspec.evaluation.evaluate import load_benchmark
from deepspec.evaluation.profiling import Load, default_tokens, profile
from deepspec.machine import describe_machine
from deepspec.progress import say
from deepspec.scheduling.calibration import Scaling
from deepspec.scheduling.schedulers import open_schedule
from deepspec.scheduling.throughput import Throughput, read_throughput
from deepspec.serving.contest import Conditions, Contender, Level, contest, save_rounds
from deepspec.serving.loop import Prompt
from deepspec.serving.policies import BY_TABLE, PLAIN, WHOLE, decoding_by, needs_confidence
from deepspec.serving.record import LoadRecord, write_records
from deepspec.targets import Target
from deepspec.targets.identity import differing

CONTEXT = 128  # tokens a request has behind it while the table is measured


def measure_load(
    source: Source,
    others: Sequence[Source],
    policies: Sequence[str],
    levels: Sequence[Level],
    seconds: float,
    temperature: float,
    out: Path,
) -> list[LoadRecord]:
    """Every policy with the drafter of `source`, and the `others` with whole blocks, under every
    level for so many seconds each; records and rounds go to the folder `out`.

    Raises ConfigError for a policy that the drafter has no confidences for, and for drafters of
    another target.
    """
    config = source.config
    target = open_target(config)
    drafter = source.load(target)
    scaling = scaling_of(source, drafter, policies, temperature)
    proposer = open_proposer(source, drafter, target)
    conditions = Conditions(
        prompts=mixed_prompts(config, target),
        sampling=Sampling(temperature, config.decoding.top_p, config.decoding.top_k)
        if temperature
        else Sampling(),
        max_new_tokens=config.decoding.max_new_tokens,
        seconds=seconds,
        seed=config.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    most = max(level.concurrency for level in levels)
    table = None
    if any(policy in BY_TABLE for policy in policies):
        table = throughput_of(config, target, proposer, most, temperature, out)
    stop = config.decoding.stop_token_ids

    def open_decoder(policy: str) -> Decoder:
        if policy == PLAIN:
            return Decoder(target, NoDrafts(), most, stop)
        schedule = open_schedule(decoding_by(policy, config.decoding), scaling, table)
        return Decoder(target, proposer, most, stop, schedule)

    contenders = [
        Contender(policy, "" if policy == PLAIN else source.kind, partial(open_decoder, policy))
        for policy in policies
    ]
    contenders += [_other(other, target, most, stop) for other in others]
    say(
        f"load: {len(contenders)} policies, {len(levels)} levels, {seconds:g} s each: "
        f"{len(contenders) * len(levels) * seconds / 60:.1f} min"
    )
    records, rounds = contest(contenders, levels, conditions)
    save_rounds(rounds, out / "traces.jsonl")
    about = {
        "target": target.name,
        "drafters": [str(each.place) for each in (source, *others)],
        "temperature": temperature,
        "seconds": seconds,
        "scaling": scaling and asdict(scaling),
        "block_size": proposer.block_size,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": describe_machine(),
    }
    write_records(records, about, out, "load")
    return records


def open_proposer(source: Source, drafter: Drafter, target: Target) -> Proposer:
    """The `drafter` of `source` inside the decoding loop."""
    return drafter_kind(source.kind).proposer(drafter.to(target.device), target)


def mixed_prompts(config: RunConfig, target: Target) -> list[Prompt]:
    """Those of the evaluation's benchmarks, one of each in turn."""
    benchmarks = [load_benchmark(name, config, target)[1] for name in config.evaluation.benchmarks]
    longest = max(map(len, benchmarks))
    return [
        Prompt(prompts[place].request, prompts[place].tokens)
        for place in range(longest)
        for prompts in benchmarks
        if place < len(prompts)
    ]


def scaling_of(
    source: Source, drafter: Drafter, policies: Sequence[str], temperature: float
) -> Scaling | None:
    """What policies that look at confidences see them through; None: as they are."""
    looking = [policy for policy in policies if needs_confidence(policy)]
    if not looking:
        return None
    decoding = decoding_by(looking[0], source.config.decoding)
    asked = replace(source, config=replace(source.config, decoding=decoding))
    calibration = calibration_of(asked, drafter)
    if calibration is None:
        return None
    return calibration.scaling(temperature, decoding.top_p, decoding.top_k)


def throughput_of(
    config: RunConfig,
    target: Target,
    proposer: Proposer,
    rows: int,
    temperature: float,
    out: Path,
) -> Throughput:
    """The table of `decoding.throughput`, or one measured now and saved in `out`."""
    if config.decoding.throughput is not None:
        return read_throughput(config.decoding.throughput)
    load = Load(rows=rows, context=CONTEXT, repeats=20, temperature=temperature)
    about = {**asdict(load), "target": target.name, "machine": describe_machine()}
    counts = default_tokens(rows, proposer.block_size)
    table = profile(target, proposer, load, counts, about)
    table.save(out / "throughput.json")
    return table


def _other(source: Source, target: Target, most: int, stop: list[int] | None) -> Contender:
    """Another drafter with whole blocks; its own copy of the target captures its layers."""
    own = open_target(source.config)
    if different := differing(own.identity, target.identity):
        raise ConfigError(
            f"against={source.place} was made for another target: {own.name} differs from "
            f"{target.name} in {', '.join(different)}"
        )
    proposer = open_proposer(source, source.load(own), own)
    return Contender(WHOLE, source.kind, lambda: Decoder(own, proposer, most, stop))


def records_table(records: Sequence[LoadRecord]) -> Table:
    """For a terminal."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("at once", "policy", "tokens/s", "a user", "budget", "accepted", "wait p90"):
        drawn.add_column(name, justify="left" if name == "policy" else "right")

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    before: Any = None
    for record in records:
        level = (record.concurrency, record.rate)
        if before not in (None, level):
            drawn.add_section()
        before = level
        rate = "" if record.rate is None else f", {record.rate:g}/s"
        drawn.add_row(
            f"{record.concurrency}{rate}",
            f"{record.policy} {record.drafter}",
            shown(record.throughput, ",.0f"),
            shown(record.user_p50, ".1f"),
            shown(record.budget, ".2f"),
            shown(record.accepted_length, ".2f"),
            shown(record.wait_p90, ".2f"),
        )
    return drawn
