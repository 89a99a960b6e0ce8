"""Figures of accepted lengths: table 1, depth, block size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.evaluation.comparison import Counts, Lengths, compare, mean
from deepspec.evaluation.report import Table
from deepspec.reproduction import paper
from deepspec.reproduction.drawing import Bars, Scales, Series, bars, lines
from deepspec.reproduction.finding import Claim, Finding, percent, signed
from deepspec.reproduction.jobs import LABELS, Training
from deepspec.reproduction.plan import NGRAM, Plan, by_block, by_depth, compared

MEAN = "mean"
LENGTH = "accepted length (tokens a round)"
SPREAD = (
    "± is one standard error over prompts (bootstrap, all rounds of a prompt together); it says "
    "nothing about other trainings."
)
Found = dict[str, list[Lengths]]  # domain -> a side each; MEAN over the domains last


def measure(sides: Sequence[Sequence[Path]], temperature: float) -> Found:
    """Accepted lengths of each side, a side being the folders of runs that differ by their seed."""
    counts = [[_counts(folder) for folder in side] for side in sides]
    domains = sorted(domain for at, domain in counts[0][0].cells if at == temperature)
    generator = np.random.default_rng(0)
    found = {name: compare(counts, (temperature, name), generator) for name in domains}
    found[MEAN] = [mean(same) for same in zip(*found.values(), strict=True)]
    return found


@cache
def _counts(folder: Path) -> Counts:
    return Counts(folder)


def table1(plan: Plan) -> Finding:
    """DSpark, DFlash, EAGLE-3, MTP-1 and prompt lookup by domain, at temperatures 1 and 0."""
    trainings = compared(plan.config)
    sides = {LABELS[kind]: _folders(plan, same) for kind, same in trainings.items()}
    sides["lookup"] = [plan.folder(NGRAM)]
    found = {at: measure(list(sides.values()), at) for at in (1.0, 0.0)}
    prompts = {name: str(_prompts(sides["DSpark"][0], name)) for name in found[1.0]}
    table = Table(
        ["domain", "T", "prompts", *_gain_header(list(sides))],
        [
            [name, f"{at:g}", prompts[name], *_gain_cells(own)]
            for at, same in found.items()
            for name, own in same.items()
        ],
    )
    rows = [row for at, same in found.items() for row in _length_rows(at, same, list(sides))]
    places = [*(name for name in paper.DOMAINS if name in found[1.0]), MEAN]
    if len(places) == 1:
        places = list(found[1.0])
    ours = Bars(
        "here, the tiny target" if plan.config.recipe == "tiny" else f"here, {plan.config.recipe}",
        places,
        {label: [found[1.0][name][i].pooled for name in places] for i, label in enumerate(sides)},
        {label: [_error(found[1.0][name][i]) for name in places] for i, label in enumerate(sides)},
    )
    theirs = Bars(
        "paper, Qwen3-4B",
        [*paper.DOMAINS, MEAN],
        {LABELS[kind]: list(paper.lengths(kind).values()) for kind in paper.TABLE1},
    )
    drawing = bars("table1", "Accepted length by domain and drafter", LENGTH, [ours, theirs])
    seeds = plan.config.reproduce.seeds
    return Finding(
        "table1",
        "Table 1: accepted length by drafter and domain",
        f"DSpark over DFlash {signed(paper.gain('dflash'))}, over EAGLE-3 "
        f"{signed(paper.gain('eagle3'))} (mean of nine benchmarks at temperature 1, Qwen3-4B; "
        f"{paper.SOURCE}, table 1). MTP-1 and prompt lookup are not in that table.",
        f"Tokens a round, bonus token counted, of {of_seeds(seeds)} trained alike for "
        f"{plan.config.reproduce.steps} steps; {SPREAD} Gains are DSpark's over the other.",
        _table1_claims(found[1.0]),
        table,
        rows,
        ((drawing, f"At temperature 1, {of_seeds(seeds)} pooled; bars of one standard error."),),
    )


def _table1_claims(found: Found) -> tuple[Claim, ...]:
    """DSpark over the others of the paper's table by more than chance, and its order of domains."""
    claims = []
    for index, kind in ((1, "dflash"), (2, "eagle3")):
        gain, error = _gain(found[MEAN][0], found[MEAN][index])
        text = (
            f"DSpark is {percent(abs(gain))} (± {100 * error:.0f}) "
            f"{'longer' if gain > 0 else 'shorter'} than {LABELS[kind]}, paper "
            f"{signed(paper.gain(kind))}"
        )
        claims.append(Claim(gain > 2 * error, text))
    theirs = [name for name in paper.lengths("dspark") if name in found and name != MEAN]
    if len(theirs) > 1:
        ours = sorted(theirs, key=lambda name: -found[name][0].pooled)
        wanted = sorted(theirs, key=lambda name: -paper.lengths("dspark")[name])
        shown = ", ".join(f"{name} {found[name][0].pooled:.2f}" for name in ours)
        claims.append(
            Claim(ours == wanted, f"DSpark by domain {shown}, paper's order {', '.join(wanted)}")
        )
    return tuple(claims)


