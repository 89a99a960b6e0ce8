"""Jobs as real processes: their order, their failures, and a reproduction that is really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deepspec.cli import main
from deepspec.commands.reproduce import check_settings
from deepspec.config.loading import load_config
from deepspec.errors import ConfigError
from deepspec.reproduction.board import Board
from deepspec.reproduction.jobs import Job
from deepspec.reproduction.page import PAGE
from deepspec.reproduction.plan import Plan
from deepspec.reproduction.run import Runner, same_command
from tests.jobs import LAST, open_process, train_command, wait_for_step

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_failed_job_costs_only_what_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = (
        Job("bad", ("recipes", "what")),
        Job("good", ("recipes",)),
        Job("timed", ("recipes",), ("good",), alone=True),
        Job("lost", ("recipes",), ("bad",)),
        Job("lost-too", ("recipes",), ("good", "lost")),
    )
    plan = Plan(tmp_path, load_config("tiny"), jobs, {})
    told: list[str] = []
    runner = Runner(plan)
    runner.run(Board(len(jobs), 2, 1.0), lambda job: told.append(job.name))
    assert told == ["good", "timed"]
    assert runner.done == {"good", "timed"}
    assert runner.failed == {"bad": tmp_path / "logs" / "bad.log"}
    shown = capsys.readouterr().err
    assert "bad failed, see" in shown
    assert "takes no settings; found what" in shown

    again = Runner(plan)
    assert [job.name for job in again.missing] == ["bad", "lost", "lost-too"]
    changed = Job("good", ("recipes", "--traceback"))
    assert Runner(Plan(tmp_path, plan.config, (changed,), {})).missing == [changed]


def test_a_path_written_in_another_way_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is done is not run again, and the folder is not refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(".")

    def missing(data: str) -> list[str]:
        config = load_config("tiny", [f"data.path=[{data}]"])
        check_settings(config, tmp_path)
        words = ("train", "recipe=tiny", f"data.path=[{data}]", "seed=1")
        runner = Runner(Plan(tmp_path, config, (Job("training", words),), {}))
        return [job.name for job in runner.missing]

    assert missing("a.jsonl") == ["training"]
    (tmp_path / "done").mkdir()
    done = {"words": ["train", "recipe=tiny", "data.path=[a.jsonl]", "seed=1"]}
    (tmp_path / "done" / "training.json").write_text(json.dumps(done))
    for written in ("a.jsonl", "./a.jsonl", "link/a.jsonl", f"{tmp_path}/a.jsonl"):
        assert missing(written) == []
    with pytest.raises(ConfigError, match=r"data\.path=\['b\.jsonl'\], but .* was begun with"):
        missing("b.jsonl")


@pytest.mark.parametrize("words", [None, 1, [], [1, 2], ["train", "seed=1"], ["train", "seed"]])
def test_markers_of_other_commands(words: object) -> None:
    assert not same_command(words, ("train", "data.path=a"))


RUN = """
import sys
from pathlib import Path
from deepspec.config.loading import load_config
from deepspec.reproduction.board import Board
from deepspec.reproduction.jobs import Job
from deepspec.reproduction.plan import Plan
from deepspec.reproduction.run import Runner
plan = Plan(Path(sys.argv[1]), load_config("tiny"), (Job("training", tuple(sys.argv[2:])),), {})
Runner(plan).run(Board(1, 1, 1.0), lambda job: None)
"""


@pytest.mark.slow
def test_jobs_die_with_it_and_go_on_where_they_were(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL of the process that starts them; the whole command is in the slow suite."""
    job = Job("training", tuple(train_command(recipe, tmp_path / "run")[3:]))
    process = open_process([sys.executable, "-c", RUN, str(tmp_path), *job.words])
    wait_for_step(tmp_path / "run", 3, process)
    await_end_of_jobs(process)
    assert not (tmp_path / "run" / LAST).exists()

    runner = Runner(Plan(tmp_path, load_config("tiny"), (job,), {}))
    assert runner.missing == [job]
    runner.run(Board(1, 1, 1.0), lambda job: None)
    assert runner.missing == []
    assert "going on from" in (tmp_path / "logs" / "training.log").read_text()
    assert (tmp_path / "run" / LAST).exists()


