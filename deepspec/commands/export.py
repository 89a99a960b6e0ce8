"""Write a drafter as safetensors that serving engines load."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SETTINGS = (
    "checkpoint=DIR (a checkpoint, or a run for its best one), out=DIR, format=flat, "
    "profile=serving|full, and overrides of the saved config"
)
EXAMPLES = """\
  deepspec export checkpoint=runs/tiny format=flat profile=serving out=my-drafter
  deepspec export checkpoint=runs/tiny/checkpoints/step-00000400 profile=full out=my-drafter
"""
HAS_CONFIG = True


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Export, and say which engines load the result."""
