"""Several processes answer together: the rows of one, whatever dies in between."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepspec.cli import main
from deepspec.config.schema import RegenerateConfig
from deepspec.regeneration import RegenerationCounts, ServerAnswerer, together
from tests.jobs import open_process
from tests.regeneration.conftest import questions, talk
from tests.regeneration.test_server import DATA, Reply, Scripted, echo, rows_of
from tests.regeneration.test_server import run as ask

pytestmark = pytest.mark.usefixtures("nothing_left")
SETTINGS = ("regenerate.samples_per_prompt=4", "regenerate.batch_size=2")


def rows(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


@pytest.mark.slow  # a minute of starting processes
def test_two_are_killed_and_others_finish(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL while both have answers in their parts; two go on, then one has nothing to do."""
    words = ("regenerate", f"recipe={recipe}", *SETTINGS)
    alone, out = tmp_path / "alone.jsonl", tmp_path / "both" / "answers.jsonl"
    main([*words, f"out={alone}"])
    assert len(rows(alone)) == 14 * 4

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *torchrun, "-m", "deepspec", *words, f"out={out}"]
    job = open_process(command)
    parts = [out.with_name(f"answers.part-{number:04d}.jsonl") for number in range(2)]
    while not all(part.exists() and part.read_bytes().count(b"\n") > 1 for part in parts):
        assert job.poll() is None
        time.sleep(0.005)
    for process in psutil.Process(job.pid).children(recursive=True):
        process.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    there = sum(part.read_bytes().count(b"\n") for part in parts)
    assert 4 <= there < 14 * 4

    job = open_process(command)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert f"answers: 56 rows, {there} from before" in output
    assert rows(out) == rows(alone)
    assert {path.name for path in out.parent.iterdir()} == {
        ".answers.jsonl.lock",
        "answers.json",
        "answers.jsonl",
    }

    # what a job of several left behind is taken over by a single process too
    out.with_name("answers.part-0007.json").write_text(out.with_suffix(".json").read_text())
    lines = out.read_text().splitlines(keepends=True)
    out.with_name("answers.part-0007.jsonl").write_text("".join(lines[:9]))
    out.write_text("".join(lines[5:]))
    main([*words, f"out={out}"])
    assert rows(out) == rows(alone)
    assert len(list(out.parent.iterdir())) == 2


def test_settings_of_parts_are_looked_at(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    part = out.with_name("answers.part-0001.jsonl")
    part.write_text(json.dumps({"id": "p0", "messages": [], "finish_reason": "stop"}) + "\n")
    part.with_suffix(".json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(["regenerate", f"recipe={recipe}", f"out={out}"])
    assert end.value.code == 2
    assert "answers.part-0001.jsonl holds answers of other settings" in capsys.readouterr().err


def test_failures_of_a_killed_job_are_not_those_of_the_next(tmp_path: Path) -> None:
    """Its process 1 left an answer and three failures, which are asked again."""
    healthy = False

    def reply(request: dict[str, Any], asked: int) -> Reply:
        fine = healthy or request["messages"][0] == questions(1)[0].messages[0]
        return echo(request, asked) if fine else (422, {})

    with Scripted(reply) as server:
        counts, _, failed = ask(server.url, tmp_path / "a.part-0001.jsonl", questions(4))
        assert (counts.file.rows, counts.failed, len(failed)) == (1, {"HTTP 422": 3}, 3)
        healthy = True
        counts, _, failed = ask(server.url, tmp_path / "a.jsonl", questions(4))
    assert (counts.resumed, counts.file.rows, counts.failed, failed) == (1, 4, {}, {})


def test_processes_name_doubles_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that the data repeats, once in each share: both are answered, and stay so."""
    conversations = [talk("x", "0"), talk("a", "1"), talk("a", "2"), talk("y", "3")]
    own, wait = threading.local(), threading.Barrier(2, timeout=30).wait
    monkeypatch.setattr(together, "rank", lambda: own.rank)
    monkeypatch.setattr(together, "world_size", lambda: 2)
    out, config = tmp_path / "both.jsonl", RegenerateConfig()

    def process(rank: int) -> RegenerationCounts | None:
        own.rank = rank
        return together.regenerate_together(conversations, answerer, config, out, wait)

    with Scripted(echo) as server, ThreadPoolExecutor(2) as processes:
        alone = ask(server.url, tmp_path / "alone.jsonl", conversations)[1]
        assert set(alone) == {"x", "a", "a~2", "y"}
        answerer = ServerAnswerer(server.url, "tiny", DATA)
        for resumed in (0, 4):
            counts, _ = processes.map(process, range(2))
            assert counts is not None
            assert (counts.resumed, counts.file.rows) == (resumed, 4)
            assert rows_of(out) == alone
