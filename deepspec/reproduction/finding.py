"""What was found for one figure: numbers, drawings, and whether they agree with the paper."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.atomic import atomic_file
from deepspec.evaluation.report import Table


@dataclass(frozen=True)
class Claim:
    """One thing that the paper shows, with the numbers found here, and whether it `holds`."""

    holds: bool
    text: str


@dataclass(frozen=True)
class Finding:
    """A figure of the report.

    `name`: as in reproduce.figures. `paper`: its number or shape there, with the place. `note`:
    what has to be known to read ours. `rows`: all its numbers, for the CSV, the first with all
    columns. `drawings`: (svg, caption).
    """

    name: str
    title: str
    paper: str
    note: str
    claims: tuple[Claim, ...]
    table: Table
    rows: list[dict[str, Any]]
    drawings: tuple[tuple[str, str], ...]

    @property
    def verdict(self) -> str:
        """In the fewest words."""
        holding = [claim.holds for claim in self.claims]
        if not holding:
            return "nothing to compare"
        return "agrees" if all(holding) else "agrees in part" if any(holding) else "does not agree"

    @property
    def tone(self) -> str:
        """How the page colours the verdict."""
        return {"agrees": "exact", "does not agree": "differs"}.get(self.verdict, "unchecked")

    @property
    def sentence(self) -> str:
        """Whether ours agrees with the paper, and in what."""
        parts = []
        for holds, label in ((True, "agrees"), (False, "does not agree")):
            texts = [claim.text for claim in self.claims if claim.holds == holds]
            if texts:
                parts.append(f"{label}: {'; '.join(texts)}")
        text = "; ".join(parts) or "the facts at hand give no number to compare with"
        return f"{text[0].upper()}{text[1:]}."

    def save(self, folder: Path) -> Path:
        """Write the numbers as NAME.csv."""
        path = folder / f"{self.name}.csv"
        with atomic_file(path) as partial, partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(self.rows[0]) if self.rows else [])
            writer.writeheader()
            writer.writerows(self.rows)
        return path


def percent(share: float, digits: int = 0) -> str:
    """0.31 -> 31 %."""
    return f"{100 * share:.{digits}f} %"


def signed(share: float) -> str:
    """0.31 -> +31 %."""
    return f"{round(100 * share):+d} %"
