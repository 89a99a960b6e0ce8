"""SPS(B): how many steps a second the target makes, by the tokens it verifies in one.

Measured at some B (`deepspec profile`) or given as a CSV file, and asked at any: between two
points the seconds of a step lie on a straight line, below the first they are the first's, behind
the last they go on as between the last two. A step of more tokens is never taken to be faster:
where points say so, the slower one counts. Where the drafter's own seconds are given too, a step is
the target's part alone, and a round without drafts costs no more than that.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepspec.atomic import write_text
from deepspec.errors import ConfigError
from deepspec.json_files import parse_json
from deepspec.scheduling.calibration import Floats

FORMAT = 1
COLUMNS = ("tokens", "steps_per_second")  # of a CSV file
DRAFTING = ("propose_seconds", "observe_seconds")  # it may have these too; others are not read


@dataclass(frozen=True)
class Point:
    """Steps a second with `tokens` in a step, the median, and the `spread` of a step's seconds:
    their interquartile range over their median, None where unknown.

    `propose_seconds`: what the drafter takes to draft for so many requests; `observe_seconds`: to
    take in what the target computed for so many tokens. None where it was not measured apart.
    """

    tokens: int
    steps_per_second: float
    spread: float | None = None
    propose_seconds: float | None = None
    observe_seconds: float | None = None


@dataclass(frozen=True)
class Throughput:
    """At least two `points`, tokens ascending; `about`: what was measured, where and how."""

    points: tuple[Point, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, tokens: ArrayLike) -> Floats:
        """Of a step with each of `tokens` [..]; the module says by which rule."""
        return _line([(point.tokens, 1 / point.steps_per_second) for point in self.points], tokens)

    def steps_per_second(self, tokens: ArrayLike) -> Floats:
        """SPS at each of `tokens` [..]."""
        return 1 / self.seconds(tokens)

    @property
    def knows_drafting(self) -> bool:
        """Whether the drafter's own seconds are known."""
        return any(point.propose_seconds is not None for point in self.points)

    def propose_seconds(self, rows: ArrayLike) -> Floats:
        """Of drafting for each of `rows` [..] requests; 0 where unknown."""
        return _line([(p.tokens, p.propose_seconds) for p in self.points], rows)

    def observe_seconds(self, tokens: ArrayLike) -> Floats:
        """Of taking in each of `tokens` [..]; 0 where unknown."""
        return _line([(p.tokens, p.observe_seconds) for p in self.points], tokens)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        write_text(path, text + "\n")


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
        raw = parse_json(text)
        if raw["format"] != FORMAT:
            raise ConfigError(
                f"decoding.throughput={file} was written by another version; run deepspec profile "
                "again"
            )
        points = [
            Point(
                int(row["tokens"]),
                float(row["steps_per_second"]),
                *(row.get(name) and float(row[name]) for name in ("spread", *DRAFTING)),
            )
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
            drafting = [float(row[name]) if row.get(name) else None for name in DRAFTING]
            points.append(
                Point(int(row["tokens"]), float(row["steps_per_second"]), None, *drafting)
            )
        except (TypeError, ValueError):
            raise ConfigError(
                f"decoding.throughput={file}, line {reader.line_num}: expected a whole number of "
                f"tokens, then numbers; found {' and '.join(repr(value) for value in row.values())}"
            ) from None
    return Throughput(_checked(file, points), {"source": Path(file).name})


def _line(known: Sequence[tuple[int, float | None]], wanted: ArrayLike) -> Floats:
    """Seconds at `wanted` [..] by those that are `known`; the module says by which rule."""
    where = np.asarray(wanted, dtype=np.float64)
    points = [(count, seconds) for count, seconds in known if seconds is not None]
    if not points:
        return np.zeros(where.shape)
    counts, values = np.array(points, dtype=np.float64).T
    values = np.maximum.accumulate(values)
    steep = (values[-1] - values[-2]) / (counts[-1] - counts[-2]) if len(points) > 1 else 0.0
    return np.interp(where, counts, values) + np.maximum(where - counts[-1], 0) * steep


def _checked(file: str, points: Iterable[Point]) -> tuple[Point, ...]:
    """Ascending points that can be interpolated."""
    ordered = tuple(sorted(points, key=lambda point: point.tokens))
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
        for name in DRAFTING:
            seconds = getattr(point, name)
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ConfigError(
                    f"decoding.throughput={file} must have at least 0 {name} in every row, or "
                    f"nothing where they are unknown; found {seconds} at {point.tokens} tokens"
                )
    return ordered
