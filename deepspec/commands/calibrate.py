"""Fit a drafter's confidences on held-out prompts, for the schedulers.

Saves calibration.json beside the drafter and a report with reliability diagrams in out=.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspec.streams import show

SETTINGS = (
    "run=DIR (its best checkpoint) or checkpoint=DIR (a checkpoint, a run, or an export, which may "
    "take its config from recipe=R), prompts=[FILE or benchmark, ...] (else those of the "
    "evaluation), method=sts (Sequential Temperature Scaling) or platt (a temperature and a shift "
    "a position), out=DIR for the report, and overrides of the config"
)
EXAMPLES = """\
  deepspec calibrate run=runs/tiny evaluation.limit=null decoding.batch_size=8 method=platt
  deepspec calibrate run=runs/mine prompts=[held_out.jsonl] evaluation.temperatures=[0,0.7]
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Decode, fit, save, and print the table."""
    from pathlib import Path

    from deepspec.commands.settings import print_config, take
    from deepspec.errors import ConfigError

    values, overrides = take(settings, "run", "checkpoint", "out", "recipe", "prompts", "method")
    given = [values[key] for key in ("run", "checkpoint") if key in values]
    if len(given) != 1:
        raise ConfigError("give one of run=DIR and checkpoint=DIR")
    method = values.get("method", "sts")
    if method not in ("sts", "platt"):
        raise ConfigError(f"method={method} must be sts or platt")
    if "prompts" in values:
        overrides = [*overrides, f"evaluation.benchmarks={values['prompts']}"]
    from deepspec.commands.sources import open_source

    source = open_source(Path(given[0]), overrides, values.get("recipe"))
    if options.cfg:
        print_config(source.config)
        return
    from deepspec.commands.confidences import calibrate_drafter
    from deepspec.commands.stages import open_target
    from deepspec.evaluation.calibrate import outcome, results_table
    from deepspec.outputs import CALIBRATION, hold, output_folder
    from deepspec.terminal import Terminal

    default = f"runs/calibrate-{source.config.recipe}"
    assert source.place is not None, "run= or checkpoint= was given"
    with (
        output_folder(values.get("out"), default, CALIBRATION) as out,
        hold(source.place),  # calibration.json lies beside the drafter
    ):
        target = open_target(source.config)
        calibration, file = calibrate_drafter(source, target, source.load(target), method, out)
    for fit in calibration.fits:
        Terminal().print(results_table(fit))
        show(outcome(fit))
    show(f"calibration: {file}")
    show(f"report:      {out / 'calibration.html'}")
