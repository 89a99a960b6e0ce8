"""What a load is measured to be: a line a policy and level, kept by the real loop and the simulator
in the same way."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.atomic import atomic_file, write_text
from deepspec.errors import DataError
from deepspec.json_files import as_kind, read_json
from deepspec.scheduling.schedulers import Ints
from deepspec.serving.traffic import Arrival

FORMAT = 1


@dataclass(frozen=True)
class LoadRecord:
    """One policy at one level of load.

    `policy`, with the kind of the `drafter` it ran with (empty for plain decoding); at most
    `concurrency` requests at once, coming at `rate` a second (None: that many users, always busy).
    `throughput`: tokens a second of all requests; `user_p10`, `user_p50`, `user_p90`: of one of
    them, percentiles. `budget`: tokens verified a request and round, its anchor counted (1 is plain
    decoding); `accepted_length`: tokens a request and round yields. `rounds` and `tokens` in
    `seconds`; `wait_p50` and `wait_p90`: seconds from arrival to the prompt's turn. None where
    nothing was there to measure.
    """

    policy: str
    drafter: str
    concurrency: int
    rate: float | None
    throughput: float
    user_p10: float | None
    user_p50: float | None
    user_p90: float | None
    budget: float | None
    accepted_length: float | None
    rounds: int
    tokens: int
    seconds: float
    wait_p50: float | None
    wait_p90: float | None


class Meter:
    """Counts the steps of a loop: newcomers read their prompts, then all requests have a round.

    Times are the loop's own clock. The first step is left out of rates: in a closed loop all users
    come at once in it, which does not happen again.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._now = 0.0
        self._first: dict[int, float] = {}  # when a request's first step ended
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}  # behind its first step
        self._waits: list[float] = []
        self._sums = np.zeros(4)  # request rounds, drafts verified, drafts accepted, tokens
        self._rounds = 0

    def step(
        self,
        newcomers: Sequence[Arrival],
        began: float,
        now: float,
        requests: Sequence[int],
        emitted: Ints,
        scheduled: Ints,
        accepted: Ints,
    ) -> None:
        """A step from `began` to `now`: the running `requests`, by number, and of each [R] the
        tokens it said in the round, and its drafts verified and accepted."""
        for arrival in newcomers:
            self._waits.append(began - arrival.time)
            self._first[arrival.number] = now
            self._tokens[arrival.number] = 0
        fresh = {arrival.number for arrival in newcomers}
        for request, count in zip(requests, emitted.tolist(), strict=True):
            if request not in fresh:
                self._tokens[request] += count
                self._last[request] = now
        self._now = now
        if self._begun is None:
            self._begun = now
            return
        self._rounds += bool(len(requests))
        said = emitted.sum() + len(newcomers)  # a newcomer's first token comes from its prompt
        self._sums += (len(requests), scheduled.sum(), accepted.sum(), said)

    @property
    def seconds(self) -> float:
        """How long it has been counting."""
        return 0.0 if self._begun is None else self._now - self._begun

    def record(self, policy: str, drafter: str, concurrency: int, rate: float | None) -> LoadRecord:
        """What was counted so far."""
        rows, scheduled, accepted, tokens = self._sums.tolist()
        seconds = self.seconds
        speeds = [
            self._tokens[request] / (last - self._first[request])
            for request, last in self._last.items()
            if last > self._first[request]
        ]
        user = _percentiles(speeds, (10, 50, 90))
        wait = _percentiles(self._waits if rate is not None else [], (50, 90))
        return LoadRecord(
            policy=policy,
            drafter=drafter,
            concurrency=concurrency,
            rate=rate,
            throughput=tokens / seconds if seconds else 0.0,
            user_p10=user[0],
            user_p50=user[1],
            user_p90=user[2],
            budget=scheduled / rows + 1 if rows else None,
            accepted_length=accepted / rows + 1 if rows else None,
            rounds=self._rounds,
            tokens=int(tokens),
            seconds=seconds,
            wait_p50=wait[0],
            wait_p90=wait[1],
        )


def read_records(path: Path) -> tuple[list[LoadRecord], dict[str, Any]]:
    """Those of a load.json, and what they are about. Raises DataError."""
    try:
        raw = read_json(path, DataError, "run deepspec load again")
        if raw["format"] != FORMAT:
            raise DataError(f"{path} was written by another version; run deepspec load again")
        return as_kind(list[LoadRecord], raw["records"]), dict(raw["about"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no load ({type(error).__name__}: {error}); expected the load.json of "
            "deepspec load"
        ) from None


def _percentiles(values: Sequence[float], of: Sequence[int]) -> list[float | None]:
    return [float(np.percentile(values, each)) if values else None for each in of]


def write_records(
    records: Sequence[LoadRecord], about: Mapping[str, Any], folder: Path, name: str
) -> None:
    """`name`.json with what it is `about`, and `name`.csv, a line a record. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(record) for record in records]
    text = json.dumps({"format": FORMAT, "about": dict(about), "records": rows}, indent=2)
    write_text(folder / f"{name}.json", text + "\n")
    with atomic_file(folder / f"{name}.csv") as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(LoadRecord)])
        writer.writeheader()
        writer.writerows(rows)
