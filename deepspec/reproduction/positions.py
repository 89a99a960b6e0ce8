"""Conditional acceptance by position in the block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspec.data.files import read_jsonl
from deepspec.evaluation import metrics
from deepspec.evaluation.report import Table
from deepspec.records import DecodeTrace
from deepspec.reproduction import paper
from deepspec.reproduction.drawing import Scales, Series, lines
from deepspec.reproduction.finding import Claim, Finding, percent
from deepspec.reproduction.jobs import LABELS, Training
from deepspec.reproduction.lengths import of_seeds
from deepspec.reproduction.plan import Plan, compared

ENOUGH = 100  # rounds that have to get to a position for a claim about it


def positions(plan: Plan) -> Finding:
    """Conditional acceptance at each position of the block, domains and seeds pooled."""
    rates = {kind: _rates(plan, same) for kind, same in compared(plan.config).items()}
    rows = [
        {
            "drafter": kind,
            "position": place + 1,
            "rounds": own.rounds,
            "conditional_acceptance": round(own.share, 5),
            "standard_error": round(own.error, 5),
        }
        for kind, same in rates.items()
        for place, own in enumerate(same)
    ]
    series = [
        Series(
            LABELS[kind],
            range(1, len(same) + 1),
            [own.share for own in same],
            [own.error for own in same],
        )
        for kind, same in rates.items()
    ]
    size = max(map(len, rates.values()))
    scales = Scales("position in the block", "acceptance, all earlier accepted", True, True)
    drawing = lines("positions", "Conditional acceptance by position in the block", scales, series)
    return Finding(
        "positions",
        "Figure 2: acceptance by position, all earlier drafts accepted",
        f"DFlash's decays along the block, DSpark's does not ({paper.SOURCE}, figure 2).",
        f"Temperature 1, all domains and {of_seeds(plan.config.reproduce.seeds)} together. MTP-1 "
        "drafts one token. Few rounds get to the last positions, and those are the easy ones.",
        _position_claims(rates["dspark"], rates["dflash"]),
        Table(
            ["drafter", *(str(place + 1) for place in range(size))],
            [
                [LABELS[kind], *(f"{own.share:.1%}" for own in same), *["–"] * (size - len(same))]
                for kind, same in rates.items()
            ],
        ),
        rows,
        ((drawing, "Share of rounds in which the draft is accepted, of those that got there."),),
    )


@dataclass(frozen=True)
class _Rate:
    """`share` of `rounds` in which a draft was accepted, and its standard `error`."""

    share: float
    rounds: int

    @property
    def error(self) -> float:
        return math.sqrt(self.share * (1 - self.share) / self.rounds)


def _rates(plan: Plan, trainings: Sequence[Training]) -> list[_Rate]:
    """By position, as far as a round got."""
    traces = [each for one in trainings for each in _traces(plan.folder(one.name))]
    pairs = metrics.conditional_acceptance(traces, trainings[0].block)
    return [_Rate(accepted / rounds, rounds) for accepted, rounds in pairs if rounds]


def _position_claims(ours: list[_Rate], theirs: list[_Rate]) -> tuple[Claim, ...]:
    """From the first position to the last that enough rounds of both drafters got to."""
    reached = [min(a.rounds, b.rounds) >= ENOUGH for a, b in zip(ours, theirs, strict=False)]
    last = max(1, sum(reached)) - 1
    changes = []
    for own in (ours, theirs):
        chance = 2 * math.hypot(own[0].error, own[last].error)
        text = (
            f"goes from {percent(own[0].share)} to {percent(own[last].share)} at draft {last + 1}"
        )
        changes.append((own[last].share - own[0].share, chance, text))
    (kept, by_chance, ours_text), (fell, beyond, theirs_text) = changes
    lead, end = (100 * (ours[place].share - theirs[place].share) for place in (0, last))
    return (
        Claim(fell < -beyond, f"DFlash {theirs_text}, paper: falls"),
        Claim(kept > -by_chance, f"DSpark {ours_text}, paper: does not fall"),
        Claim(
            end > lead,
            f"DSpark's lead over DFlash goes from {lead:.0f} to {end:.0f} points, paper: grows",
        ),
    )


def _traces(folder: Path) -> list[DecodeTrace]:
    """The rounds at temperature 1."""
    found = []
    for _, row in read_jsonl(folder / "traces.jsonl"):
        del row["benchmark"], row["seed"]
        if row.pop("temperature") == 1:
            found.append(DecodeTrace(**row))
    return found
