"""Check what you bring against what DeepSpec takes for granted, and print what holds.

Exits with 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspec.checks import Finding

EXAMPLES = """\
  deepspec check target=./my-qwen3-finetune
  deepspec check target=owner/name target.dtype=bfloat16 engine.device=cuda
"""
HAS_CONFIG = False


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Dispatch to the one check that is asked for; exit with 1 when something does not hold."""
    from deepspec.commands.settings import take
    from deepspec.errors import ConfigError

    values, words = take(settings, *MODES)
    if len(values) != 1:
        raise ConfigError(f"give exactly one of {', '.join(f'{mode}=...' for mode in MODES)}")
    ((mode, value),) = values.items()
    if not MODES[mode][1](value, words):
        sys.exit(1)


def _check_target(path: str, words: Sequence[str]) -> bool:
    from deepspec.checks import check_target
    from deepspec.commands import stages
    from deepspec.config.loading import config_from
    from deepspec.errors import ConfigError

    for word in words:
        key = word.partition("=")[0]
        if not key.startswith("target.") and key != "engine.device":
            raise ConfigError(f"{key} has no part in a check of a target; set target.* keys alone")
    raw = {"recipe": "check", "target": {"path": path}, "data": {"path": ["none"]}}
    target = stages.open_target(config_from(raw, words))
    return print_findings(f"{target.family}, {target.name}", check_target(target))


MODES: dict[str, tuple[str, Callable[[str, Sequence[str]], bool]]] = {
    "target": (
        "PATH (does DeepSpec read, train and decode this model rightly? takes target.* keys)",
        _check_target,
    ),
}
SETTINGS = "one of " + ", ".join(f"{mode}={what}" for mode, (what, _) in MODES.items())


def print_findings(title: str, findings: Iterable[Finding]) -> bool:
    """A row a finding, as a table, once all are made; whether all of them hold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from deepspec.progress import say

    table = Table(title=escape(title), box=None, pad_edge=False, title_justify="left")
    for column in ("", "what", "largest difference", "found"):
        table.add_column(column, overflow="fold")
    failed = 0
    for finding in findings:
        say(f"{finding.what}: {'holds' if finding.holds else 'does not hold'}")
        state = "[green]holds[/]" if finding.holds else "[red]fails[/]"
        difference = "" if finding.difference is None else f"{finding.difference:.2g}"
        table.add_row(state, *map(escape, (finding.what, difference, finding.detail)))
        failed += not finding.holds
    Console().print(table)
    print(f"{failed} of {table.row_count} do not hold" if failed else "all checks hold")
    return not failed