def await_end_of_jobs(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and nothing that it started is left."""
    jobs = psutil.Process(process.pid).children()
    assert jobs
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(jobs, timeout=10)
    assert not alive, "a job outlived the one that started it"


def words(recipe: Path, folder: Path) -> list[str]:
    """A reproduction of two trainings of 80 steps, on answers that are there."""
    path = folder / "answers.jsonl"
    turns = ("Say something about {}.", "About {} there is nothing that I could say.")
    rows = [
        {
            "id": f"p{i}",
            "messages": [
                {"role": role, "content": text.format(i)}
                for role, text in zip(("user", "assistant"), turns, strict=True)
            ],
        }
        for i in range(14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"recipe={recipe}",
        f"out={folder / 'out'}",
        "figures=[depth]",
        "reproduce.depths=[1]",
        "reproduce.block_size=4",
        "reproduce.steps=80",
        "reproduce.prompts=2",
        f"data.path=[{path}]",
        "regenerate.enabled=false",
        "evaluation.enabled=true",
        f"evaluation.benchmarks=[{path}]",
        "decoding.max_new_tokens=8",
    ]


def begin(given: list[str]) -> subprocess.Popen[str]:
    """Until the first training has saved some steps."""
    process = open_process([sys.executable, "-m", "deepspec", "reproduce", *given])
    out = Path(given[1].partition("=")[2])
    wait_for_step(out / "runs" / "dspark-layers1-block4-seed0", 3, process)
    return process


def finish(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The same command goes on where it was, to the end; once more, it has nothing to do."""
    out = Path(given[1].partition("=")[2])
    done = subprocess.run(
        [sys.executable, "-m", "deepspec", "reproduce", *given], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This is an estimate" in done.stderr
    assert "Figure 3: drafter depth" in done.stdout
    log = (out / "logs" / "dspark-layers1-block4-seed0.log").read_text()
    assert "going on from" in log
    rows = (out / "depth.csv").read_text().splitlines()
    assert rows[0] == "line,layers,domain,accepted_length,standard_error"
    assert len(rows) == 1 + 2 * 2  # two drafters, the domain and the mean
    assert "Figure 3" in (out / PAGE).read_text()

    capsys.readouterr()
    main(["reproduce", *given])
    again = capsys.readouterr()
    assert again.out == done.stdout
    assert "jobs to run" not in again.err


@pytest.mark.slow  # what it rests on is tested above
def test_killed_it_goes_on_where_it_was(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(recipe, tmp_path)
    await_end_of_jobs(begin(given))
    finish(given, capsys)
    with pytest.raises(SystemExit):
        main(["reproduce", *given, "training.learning_rate=0.5"])
    assert "training.learning_rate=0.5, but" in capsys.readouterr().err


@pytest.mark.slow  # its end is that of the test above
def test_interrupted_it_saves_and_leaves(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(recipe, tmp_path)
    process = begin(given)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "is saved and the same command goes on" in output
    assert "Traceback" not in output
    finish(given, capsys)


@pytest.mark.slow
def test_short_reproduction_of_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All figures, with the embedded target and hardly any steps."""
    figures = "table1,positions,depth,blocks,thresholds,reliability,throughput,budget"
    given = [
        f"out={tmp_path}",
        "reproduce=short",
        f"figures=[{figures}]",
        "reproduce.depths=[1,2]",
        "reproduce.blocks=[2,4]",
        "reproduce.thresholds=[0,0.5]",
        "reproduce.steps=8",
    ]
    main(["reproduce", *given])
    shown = capsys.readouterr().out
    assert [shown.count(f"Figure {number}: ") for number in range(2, 9)] == [1] * 7
    assert all((tmp_path / f"{name}.csv").stat().st_size for name in figures.split(","))
