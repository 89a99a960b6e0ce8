"""Drafters under load: what `deepspec load` measures, set up from drafters on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from deepspec import __version__
from deepspec.commands.confidences import calibration_of
from deepspec.commands.sources import Source
from deepspec.commands.stages import open_target
from deepspec.config.schema import RunConfig
from deepspec.decoding import Decoder, NoDrafts, Sampling
from deepspec.drafters.base import Drafter, Proposer
from deepspec.drafters.registry import open_proposer
from deepspec.errors import ConfigError
from deepspec.evaluation.benchmarks import check_benchmarks
from deepspec.evaluation.evaluate import load_benchmark
from deepspec.evaluation.profiling import Load, default_tokens, profile
from deepspec.machine import describe_machine
from deepspec.progress import say
from deepspec.scheduling.calibration import Scaling
from deepspec.scheduling.schedulers import open_schedule
from deepspec.scheduling.throughput import Throughput, read_throughput
from deepspec.serving.contest import Conditions, Contender, contest, save_rounds
from deepspec.serving.loop import Prompt
from deepspec.serving.policies import BY_TABLE, PLAIN, WHOLE, decoding_by, needs_confidence
from deepspec.serving.record import LoadRecord, write_records
from deepspec.serving.traffic import Level
from deepspec.targets import Target
from deepspec.targets.identity import differing

CONTEXT, REPEATS = 128, 12  # of requests while the table is measured: see `Load`


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

    Raises ConfigError for a policy that the drafter has no confidences for, for drafters of another
    target, and without prompts.
    """
    config = source.config
    check_benchmarks(config.evaluation.benchmarks)
    if config.decoding.compile:  # as batches of new sizes come, in the midst of what is timed
        say("decoding.compile=true plays no part in a load")
    target = open_target(config)
    drafter = source.load(target)
    scaling = scaling_of(source, drafter, policies, temperature)
    proposer = open_proposer(source.kind, drafter, target)
    conditions = _conditions(config, target, temperature, seconds)
    out.mkdir(parents=True, exist_ok=True)
    most = max(level.concurrency for level in levels)
    load = Load(rows=most, context=CONTEXT, repeats=REPEATS, temperature=temperature)
    path = out / table_name(source.kind)
    table = None
    if config.decoding.throughput is not None:
        table = read_throughput(config.decoding.throughput)
        table.save(path)
    elif any(policy in BY_TABLE for policy in policies):
        table = _measured(target, proposer, load, path)
    contenders = _contenders(source, policies, target, proposer, most, scaling, table)
    for other, name in zip(others, _names(source, others), strict=True):
        own, its = _beside(other, target)
        stop = config.decoding.stop_token_ids
        contenders.append(Contender(WHOLE, name, partial(Decoder, own, its, most, stop)))
        if table is not None:  # the simulator's
            _measured(own, its, load, out / table_name(name))
    minutes = len(contenders) * len(levels) * seconds / 60
    say(
        f"load: {len(contenders)} policies, {len(levels)} levels, {seconds:g} s each: "
        f"{minutes:.1f} min"
    )
    records, rounds = contest(contenders, levels, conditions)
    about = {
        **_about(source, others, target),
        "temperature": temperature,
        "seconds": seconds,
        "scaling": scaling and asdict(scaling),
        "block_size": proposer.block_size,
    }
    write_records(records, about, out, "load")
    save_rounds(rounds, out / "traces.jsonl")
    return records


def _contenders(
    source: Source,
    policies: Sequence[str],
    target: Target,
    proposer: Proposer,
    most: int,
    scaling: Scaling | None,
    table: Throughput | None,
) -> list[Contender]:
    """Each policy with the drafter of `source`, of at most `most` requests at once."""
    decoding = source.config.decoding

    def open_decoder(policy: str) -> Decoder:
        """A new one that goes by `policy`."""
        if policy == PLAIN:
            return Decoder(target, NoDrafts(), most, decoding.stop_token_ids)
        schedule = open_schedule(decoding_by(policy, decoding), scaling, table)
        return Decoder(target, proposer, most, decoding.stop_token_ids, schedule)

    return [
        Contender(policy, "" if policy == PLAIN else source.kind, partial(open_decoder, policy))
        for policy in policies
    ]


def _about(source: Source, others: Sequence[Source], target: Target) -> dict[str, Any]:
    """What was measured, when and where."""
    return {
        "target": target.name,
        "drafter": source.kind,
        "drafters": [str(each.place) for each in (source, *others)],
        "threshold": source.config.decoding.threshold,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": describe_machine(),
    }


def _conditions(
    config: RunConfig, target: Target, temperature: float, seconds: float
) -> Conditions:
    decoding = config.decoding
    sampled = Sampling(temperature, decoding.top_p, decoding.top_k)
    return Conditions(
        prompts=mixed_prompts(config, target),
        sampling=sampled if temperature else Sampling(),
        max_new_tokens=decoding.max_new_tokens,
        seconds=seconds,
        seed=config.seed,
    )


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


def table_name(drafter: str) -> str:
    """The file in out= that holds the throughput with a drafter."""
    return f"throughput-{drafter}.json"


def _measured(target: Target, proposer: Proposer, load: Load, path: Path) -> Throughput:
    """Steps a second with a drafter, measured now and saved."""
    about = {**asdict(load), "target": target.name, "machine": describe_machine()}
    counts = default_tokens(load.rows, proposer.block_size)
    table = profile(target, proposer, load, counts, about)
    table.save(path)
    return table


def _names(source: Source, others: Sequence[Source]) -> list[str]:
    """What the `others` are called: by their kinds, the second of a kind with a number."""
    kinds = [each.kind for each in (source, *others)]
    return [
        kind + (f"-{kinds[:place].count(kind) + 1}" if kind in kinds[:place] else "")
        for place, kind in enumerate(kinds)
    ][1:]


def _beside(source: Source, target: Target) -> tuple[Target, Proposer]:
    """Another drafter, with a copy of the target that captures the layers it reads."""
    own = open_target(source.config)
    if different := differing(own.identity, target.identity):
        raise ConfigError(
            f"against={source.place} was made for another target: {own.name} differs from "
            f"{target.name} in {', '.join(different)}"
        )
    return own, open_proposer(source.kind, source.load(own), own)
