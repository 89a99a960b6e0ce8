"""Measure steps a second against tokens verified in a step, on this machine.

Saves the table that decoding.throughput takes, for scheduler=algorithm1 and async.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspec.streams import show

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table as RichTable

    from deepspec.commands.sources import Source
    from deepspec.config.schema import RunConfig
    from deepspec.evaluation.profiling import Load
    from deepspec.scheduling.throughput import Throughput

SETTINGS = (
    "recipe=R (the target alone), or run=DIR or checkpoint=DIR (and that drafter's own time), "
    "rows=N (requests in a batch, else decoding.batch_size), tokens=[1,2,4] (verified in a step, "
    "else up to a whole block of each request), context=256 (tokens of each request), "
    "temperature=1, repeats=20, out=FILE, and overrides of the config"
)
EXAMPLES = """\
  deepspec profile run=runs/tiny rows=16 out=throughput.json
  deepspec profile recipe=qwen3 rows=64 context=1024
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Measure, save, and print the table."""
    from pathlib import Path

    from deepspec.commands.settings import non_negative, print_config, take, whole_number
    from deepspec.config.loading import load_config
    from deepspec.errors import ConfigError

    own = ("tokens", "rows", "context", "repeats", "temperature", "out")
    values, overrides = take(settings, "run", "checkpoint", "recipe", *own)
    given = [values[key] for key in ("run", "checkpoint") if key in values]
    if len(given) > 1 or not (given or "recipe" in values):
        raise ConfigError("give one of recipe=R, run=DIR and checkpoint=DIR")
    from deepspec.commands.sources import open_source

    source = open_source(Path(given[0]), overrides, values.get("recipe")) if given else None
    config = source.config if source else load_config(values["recipe"], overrides)
    if options.cfg:
        print_config(config)
        return
    from deepspec.evaluation.profiling import Load
    from deepspec.outputs import THROUGHPUT, output_file

    load = Load(
        rows=whole_number("rows", values.get("rows", str(config.decoding.batch_size))),
        context=whole_number("context", values.get("context", "256")),
        repeats=whole_number("repeats", values.get("repeats", "20")),
        temperature=non_negative("temperature", values.get("temperature", "1")),
        compiled=config.decoding.compile,
    )
    default = f"runs/throughput-{config.recipe}.json"
    with output_file(values.get("out"), default, THROUGHPUT) as out:
        _measure(config, source, load, values.get("tokens"), out)


def _measure(
    config: RunConfig, source: Source | None, load: Load, tokens: str | None, out: Path
) -> None:
    from dataclasses import asdict
    from datetime import UTC, datetime

    from deepspec import __version__
    from deepspec.commands.stages import open_target
    from deepspec.drafters.base import Proposer
    from deepspec.drafters.registry import open_proposer
    from deepspec.errors import ConfigError
    from deepspec.evaluation.profiling import Blanks, default_tokens, profile
    from deepspec.machine import describe_machine
    from deepspec.terminal import Terminal

    wanted = _listed(tokens) if tokens is not None else None
    target = open_target(config)
    proposer: Proposer
    if source is not None:
        proposer = open_proposer(source.kind, source.load(target), target)
    else:
        proposer = Blanks(config.drafter.block_size)
    most = load.rows * (proposer.block_size + 1)
    if wanted and wanted[-1] > most:
        raise ConfigError(
            f"tokens={tokens}: {load.rows} rows have at most {proposer.block_size} drafts and one "
            f"token each, {most} in all; raise rows="
        )
    about = {
        "target": target.name,
        "drafter": str(source.place) if source else None,
        **asdict(load),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": describe_machine(),
    }
    counts = wanted or default_tokens(load.rows, proposer.block_size)
    table = profile(target, proposer, load, counts, about)
    table.save(out)
    Terminal().print(_shown(table, load))
    show(f"throughput: {out}")
    words = ["decoding.scheduler=algorithm1", f"decoding.throughput={out}"]
    show(f"next:       {shlex.join(words)}")


def _shown(table: Throughput, load: Load) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ["tokens", "rows", "steps/s", "ms a step", "spread", "tokens/s"]
    if table.knows_drafting:
        names += ["ms to draft", "ms to observe"]
    for name in names:
        drawn.add_column(name, justify="right")

    def milliseconds(seconds: float | None) -> str:
        return "" if seconds is None else f"{1e3 * seconds:,.2f}"

    for point in table.points:
        drawn.add_row(
            f"{point.tokens:,}",
            f"{min(point.tokens, load.rows):,}",
            f"{point.steps_per_second:,.1f}",
            f"{1e3 / point.steps_per_second:,.2f}",
            f"{point.spread or 0:.0%}",
            f"{point.tokens * point.steps_per_second:,.0f}",
            *map(milliseconds, (point.propose_seconds, point.observe_seconds)[: len(names) - 6]),
        )
    return drawn


def _listed(word: str) -> list[int]:
    from deepspec.commands.settings import listed, whole_number
    from deepspec.errors import ConfigError

    counts = sorted({whole_number("tokens", part) for part in listed("tokens", word)})
    if len(counts) < 2:
        raise ConfigError(f"tokens={word} must be at least two numbers, such as [1,2,4,8]")
    return counts
