"""Where the shipped recipes, config groups and data are: in the wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """The folder `recipes`, `configs` or `data` (or something below it)."""
    bundled = PACKAGE / "_bundled"
    return (bundled if bundled.is_dir() else PACKAGE.parent) / name
