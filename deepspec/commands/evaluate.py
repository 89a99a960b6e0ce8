"""Measure a trained drafter: acceptance, speed, exactness.

Greedy output is compared with plain decoding of the target token by token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SETTINGS = (
    "run=DIR (its best checkpoint) or checkpoint=DIR (a checkpoint, a run, or an export), out=DIR "
    "for the report, and overrides of the saved config"
)
EXAMPLES = """\
  deepspec evaluate run=runs/tiny
  deepspec evaluate run=runs/tiny evaluation.benchmarks=[my_prompts.jsonl] decoding.batch_size=8
  deepspec evaluate checkpoint=runs/qwen3/checkpoints/step-00010000 \\
      evaluation.benchmarks=[gsm8k,humaneval] evaluation.temperatures=[0,0.7]
  deepspec evaluate checkpoint=./exported-drafter target.path=Qwen/Qwen3-4B
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Evaluate and write report.json, report.md, report.html and traces.jsonl."""
    from pathlib import Path

    from deepspec.commands.settings import print_config, take
    from deepspec.errors import ConfigError

    values, overrides = take(settings, "run", "checkpoint", "out")
    given = [key for key in ("run", "checkpoint") if key in values]
    if len(given) != 1:
        raise ConfigError("give one of run=DIR and checkpoint=DIR")
    from deepspec.commands import stages

    drafter = stages.open_drafter(Path(values[given[0]]), overrides)
    if options.cfg:
        print_config(drafter.config)
        return
    out = Path(values["out"]) if "out" in values else drafter.default_out
    stages.evaluate_into(out, drafter)
