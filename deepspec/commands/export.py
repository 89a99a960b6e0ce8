"""Write a drafter as safetensors that serving engines load."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspec.streams import show

if TYPE_CHECKING:
    from deepspec.commands.sources import Source
    from deepspec.evaluation.results import Report

SETTINGS = (
    "checkpoint=DIR (a checkpoint, a run for its best one, or an export, which may take its config "
    "from recipe=R), out=DIR, format=flat|speculators|deepseek_v4, profile=serving|full, and "
    "overrides of the saved config"
)
EXAMPLES = """\
  deepspec export checkpoint=runs/tiny format=flat profile=serving out=my-drafter
  deepspec export checkpoint=runs/tiny/checkpoints/step-00000400 profile=full out=my-drafter
  deepspec export checkpoint=runs/mine format=speculators out=my-drafter
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Export, and say which engines load the result."""
    from pathlib import Path

    from deepspec.commands.settings import print_config, take
    from deepspec.errors import ConfigError

    values, overrides = take(settings, "checkpoint", "out", "recipe", "format", "profile")
    for name in ("checkpoint", "out"):
        if name not in values:
            raise ConfigError(f"{name}= is missing; see deepspec export --help")
    from deepspec.commands.sources import open_source

    own = [f"export.{name}={values[name]}" for name in ("format", "profile") if name in values]
    source = open_source(Path(values["checkpoint"]), [*overrides, *own], values.get("recipe"))
    if options.cfg:
        print_config(source.config)
        return
    from deepspec.commands import stages
    from deepspec.export.engines import loads_in
    from deepspec.export.files import require_replaceable
    from deepspec.outputs import hold

    out = Path(values["out"]).expanduser()
    require_replaceable(out)
    with hold(out):
        target = stages.open_target(source.config)
        report = _measured(source)
        traits = stages.export_drafter(source, target, source.load(target), out, report)
    show(f"export: {out}")
    for support in loads_in(traits):
        answer = "loads" if support.loads else "does not load"
        show(f"  {support.engine}: {answer}{f' ({support.why})' if support.why else ''}")


def _measured(source: Source) -> Report | None:
    """The report of the run around `source`, where it speaks of this very checkpoint."""
    from deepspec.errors import CheckpointError
    from deepspec.evaluation.results import read_report
    from deepspec.progress import say

    if source.run is None or not (path := source.run.path / "report.json").is_file():
        return None
    try:
        report = read_report(path)
    except CheckpointError as error:
        say(f"the model card has no measured acceptance: {error}")
        return None
    return report if report.drafter["step"] == source.step else None
