"""Replay recorded rounds under other loads, policies and engines, in seconds.

Throughput comes from a table: those that deepspec load measured, or your own engine's as CSV
(tokens,steps_per_second and, if known, propose_seconds,observe_seconds). Writes simulate.json and
simulate.csv, and prints what was measured beside it where the load was the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspec.streams import show

SETTINGS = (
    "load=DIR (what deepspec load wrote), or traces=FILE (its traces.jsonl, or that of deepspec "
    "evaluate) with throughput=FILE (JSON of deepspec profile, or .csv; synthetic takes a made-up "
    "GPU-like curve), policies=[plain,fixed,...], concurrency=[1,2,4], rates=[2,8], seconds=60 "
    "(simulated, a policy and level), seed=1, out=DIR"
)
EXAMPLES = """\
  deepspec simulate load=runs/load
  deepspec simulate load=runs/load throughput=my_engine.csv concurrency=[1,16,64,256]
  deepspec simulate load=runs/load throughput=synthetic concurrency=[4,64,256]
"""
HAS_CONFIG = False

SECONDS, SYNTHETIC = "60", "synthetic"


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Simulate, save, and print the table."""
    from deepspec.commands.load import parse_levels
    from deepspec.commands.settings import listed, positive, take, whole_number
    from deepspec.commands.simulations import open_recorded, simulate_all
    from deepspec.errors import ConfigError
    from deepspec.outputs import SIMULATION, output_folder, unused
    from deepspec.serving.policies import DEFAULT, parse_policies
    from deepspec.serving.record import write_records
    from deepspec.serving.tables import key_of, records_table
    from deepspec.terminal import Terminal

    own = ("load", "traces", "throughput", "policies", "concurrency", "rates", "seconds", "seed")
    values, others = take(settings, *own, "out")
    if others:
        raise ConfigError(f"{others[0].partition('=')[0]} is no key of deepspec simulate")
    if ("load" in values) == ("traces" in values):
        raise ConfigError("give one of load=DIR and traces=FILE")
    recorded = open_recorded(values.get("load"), values.get("traces"), values.get("throughput"))
    policies: Sequence[str] = recorded.policies or DEFAULT
    if "policies" in values:
        policies = parse_policies(listed("policies", values["policies"]))
    chosen = {"concurrency", "rates"} & values.keys()
    levels = parse_levels(values) if chosen or not recorded.levels else list(recorded.levels)
    seconds = positive("seconds", values.get("seconds", SECONDS))
    seed = whole_number("seed", values.get("seed", "1"))
    beside = values.get("out", values.get("load"))  # a load's folder takes several simulations
    patiently = "out" not in values
    with output_folder(beside, "runs/simulate", SIMULATION, patiently=patiently) as out:
        name = "simulate" if "out" in values else unused(out / "simulate.json").stem
        records = simulate_all(recorded, policies, levels, seconds, seed)
        about = {"traces": str(recorded.traces), "throughput": recorded.sources, "seconds": seconds}
        write_records(records, about, out, name)
    same = values.get("throughput") is None
    real = {key_of(record): record for record in recorded.measured} if same else {}
    Terminal().print(records_table(records, real))
    show(f"simulated: {out / name}.csv")
