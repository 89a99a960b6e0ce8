"""Recorded decoding as the simulator takes it: what would have happened at full length.

Rounds must have verified whole blocks (policy fixed, or decoding.scheduler=none), for else it is
not known how far their drafts would have been accepted. Legend: N rounds, P requests, K block size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.errors import DataError
from deepspec.json_files import parse_json
from deepspec.scheduling.calibration import Floats, Scaling, calibrated, survival
from deepspec.scheduling.schedulers import Ints


@dataclass(frozen=True)
class Recording:
    """Requests of one drafter, round after round.

    `survival` [N, K] of drafts, calibrated, or None without a confidence head; `accepted` [N];
    request p has rounds `first[p]` to `first[p] + count[p]` - 1, a prompt of `prompt[p]` tokens and
    an answer of `tokens[p]`.
    """

    block_size: int
    survival: Floats | None
    accepted: Ints
    first: Ints
    count: Ints
    prompt: Ints
    tokens: Ints


def read_recordings(path: Path, scaling: Scaling | None) -> dict[str, Recording]:
    """By drafter, the traces of `deepspec load` (or `evaluate`, whose drafter is called "drafter").

    A request that was recorded several times counts once, with the longest of its texts. `scaling`
    of confidences; None takes them as they are. Raises DataError for a file that holds none, or
    rounds that did not verify whole blocks.
    """
    texts: dict[tuple[str, str], dict[tuple[Any, ...], list[dict[str, Any]]]] = {}
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                row = parse_json(line)
                request = row.get("drafter", "drafter"), row["request"]
                run = tuple(row.get(key) for key in ("concurrency", "rate", "temperature", "seed"))
                texts.setdefault(request, {}).setdefault(run, []).append(row)
        by_drafter: dict[str, list[list[dict[str, Any]]]] = {}
        for (drafter, _), runs in texts.items():
            longest = max(runs.values(), key=lambda rows: sum(row["emitted"] for row in rows))
            by_drafter.setdefault(drafter, []).append(longest)
        found = {name: _recording(each, scaling, path) for name, each in by_drafter.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no decoding rounds ({type(error).__name__}: {error}); expected the "
            "traces.jsonl of deepspec load or deepspec evaluate"
        ) from None
    if not found:
        raise DataError(f"{path} is empty; record more seconds of policy fixed by deepspec load")
    return found


def _in_order(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rounds of a request. Raises DataError where two begin at one token: it is recorded twice,
    and would count as longer than it is."""
    ordered = sorted(rows, key=lambda row: row["position"])
    for one, other in pairwise(ordered):
        if one["position"] == other["position"]:
            raise DataError(
                f"{path}: {one['request']} has two rounds at position {one['position']}; record "
                "again, or remove the lines that stand there twice"
            )
    return ordered


def _recording(
    requests: Iterable[list[dict[str, Any]]], scaling: Scaling | None, path: Path
) -> Recording:
    requests = [_in_order(rows, path) for rows in requests]
    rounds = [row for rows in requests for row in rows]
    size = max(row["proposed"] for row in rounds)
    for row in (row for rows in requests for row in rows[:-1]):
        # near its limit a request cannot use a whole block
        if row["scheduled"] < row["proposed"] and row["accepted"] == row["scheduled"]:
            raise DataError(
                f"{path}: a round of {row['request']} verified {row['scheduled']} of "
                f"{row['proposed']} drafts, so that it is not known what became of the others; "
                "record with policy fixed, or decoding.scheduler=none"
            )
    chances = None
    if all(row["confidences"] for row in rounds if row["proposed"]):
        confidence = np.ones((len(rounds), size))
        for own, row in zip(confidence, rounds, strict=True):
            own[: row["proposed"]] = row["confidences"]
        chances = survival(calibrated(confidence, scaling))
    count = np.array([len(rows) for rows in requests])
    return Recording(
        block_size=size,
        survival=chances,
        accepted=np.array([row["accepted"] for row in rounds]),
        first=np.cumsum(count) - count,
        count=count,
        prompt=np.array([rows[0]["position"] for rows in requests]),
        tokens=np.array([1 + sum(row["emitted"] for row in rows) for rows in requests]),
    )
