"""Checks of what users bring, each with what was found: does it hold, by how much, why not."""

from deepspec.checks.finding import Finding
from deepspec.checks.target import check_target

__all__ = ["Finding", "check_target"]
