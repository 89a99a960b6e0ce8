"""Every file and folder that a command writes has one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import pytest

from deepspec.cli import COMMANDS, main
from deepspec.errors import InUseError
from deepspec.outputs import FOLDER, RESULTS, hold
from deepspec.records import DecodeTrace
from deepspec.training.checkpoint import list_checkpoints
from tests.commands.test_outputs import contents, held_out, refused, run, settings, trained

__all__ = ["held_out", "refused", "run", "settings", "trained"]  # fixtures

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from deepspec.outputs import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


Held = AbstractContextManager[None]
READERS = {"plan", "verify-store", "serve-target", "recipes", "doctor"}  # they print alone


@pytest.fixture
def commands(
    settings: list[str], trained: Path, tmp_path: Path
) -> dict[str, tuple[list[str], Held]]:
    """By command: words that make it write, and what another process holds of that."""
    out = tmp_path / "out"
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps(asdict(DecodeTrace("p0", 0, 4, 3, 3, 1, 2, (0.5,), 0.1))) + "\n")
    given, checkpoint = f"run={trained}", f"checkpoint={trained}"
    page = ["recipe=tiny", f"out={out}.html"]
    return {
        "train": (settings, hold(out, FOLDER)),
        "regenerate": ([*settings, f"out={out}/a.jsonl"], hold(out / "a.jsonl")),
        "extract": (settings, hold(out, FOLDER)),
        "evaluate": ([given], hold(out, RESULTS)),
        "calibrate": ([given], hold(out, RESULTS)),
        "profile": ([given, f"out={out}/table.json"], hold(out / "table.json")),
        "load": ([given], hold(out, RESULTS)),
        "simulate": ([f"traces={traces}", "throughput=synthetic"], hold(out, RESULTS)),
        "export": ([checkpoint], hold(out)),
        "check": ([f"data={traces}", *page], hold(tmp_path / "out.html")),
        "reproduce": ([], hold(out, FOLDER)),
    }


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in READERS])
def test_a_second_writer_is_refused(
    command: str,
    commands: dict[str, tuple[list[str], Held]],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    """A new command belongs into `READERS`, or holds what it writes. What the other process has
    written so far stays as it is."""
    words, other = commands[command]
    if not any(word.startswith("out=") for word in words):
        words = [*words, f"out={tmp_path / 'out'}"]
    with other:
        before = contents(tmp_path)
        message = refused(command, *words)
        assert contents(tmp_path) == before
    assert " is in use by another deepspec process (" in message
    assert "out=" in message


def test_two_regenerations_into_one_file(
    settings: list[str],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Two processes: the second is refused by the first's name, and every row stands there once."""
    out = tmp_path / "a.jsonl"
    command = ["regenerate", *settings, f"out={out}"]
    first = subprocess.Popen([sys.executable, "-m", "deepspec", *command], cwd=ROOT)
    while not (tmp_path / ".a.jsonl.lock.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # however slow this process is
    for _ in range(2):  # who was refused once has not taken the holder's name away
        message = refused(*command)
        assert f"(regenerate, process {first.pid} on {socket.gethostname()}, since 2" in message
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == [f"p{i}" for i in range(8)]
    main(command)
    assert "8 rows, 8 from before" in capsys.readouterr().err


def test_rows_that_two_processes_wrote_count_once(
    settings: list[str], trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a training on such a file, whose settings do not ask for answers."""
    lines = (trained / "answers.jsonl").read_text().splitlines(keepends=True)
    changed = json.loads(lines[0])
    changed["messages"].insert(0, {"role": "system", "content": "Be brief."})
    twice = tmp_path / "answers.jsonl"
    twice.write_text("".join([*lines, *lines, json.dumps(changed) + "\n"]))
    own = [word for word in settings if not word.startswith("data.")]
    own += [f"data.path={twice}", "regenerate.enabled=false", "evaluation.enabled=false"]
    main(["train", *own, f"out={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert "training samples: 8 left out (the same row again, with the same id and conte" in said
    assert "training samples: 1 have the id of another one and other content; all of them" in said


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    """And its note names it no longer than until the next one holds the place."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InUseError, match=f"process {process.pid} "), hold(tmp_path / "a"):
            pass
        process.kill()
    with (
        hold(tmp_path / "a"),
        pytest.raises(InUseError, match=f"process {os.getpid()} "),
        hold(tmp_path / "a"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


@pytest.mark.parametrize("written", ["real/../real/a", "link/a", "real/a/", "alias"])
def test_other_ways_to_write_a_path(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "alias").symlink_to("real/a")  # of a file that is not there yet
    with hold(tmp_path / "real" / "a"), pytest.raises(InUseError), hold(Path(written)):
        pass


def test_processes_of_a_job_do_not_lock_one_another_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(tmp_path / "a"):
        monkeypatch.setenv("RANK", "3")
        with hold(tmp_path / "a"):
            pass


def test_patience(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []
    begun = threading.Event()

    def other() -> None:
        with hold(tmp_path / "a"):
            begun.set()
            while "waiting for" not in (said := capsys.readouterr().err):
                time.sleep(0.01)
            order.append(said)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    with hold(tmp_path / "a", patiently=True):
        order.append("mine")
    thread.join()
    assert "waiting for another deepspec process (" in order[0]
    assert order[1] == "mine"


def test_a_file_system_without_locks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work goes on, and says that nothing keeps others out."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with hold(tmp_path / "a"):
        pass
    said = capsys.readouterr().err
    assert "a is not kept against other commands" in said
    assert "No locks available" in said


def test_a_running_training_is_measured_and_exported(
    settings: list[str], run: Path, held_out: Path
) -> None:
    """Into its own folder; where it writes its own report and export, it waits for them."""
    prompts = f"evaluation.benchmarks={held_out}"
    with hold(run, FOLDER):
        main(["evaluate", f"run={run}", prompts, f"out={run}"])
        main(["export", f"checkpoint={run}", f"out={run / 'export'}"])
    with hold(run, RESULTS):
        main(["train", *settings, "evaluation.enabled=false", f"out={run}"])
        main(["export", f"checkpoint={run}", f"out={run / 'export'}"])
    assert list_checkpoints(run / "checkpoints")


def test_locks_are_not_content(
    settings: list[str], trained: Path, held_out: Path, tmp_path: Path
) -> None:
    """What commands left is theirs to go on with and to replace."""
    prompts = f"evaluation.benchmarks={held_out}"
    evaluate = ["evaluate", f"run={trained}", prompts, f"out={tmp_path / 'measured'}"]
    export = ["export", f"checkpoint={trained}", f"out={tmp_path / 'measured' / 'export'}"]
    for command in (evaluate, export) * 2:
        main(command)
    exported = {path.name for path in (tmp_path / "measured" / "export").iterdir()}
    assert exported == {"model.safetensors", "config.json", "README.md"}


def test_a_foreign_export_is_refused_before_the_work(
    settings: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "export").mkdir(parents=True)
    (out / "config.yaml").write_text("{recipe: a, target: b, drafter: c}")
    (out / "export" / "letter.txt").write_text("mine")
    before = contents(out)
    message = refused("train", *settings, f"out={out}")
    assert f"{out / 'export'} is not just an earlier export (it holds letter.txt)" in message
    assert {name: text for name, text in contents(out).items() if name != FOLDER} == before
