"""Which jobs a figure needs, that their words are understood, and how long they take together."""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import pytest

from deepspec.commands import calibrate, evaluate, load, regenerate
from deepspec.commands.settings import listed, take
from deepspec.config.loading import load_config
from deepspec.config.schema import FIGURES
from deepspec.errors import ConfigError
from deepspec.reproduction.estimate import makespan
from deepspec.reproduction.jobs import Job
from deepspec.reproduction.plan import Plan, check_jobs, make_plan

SETTINGS = {
    "regenerate": regenerate.SETTINGS,
    "train": "recipe=R",  # out= is a key of the config
    "evaluate": evaluate.SETTINGS.partition(";")[2],
    "calibrate": calibrate.SETTINGS,
    "load": load.SETTINGS,
}
OUT = Path("out with [signs], and so on")


def plan(*words: str) -> Plan:
    return make_plan(load_config("tiny", words), ["recipe=tiny"], OUT)


def names(made: Plan) -> set[str]:
    return {job.name for job in made.jobs}


def test_all_figures_share_what_they_share() -> None:
    made = plan("reproduce.seeds=3")
    trainings = [job for job in made.jobs if job.words[0] == "train"]
    # 4 drafters and 3 seeds; depth has 2 more of each kind; blocks has 4 sizes of 2 heads
    assert len(trainings) == len({job.name for job in trainings}) == 4 * 3 + 4 + 8
    assert set(made.figures) == set(FIGURES)
    assert made.figures["throughput"] == made.figures["budget"] == ("load",)


def test_a_job_stands_behind_what_it_needs() -> None:
    made = plan("reproduce.seeds=2")
    seen: set[str] = set()
    for job in made.jobs:
        assert seen.issuperset(job.needs), job.name
        seen.add(job.name)
    assert made.jobs[0].name == "answers"
    assert made.jobs[-1].name == "load"  # timed: when all else is done


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        ("depth", {"dspark-layers2-block7-seed0", "dflash-layers5-block7-seed0", "answers"}),
        ("reliability", {"calibrate-sts", "calibrate-platt", "dspark-layers2-block7-seed0"}),
        ("budget", {"load", "calibrate-platt", "mtp-layers1-block1-seed0"}),
    ],
)
def test_one_figure_has_what_it_needs_and_no_more(figure: str, expected: set[str]) -> None:
    made = plan(f"reproduce.figures=[{figure}]")
    assert expected < names(made)
    assert set(made.figures) == {figure}
    wanted, needed = set(made.figures[figure]), {n for job in made.jobs for n in job.needs}
    assert names(made) == wanted | needed


def test_words_are_understood() -> None:
    """By the commands they are for, signs in the folder's name and all; one job of each command."""
    made = plan("reproduce.blocks=[16]")
    by_command = {job.words[0]: job for job in made.jobs}  # the last of each
    assert set(by_command) == {"regenerate", "train", "evaluate", "calibrate", "load"}
    for command, job in by_command.items():
        own = ("recipe", "run", "method", *re.findall(r"(\w+)=", SETTINGS[command]))
        changes = [word for word in job.words[1:] if word.partition("=")[0] not in own]
        config = load_config("tiny", changes)
        if command == "train":
            assert job.name == "dspark-rnn-layers2-block16-seed0"
            assert config.data.path == [str(OUT.resolve() / "answers.jsonl")]
            assert (config.drafter.markov_head, config.drafter.block_size) == ("rnn", 16)
            assert config.training.max_steps == made.config.reproduce.steps
            assert not config.regenerate.enabled
            assert config.out == str(made.folder(job.name))
        if command == "load":
            values, _ = take(job.words[1:], "against")
            other = made.folder("mtp-layers1-block1-seed0")
            assert listed("against", values["against"]) == [str(other)]


def test_a_folder_is_the_same_however_it_is_written() -> None:
    assert plan() == make_plan(load_config("tiny"), ["recipe=tiny"], OUT.resolve())


def test_what_one_kind_of_drafter_refuses_is_known_before_anything_starts() -> None:
    word = "drafter.draft_vocab_size=1000"
    made = make_plan(load_config("tiny", [word]), ["recipe=tiny", word], OUT)
    with pytest.raises(ConfigError, match=f"^mtp-layers1-block1-seed0, .*: {word} is for"):
        check_jobs(made.jobs)


def test_answers_that_are_there_are_not_made() -> None:
    assert "answers" not in names(plan("regenerate.enabled=false"))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("reproduce.figures=[table2]", "must be some of table1, positions"),
        ("reproduce.depths=[5,1]", "a list of ascending numbers"),
        ("reproduce.thresholds=[0.5,2]", "from 0 to 1"),
        ("reproduce.jobs=0", "at least 1"),
    ],
)
def test_mistakes(word: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config("tiny", [word])


def test_makespan_is_that_of_the_order() -> None:
    """Against a clock that goes a second at a time."""

    def ticking(works: list[int], at_once: int) -> int:
        left, now, running = list(works), 0, []
        while left or running:
            while left and len(running) < at_once:
                running.append(left.pop(0))
            running = [work - 1 for work in running if work > 1]
            now += 1
        return now

    for works in permutations([1, 2, 3, 5]):
        for at_once in (1, 2, 3):
            jobs = [Job(str(work), (), work=work) for work in works]
            assert makespan(jobs, at_once) == ticking(list(works), at_once)
    alone = [Job("a", (), work=2), Job("b", (), work=3, alone=True), Job("c", (), work=1)]
    assert makespan(alone, 2) == 2 + 3 + 1