def depth(plan: Plan) -> Finding:
    """DSpark and DFlash by decoder layers of the drafter."""
    trainings = by_depth(plan.config)
    found, swept = _sweep(plan, trainings, plan.config.reproduce.depths)
    *_, shallow, deep = [plan.config.reproduce.depths[0], *plan.config.reproduce.depths]
    ours, theirs = swept["dspark"][shallow], swept["dflash"][deep]
    gain, error = _gain(ours, theirs)
    text = (
        f"DSpark with {_layers(shallow)} has {ours.pooled:.2f}, DFlash with {_layers(deep)} "
        f"{theirs.pooled:.2f}: {signed(gain)} (± {100 * error:.0f})"
    )
    return _swept(
        plan,
        "depth",
        "Figure 3: drafter depth",
        f"A DSpark of 2 layers beats a DFlash of 5 ({paper.SOURCE}, figure 3).",
        (Claim(gain > 2 * error, text),),
        {LABELS[kind]: same for kind, same in swept.items()},
        found,
        ("layers", "decoder layers of the drafter"),
    )


def blocks(plan: Plan) -> Finding:
    """DSpark by block size, with both sequential heads."""
    names = {"vanilla": "Markov head", "rnn": "rnn head"}
    found, swept = _sweep(plan, by_block(plan.config), plan.config.reproduce.blocks)
    first, last = plan.config.reproduce.blocks[0], plan.config.reproduce.blocks[-1]
    claims = []
    for head, label in names.items():
        gain, error = _gain(swept[head][last], swept[head][first])
        text = f"with the {label}, blocks of {last} give {signed(gain)} (± {100 * error:.0f})"
        claims.append(Claim(gain > -2 * error, f"{text} over {first}, paper: not less"))
    return _swept(
        plan,
        "blocks",
        "Figure 4: block size, with Markov and rnn heads",
        f"Blocks of 4, 8, 12 and 16 with both heads ({paper.SOURCE}, figure 4).",
        tuple(claims),
        {names[head]: same for head, same in swept.items()},
        found,
        ("block_size", "drafts a round"),
    )


# ------------------------------------------------------------------------------------------ parts


def _sweep(
    plan: Plan, trainings: Mapping[str, Sequence[Training]], sizes: Sequence[int]
) -> tuple[dict[str, dict[int, Found]], dict[str, dict[int, Lengths]]]:
    """Of each line and size, the lengths by domain, and their mean; at temperature 1."""
    folders = [_folders(plan, [one]) for same in trainings.values() for one in same]
    together = measure(folders, 1.0)  # the same prompts drawn for all
    by_place = [{name: [own[i]] for name, own in together.items()} for i in range(len(folders))]
    whole, means = {}, {}
    for row, line in enumerate(trainings):
        own = dict(zip(sizes, by_place[row * len(sizes) : (row + 1) * len(sizes)], strict=True))
        whole[line] = own
        means[line] = {size: each[MEAN][0] for size, each in own.items()}
    return whole, means


