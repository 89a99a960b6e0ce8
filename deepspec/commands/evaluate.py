"""Measure a drafter: acceptance, speed, exactness.

Greedy output is compared with plain decoding of the target token by token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspec.streams import show

SETTINGS = (
    "run=DIR (its best checkpoint) or checkpoint=DIR (a checkpoint, a run, or an export, which may "
    "take its config from recipe=R); recipe=R alone for drafter.kind=ngram, which needs no "
    "training; out=DIR for the report, and overrides of the config"
)
EXAMPLES = """\
  deepspec evaluate run=runs/tiny
  deepspec evaluate run=runs/tiny evaluation.benchmarks=[my_prompts.jsonl] out=mine
  deepspec evaluate checkpoint=runs/qwen3/checkpoints/step-00010000 \\
      evaluation.benchmarks=[gsm8k,humaneval] evaluation.temperatures=[0,0.7]
  deepspec evaluate checkpoint=runs/tiny/export recipe=tiny decoding.batch_size=8
  deepspec evaluate run=runs/tiny decoding.scheduler=algorithm1 decoding.throughput=throughput.json
  deepspec evaluate recipe=tiny drafter.kind=ngram out=runs/ngram
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Evaluate and write report.json, report.md, report.html and traces.jsonl."""
    from pathlib import Path

    from deepspec.commands.settings import print_config, take
    from deepspec.config.loading import load_config
    from deepspec.errors import ConfigError

    values, overrides = take(settings, "run", "checkpoint", "out", "recipe")
    given = [values[key] for key in ("run", "checkpoint") if key in values]
    recipe = values.get("recipe")
    if len(given) > 1 or not (given or recipe):
        raise ConfigError("give one of run=DIR and checkpoint=DIR")
    from deepspec.commands.sources import open_source, untrained

    if given:
        source = open_source(Path(given[0]), overrides, recipe)
    else:
        source = untrained(load_config(str(recipe), overrides))
    if options.cfg:
        print_config(source.config)
        return
    from deepspec.commands import stages
    from deepspec.evaluation.report import results_table
    from deepspec.outputs import REPORT, output_folder
    from deepspec.terminal import Terminal

    default = f"runs/evaluate-{source.config.recipe}"
    with output_folder(values.get("out"), default, REPORT) as out:
        target = stages.open_target(source.config)
        report = stages.evaluate_drafter(source, target, source.load(target), out)
    stages.print_skipped(report.skipped)
    Terminal().print(results_table(report))
    show(f"report: {out / 'report.html'}")
    show(f"traces: {out / 'traces.jsonl'}")
