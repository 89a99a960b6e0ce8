"""Sentences from folders whose numbers are known beforehand."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deepspec.config.loading import load_config
from deepspec.reproduction import lengths, loads, paper, positions
from deepspec.reproduction.finding import Claim, Finding
from deepspec.reproduction.page import findings, write_page
from deepspec.reproduction.plan import NGRAM, Plan, by_depth, compared, make_plan
from deepspec.serving.record import LoadRecord, write_records

ACCEPTED = {"math": 3, "code": 2, "chat": 1}  # by domain, of the drafter with a factor of 1


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    config = load_config("tiny", ["reproduce.seeds=2", "reproduce.depths=[1,2]"])
    return make_plan(config, ["recipe=tiny"], tmp_path)


def decode(plan: Plan, name: str, accepted: dict[str, Sequence[int]], block: int = 7) -> None:
    """Traces of ten prompts a domain: of each, rounds with these numbers of accepted drafts."""
    folder = plan.folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "benchmark": domain,
            "temperature": temperature,
            "seed": 0,
            "request": f"{domain}/{prompt}",
            "round": index,
            "position": 0,
            "proposed": block,
            "scheduled": block,
            "accepted": count,
            "emitted": count + 1,
            "confidences": [],
            "seconds": 0.1,
        }
        for temperature in (0.0, 1.0)
        for domain, counts in accepted.items()
        for prompt in range(10)
        for index, count in enumerate(counts)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "traces.jsonl").write_text(text)


def steady(less: int = 0) -> dict[str, Sequence[int]]:
    """Every round of a domain accepts the same; four rounds."""
    return {domain: [max(0, count - less)] * 4 for domain, count in ACCEPTED.items()}


def test_table1_says_who_is_longer_and_by_how_much(plan: Plan) -> None:
    by_kind = {"dspark": steady(), "dflash": steady(1), "eagle3": steady(-2), "mtp": steady(1)}
    for kind, trainings in compared(plan.config).items():
        for training in trainings:
            decode(plan, training.name, by_kind[kind])
    decode(plan, NGRAM, steady(9))
    found = lengths.table1(plan)
    # (4 + 3 + 2) / 3 over (3 + 2 + 1) / 3, and over (6 + 5 + 4) / 3
    assert [claim.holds for claim in found.claims] == [True, False, True]
    assert "DSpark is 50 % (± 0) longer than DFlash, paper +16 %" in found.sentence
    assert (
        "does not agree: DSpark is 40 % (± 0) shorter than EAGLE-3, paper +31 %" in found.sentence
    )
    assert "math 4.00, code 3.00, chat 2.00" in found.sentence
    assert found.verdict == "agrees in part"
    rows = [row for row in found.rows if row["domain"] == "mean" and row["temperature"] == 1]
    measured = {(row["drafter"], row["seed"]): row["accepted_length"] for row in rows}
    assert measured["DSpark", "all"] == measured["DSpark", 0] == measured["DSpark", 1] == 3.0
    assert measured["DFlash", "all"] == 2.0
    with found.save(plan.out).open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(found.rows)


def test_a_difference_within_chance_is_no_agreement(plan: Plan) -> None:
    """DSpark is longer on nine prompts and much shorter on one."""
    for kind, trainings in by_depth(plan.config).items():
        for training in trainings:
            decode(plan, training.name, steady())
            if kind == "dspark":
                path = plan.folder(training.name) / "traces.jsonl"
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                for row in rows:
                    shifted = row["accepted"] + (-1 if row["request"].endswith("/0") else 0)
                    row["accepted"] = shifted + (row["request"].endswith(("/1", "/2")))
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lengths.depth(plan)
    assert found.verdict == "does not agree"
    assert "DSpark with 1 layer" in found.sentence
    assert "DFlash with 2 layers has" not in found.sentence


def test_positions_tell_a_fall_from_a_rise(plan: Plan) -> None:
    """DFlash keeps 9 of 10 at the first position and half at the second; DSpark 9 of 10 at both."""
    falling, level = [0] + [1] * 4 + [2] * 5, [0] + [1] + [2] * 8
    for kind, trainings in compared(plan.config).items():
        rounds = falling if kind == "dflash" else level
        for training in trainings:
            decode(plan, training.name, dict.fromkeys(ACCEPTED, rounds), block=2)
    found = positions.positions(plan)
    assert found.verdict == "agrees"
    assert "DFlash goes from 90 % to 56 % at draft 2" in found.sentence
    assert "DSpark goes from 90 % to 89 % at draft 2" in found.sentence
    assert "from 0 to 33 points" in found.sentence


def load_records() -> list[LoadRecord]:
    """Algorithm 1 gives each user half again as much as MTP-1 at the same number of users, and both
    lose a quarter of a user's speed for each doubling."""
    levels = (1, 2, 4, 8)

    def records(
        policy: str, drafter: str, speed: float, budgets: Sequence[float]
    ) -> list[LoadRecord]:
        made = []
        for step, (users, verified) in enumerate(zip(levels, budgets, strict=True)):
            own = speed * 0.75**step
            numbers = (own * users, own, own, own, verified, 1.5, 10, 100, 1.0, None, None)
            made.append(LoadRecord(policy, drafter, users, None, *numbers))
        return made

    one = records("plain", "", 9, [1] * 4) + records("fixed", "dspark", 11, [8] * 4)
    one += records("threshold", "dspark", 12, [4] * 4) + records(
        "async", "dspark", 15, [5, 4, 3, 5]
    )
    one += records("algorithm1", "dspark", 15, [5, 4, 3, 2]) + records("fixed", "mtp", 10, [2] * 4)
    return one


