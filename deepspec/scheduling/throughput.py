"""SPS(B): how many steps a second the target makes, by the tokens it verifies in one.

Measured at some B (`deepspec profile`) or given as a CSV file, and asked at any: between two
points the seconds of a step lie on a straight line, below the first they are the first's, behind
the last they go on as between the last two. A step of more tokens is never taken to be faster:
where points say so, the slower one counts.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepspec.atomic import atomic_file
from deepspec.errors import ConfigError
from deepspec.scheduling.calibration import Floats

FORMAT = 1
COLUMNS = ("tokens", "steps_per_second")  # of a CSV file; others are not read


@dataclass(frozen=True)
class Point:
    """Steps a second with `tokens` in a step, the median, and the `spread` of a step's seconds:
    their interquartile range over their median, None where unknown."""

    tokens: int
    steps_per_second: float
    spread: float | None = None


@dataclass(frozen=True)
class Throughput:
    """At least two `points`, tokens ascending; `about`: what was measured, where and how."""

    points: tuple[Point, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def steps_per_second(self, tokens: ArrayLike) -> Floats:
        """SPS at each of `tokens` [..]; the module says by which rule."""
        wanted = np.asarray(tokens, dtype=np.float64)
        known = np.array([point.tokens for point in self.points], dtype=np.float64)
        seconds = np.array([1 / point.steps_per_second for point in self.points])
        seconds = np.maximum.accumulate(seconds)
        slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
        beyond = np.maximum(wanted - known[-1], 0) * slope
        return 1 / (np.interp(wanted, known, seconds) + beyond)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
            partial.write_text(text + "\n", encoding="utf-8")


def read_throughput(file: str) -> Throughput:
    """The table in `file`: JSON of `deepspec profile`, or CSV with the columns of `COLUMNS`.

    Raises ConfigError, naming decoding.throughput, where it is missing or none.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"decoding.throughput={file} does not exist; deepspec profile makes such a file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"decoding.throughput={file} cannot be read: {error}") from None
    if path.suffix.lower() == ".csv":
        return _from_csv(file, text)
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise ConfigError(
                f"decoding.throughput={file} was written by another version; run deepspec profile "
                "again"
            )
        points = [
            (int(row["tokens"]), float(row["steps_per_second"]), float(row["spread"]))
            for row in raw["points"]
        ]
        about = dict(raw["about"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"decoding.throughput={file} is no table of deepspec profile "
            f"({type(error).__name__}: {error}); a table of your own is a file that ends with .csv"
        ) from None
    return Throughput(_checked(file, points), about)


def _from_csv(file: str, text: str) -> Throughput:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(
            f"decoding.throughput={file} has no column {' and no column '.join(missing)}; its "
            f"first line must name {' and '.join(COLUMNS)}, and has "
            f"{', '.join(reader.fieldnames or ())}"
        )
    points = []
    for row in reader:
        try:
            points.append((int(row["tokens"]), float(row["steps_per_second"]), None))
        except (TypeError, ValueError):
            raise ConfigError(
                f"decoding.throughput={file}, line {reader.line_num}: expected a whole number of "
                f"tokens and steps a second, found {row['tokens']!r} and "
                f"{row['steps_per_second']!r}"
            ) from None
    return Throughput(_checked(file, points), {"source": Path(file).name})


def _checked(file: str, points: Iterable[tuple[int, float, float | None]]) -> tuple[Point, ...]:
    """Ascending points that can be interpolated."""
    ordered = tuple(Point(*point) for point in sorted(points, key=lambda point: point[0]))
    if len({point.tokens for point in ordered}) != len(ordered) or len(ordered) < 2:
        raise ConfigError(
            f"decoding.throughput={file} must have at least two rows, each with another number of "
            f"tokens; found {[point.tokens for point in ordered]}"
        )
    for point in ordered:
        if point.tokens < 1 or not 0 < point.steps_per_second < math.inf:
            raise ConfigError(
                f"decoding.throughput={file} must have at least 1 token and above 0 steps a second "
                f"in every row; found {point.tokens} and {point.steps_per_second}"
            )
    return ordered
