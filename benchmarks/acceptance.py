"""Accepted length of one kind of drafter over others, by domain and temperature.

    python benchmarks/acceptance.py runs/tiny --against runs/tiny_dflash
    python benchmarks/acceptance.py runs/tiny-{0,1,2} --against runs/tiny_dflash-{0,1,2} \\
        --against runs/tiny_eagle3-{0,1,2} --against runs/tiny_mtp-{0,1,2}

All sides must have decoded the same prompts. Behind a length stand those of the single runs, behind
a gain its standard error: see `deepspec.evaluation.comparison`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from deepspec.evaluation.comparison import Counts, Lengths, compare, mean


def main() -> None:
    """Read, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a traces.jsonl")
    parser.add_argument(
        "--against", nargs="+", type=Path, action="append", required=True, help="a baseline's"
    )
    options = parser.parse_args()
    folders = [options.runs, *options.against]
    sides = [[Counts(path) for path in side] for side in folders]
    settings = sorted(sides[0][0].cells)
    generator = np.random.default_rng(0)

    table = Table(title=f"accepted length of {names(options.runs)}, and its gain over others")
    for column in ("T", "domain", "prompts", names(options.runs)):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for side in options.against:
        table.add_column(names(side), justify="right")
        table.add_column("gain", justify="right")
    for temperature in sorted({temperature for temperature, _ in settings}):
        found = []
        for setting in (setting for setting in settings if setting[0] == temperature):
            found.append(compare(sides, setting, generator))
            prompts = str(len(sides[0][0].cells[setting]))
            table.add_row(f"{temperature:g}", setting[1], prompts, *cells(found[-1]))
        means = cells([mean(side) for side in zip(*found, strict=True)])
        table.add_row(f"{temperature:g}", "mean", "", *means, end_section=True)
    Console().print(table)


def cells(sides: Sequence[Lengths]) -> list[str]:
    """The first's length; each other's, and the gain over it with its standard error in percent."""
    ours, shown = sides[0], [str(sides[0])]
    for theirs in sides[1:]:
        gain, drawn = ours.pooled / theirs.pooled - 1, ours.drawn / theirs.drawn
        shown += [str(theirs), f"{100 * gain:+.1f} ± {100 * drawn.std(ddof=1):.1f} %"]
    return shown


def names(folders: Sequence[Path]) -> str:
    """The folders' names."""
    return ", ".join(folder.name for folder in folders)


if __name__ == "__main__":
    main()
