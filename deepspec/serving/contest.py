"""Several policies under the same loads, in turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspec.atomic import atomic_file
from deepspec.decoding import Decoder, Sampling
from deepspec.progress import Progress
from deepspec.records import DecodeTrace
from deepspec.serving.loop import Loop, Prompt
from deepspec.serving.policies import WHOLE
from deepspec.serving.record import LoadRecord
from deepspec.serving.traffic import Level

TURN = 0.25  # seconds of a loop's own clock, at least a step, until it is the next one's turn
WARM_UP_STEPS = 4  # first calls allocate buffers and choose kernels


@dataclass(frozen=True)
class Contender:
    """A `policy` with the kind of its `drafter` (empty: none); `open` makes it a new decoder."""

    policy: str
    drafter: str
    open: Callable[[], Decoder]


@dataclass(frozen=True)
class Conditions:
    """What all contenders decode, and for how many `seconds` each, a level."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    max_new_tokens: int
    seconds: float
    seed: int = 0


Rounds = tuple[Contender, Level, list[DecodeTrace]]


def contest(
    contenders: Sequence[Contender],
    levels: Sequence[Level],
    conditions: Conditions,
    *,
    show: bool = True,
) -> tuple[list[LoadRecord], list[Rounds]]:
    """A record a level and contender, and the rounds of those that verify whole blocks."""
    records: list[LoadRecord] = []
    rounds: list[Rounds] = []
    for contender in contenders:
        loop = _loop(contender, Level(1), conditions)
        for _ in range(WARM_UP_STEPS):
            loop.step()
    total = int(len(levels) * len(contenders) * conditions.seconds)
    with Progress("load", total, "s", show=show) as progress:
        for level in levels:
            loops = [_loop(contender, level, conditions) for contender in contenders]
            _take_turns(loops, conditions.seconds)
            for contender, loop in zip(contenders, loops, strict=True):
                records.append(
                    loop.meter.record(
                        contender.policy, contender.drafter, level.concurrency, level.rate
                    )
                )
                if contender.policy == WHOLE:
                    rounds.append((contender, level, loop.traces))
            note = f"{level.concurrency} at once" + (f", {level.rate:g}/s" if level.rate else "")
            progress.advance(int(len(contenders) * conditions.seconds), note)
    return records, rounds


def save_rounds(rounds: Iterable[Rounds], path: Path) -> None:
    """One JSON line a round and request: policy, drafter, concurrency, rate, and the trace."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for contender, level, traces in rounds:
            where = {"policy": contender.policy, "drafter": contender.drafter, **asdict(level)}
            for trace in traces:
                stream.write(json.dumps({**where, **asdict(trace)}) + "\n")


def _loop(contender: Contender, level: Level, conditions: Conditions) -> Loop:
    return Loop(
        contender.open(),
        level.traffic(conditions.seed),
        conditions.prompts,
        conditions.sampling,
        conditions.max_new_tokens,
        conditions.seed,
    )


def _take_turns(loops: Sequence[Loop], seconds: float) -> None:
    """Until each has measured so many seconds; who begins changes."""
    turn = 0
    while waiting := [loop for loop in loops if loop.meter.seconds < seconds]:
        for place in range(len(waiting)):
            loop = waiting[(place + turn) % len(waiting)]
            until = loop.now + TURN
            while loop.now < until and loop.meter.seconds < seconds:
                loop.step()
        turn += 1