def _swept(
    plan: Plan,
    name: str,
    title: str,
    theirs: str,
    claims: tuple[Claim, ...],
    swept: Mapping[str, Mapping[int, Lengths]],
    found: Mapping[str, Mapping[int, Found]],
    axis: tuple[str, str],
) -> Finding:
    """A finding with a line each of `swept` over its sizes."""
    key, label = axis
    sizes = list(next(iter(swept.values())))
    series = [
        Series(line, sizes, [each.pooled for each in own.values()], [*map(_error, own.values())])
        for line, own in swept.items()
    ]
    rows = [
        {
            "line": line,
            key: size,
            "domain": domain,
            "accepted_length": round(each[0].pooled, 4),
            "standard_error": round(_error(each[0]), 4),
        }
        for line, own in found.items()
        for size, domains in own.items()
        for domain, each in domains.items()
    ]
    domains = list(next(iter(next(iter(found.values())).values())))
    cells = [
        [f"{line}, {domain}", *(_shown(found[key_][size][domain][0]) for size in sizes)]
        for key_, line in zip(found, swept, strict=True)
        for domain in domains
    ]
    drawing = lines(name, title, Scales(label, LENGTH, ticks=True), series)
    return Finding(
        name,
        title,
        theirs,
        f"Temperature 1, one training each of {plan.config.reproduce.steps} steps; {SPREAD}",
        claims,
        Table(["", *(str(size) for size in sizes)], cells),
        rows,
        ((drawing, "Mean over the domains; bars of one standard error."),),
    )


def _length_rows(temperature: float, found: Found, labels: list[str]) -> list[dict[str, Any]]:
    """For the CSV: each side pooled, with its spread and DSpark's gain over it, and each seed."""
    rows = []
    for domain, sides in found.items():
        for label, own in zip(labels, sides, strict=True):
            gain, error = _gain(sides[0], own)
            place = {"temperature": temperature, "domain": domain, "drafter": label}
            rows.append(
                {
                    **place,
                    "seed": "all",
                    "accepted_length": round(own.pooled, 4),
                    "standard_error": round(_error(own), 4),
                    "dspark_gain": round(gain, 4),
                    "dspark_gain_standard_error": round(error, 4),
                }
            )
            for seed, length in enumerate(own.runs):
                rows.append({**place, "seed": seed, "accepted_length": round(length, 4)})
    return rows


def _gain_header(labels: list[str]) -> list[str]:
    return [labels[0], *(name for label in labels[1:] for name in (label, "gain"))]


def _gain_cells(sides: Sequence[Lengths]) -> list[str]:
    cells = [_shown(sides[0])]
    for own in sides[1:]:
        gain, error = _gain(sides[0], own)
        cells += [_shown(own), f"{100 * gain:+.0f} ± {100 * error:.0f} %"]
    return cells


def _shown(own: Lengths) -> str:
    """The length with its error; the single seeds behind it, where there are several."""
    seeds = ", ".join(f"{length:.2f}" for length in own.runs)
    return f"{own.pooled:.2f} ± {_error(own):.2f}" + (f" ({seeds})" if len(own.runs) > 1 else "")


def _error(own: Lengths) -> float:
    return float(own.drawn.std(ddof=1))


def _gain(ours: Lengths, theirs: Lengths) -> tuple[float, float]:
    """(ours over theirs - 1, its standard error)."""
    return ours.pooled / theirs.pooled - 1, float((ours.drawn / theirs.drawn).std(ddof=1))


def _folders(plan: Plan, trainings: Sequence[Training]) -> list[Path]:
    return [plan.folder(training.name) for training in trainings]


def _prompts(folder: Path, domain: str) -> int:
    """Of a domain, or of all."""
    cells = _counts(folder).cells
    return sum(len(own) for (at, name), own in cells.items() if at and domain in (name, MEAN))


def of_seeds(seeds: int) -> str:
    """In words."""
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