def test_loads_compare_at_matched_throughput_and_speed(plan: Plan) -> None:
    write_records(load_records(), {}, plan.folder("load"), "load")
    found = loads.throughput(plan)
    assert found.verdict == "agrees"
    assert "against whole blocks at the highest load, +36 %" in found.note
    assert "is +36 % to +36 %" in found.note  # whole blocks are the best of the others
    gains = loads._gains([2.0, 9.0], [10.0, 10.0], [1.0, 3.0], [20.0, 40.0])
    assert gains == [2.0]  # 30 over 10; the second lies outside
    budget = loads.budget(plan)
    assert [claim.holds for claim in budget.claims] == [True, False]
    assert "Algorithm 1 goes from 5.0 to 2.0" in budget.sentence


def test_a_load_without_a_median_user_keeps_its_place(plan: Plan) -> None:
    """Nobody had two rounds with whole blocks at 4 users, nor with the threshold at any; with
    Algorithm 1 at 8 there was not one round."""
    records = []
    for one in load_records():
        if one.policy == "threshold" or (one.policy, one.concurrency) == ("fixed", 4):
            one = replace(one, user_p50=None)
        elif (one.policy, one.concurrency) == ("algorithm1", 8):
            one = replace(one, user_p50=None, budget=None, throughput=0.0)
        records.append(one)
    write_records(records, {}, plan.folder("load"), "load")
    found, budget = loads.throughput(plan), loads.budget(plan)
    cells = {row[0]: row[1:] for row in found.table.rows}
    assert cells["whole blocks, a user"] == ["11.0", "8.2", "–", "4.6"]
    assert cells["threshold, a user"] == ["–"] * 4
    assert found.verdict == "agrees"
    assert "is +36 % to +36 %" in found.note
    cells = {row[0]: row[1:] for row in budget.table.rows}
    assert cells["Algorithm 1, verified"] == ["5.00", "4.00", "3.00", "–"]
    assert cells["threshold, verified"] == ["4.00"] * 4
    assert "Algorithm 1 goes from 5.0 to 3.0" in budget.sentence


def test_verdicts() -> None:
    def verdict(*holds: bool) -> str:
        claims = tuple(Claim(each, "so") for each in holds)
        return Finding("n", "t", "p", "", claims, None, [], ()).verdict  # type: ignore[arg-type]

    assert verdict(True, True) == "agrees"
    assert verdict(True, False) == "agrees in part"
    assert verdict(False) == "does not agree"
    assert verdict() == "nothing to compare"


def test_paper_means_are_those_of_its_rows() -> None:
    assert paper.lengths("dspark")["math"] == pytest.approx((6.11 + 5.70 + 4.89) / 3)
    assert paper.gain("eagle3") == pytest.approx(42.54 / 32.50 - 1)


def test_page_says_what_is_not_measured(plan: Plan) -> None:
    for trainings in by_depth(plan.config).values():
        for training in trainings:
            decode(plan, training.name, steady())
    done = set(plan.figures["depth"])
    found = findings(plan, done)
    assert [finding.name for finding in found] == ["depth"]
    page = write_page(plan, found, {NGRAM: plan.out / "logs" / "ngram.log"}).read_text()
    assert "not measured: ngram failed" in page
    assert page.count("not measured yet") == 6
    assert page.count("<svg") == 1
