"""Measure throughput and speed a user while load rises, policy beside policy.

A continuous-batching loop on this machine: requests arrive, join, finish and leave. Writes
load.json, load.csv (a line a policy and level) and traces.jsonl (rounds of whole blocks, which
deepspec simulate replays) into out=.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deepspec.streams import show

if TYPE_CHECKING:
    from deepspec.serving.traffic import Level

SETTINGS = (
    "run=DIR or checkpoint=DIR (a checkpoint, a run, or an export, which may take its config from "
    "recipe=R), against=[DIR,...] (other drafters of the same target, with whole blocks), "
    "policies=[plain,fixed,fixed:2,threshold,threshold:0.7,algorithm1,async], "
    "concurrency=[1,2,4,8,16,32] (users that are always busy), rates=[2,8] (requests a second, at "
    "most concurrency=N at once), seconds=10 (a policy and level), temperature=1, out=DIR, and "
    "overrides of the config; decoding.throughput=FILE, else one is measured first"
)
EXAMPLES = """\
  deepspec load run=runs/tiny against=[runs/mtp] out=runs/load
  deepspec load run=runs/tiny concurrency=64 rates=[1,4,16] policies=[plain,fixed:3,algorithm1]
"""
HAS_CONFIG = True

LEVELS, SECONDS, TEMPERATURE = "[1,2,4,8,16,32]", "10", "1"


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Decode under each load, save, and print the table."""
    from pathlib import Path

    from deepspec.commands.settings import listed, non_negative, positive, print_config, take
    from deepspec.errors import ConfigError
    from deepspec.serving.policies import DEFAULT, parse_policies

    own = ("against", "policies", "concurrency", "rates", "seconds", "temperature", "out")
    values, overrides = take(settings, "run", "checkpoint", "recipe", *own)
    given = [values[key] for key in ("run", "checkpoint") if key in values]
    if len(given) != 1:
        raise ConfigError("give one of run=DIR and checkpoint=DIR")
    policies = parse_policies(
        listed("policies", values["policies"]) if "policies" in values else DEFAULT
    )
    levels = parse_levels(values)
    seconds = positive("seconds", values.get("seconds", SECONDS))
    temperature = non_negative("temperature", values.get("temperature", TEMPERATURE))
    from deepspec.commands.sources import open_source

    source = open_source(Path(given[0]), overrides, values.get("recipe"))
    if options.cfg:
        print_config(source.config)
        return
    from deepspec.commands.loads import measure_load
    from deepspec.outputs import LOAD, THROUGHPUT, output_folder
    from deepspec.serving.tables import records_table
    from deepspec.terminal import Terminal

    others = [open_source(Path(place)) for place in listed("against", values.get("against", "[]"))]
    default = f"runs/load-{source.config.recipe}"
    with output_folder(values.get("out"), default, LOAD, THROUGHPUT) as out:
        records = measure_load(source, others, policies, levels, seconds, temperature, out)
    Terminal().print(records_table(records))
    show(f"load:   {out / 'load.csv'}")
    show(f"traces: {out / 'traces.jsonl'}")


def parse_levels(values: Mapping[str, str]) -> list[Level]:
    """The levels that concurrency= and rates= ask for. Raises ConfigError."""
    from deepspec.commands.settings import listed, positive, whole_number
    from deepspec.errors import ConfigError
    from deepspec.serving.traffic import Level

    words = listed("concurrency", values.get("concurrency", LEVELS))
    concurrency = sorted({whole_number("concurrency", word) for word in words})
    if not concurrency:
        raise ConfigError("concurrency=[] must be one or several whole numbers")
    words = listed("rates", values.get("rates", "[]"))
    rates = sorted({positive("rates", word) for word in words})
    if not rates:
        return [Level(count) for count in concurrency]
    if len(concurrency) > 1:
        raise ConfigError("rates=[...] need one concurrency=N, the most requests at once")
    return [Level(concurrency[0], rate) for rate in rates]
