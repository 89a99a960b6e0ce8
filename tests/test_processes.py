"""Processes end with what started them: the real ones, killed, in place of a launcher's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.processes import MARKS, die_with_parent
from tests.jobs import all_gone, processes_of

# a process of a job, which says that it runs and then sleeps
JOB = """
import pathlib, sys, time
from deepspec import processes
processes.POLL = 0.02
processes.end_with_launchers()
pathlib.Path(sys.argv[2].removeprefix("out="), "running").touch()
time.sleep(60)
"""
# starts its words, from a thread that ends at once
LAUNCHER = """
import subprocess, sys, threading
started = []
thread = threading.Thread(target=lambda: started.append(subprocess.Popen(sys.argv[1:])))
thread.start()
thread.join()
started[0].wait()
"""
PARENT = """
import subprocess, sys
from deepspec.processes import die_with_parent
subprocess.Popen(sys.argv[1:], preexec_fn=die_with_parent).wait()
"""


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in processes_of(tmp_path):
        process.kill()


LAUNCHED = {"RANK", *MARKS}
MOMENT = 0.4  # seconds, in which a process looks several times


def begin(out: Path, *command: str, **variables: str) -> subprocess.Popen[bytes]:
    """`command` with a job's words at its end, once that job runs."""
    words = [*command, sys.executable, "-c", JOB, "train", f"out={out}"]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    process = subprocess.Popen(words, env=environment | variables, preexec_fn=die_with_parent)
    deadline = time.monotonic() + 30
    while not (out / "running").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


LAUNCH = (sys.executable, "-c", LAUNCHER)


def test_a_process_of_a_job_lives_as_long_as_its_launcher(
    out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """That the thread which started it has ended is not the end of the launcher."""
    launcher = begin(out, *LAUNCH, RANK="1", WORLD_SIZE="2")
    time.sleep(MOMENT)
    assert len(processes_of(out)) == 2
    end(launcher)
    assert all_gone(out)
    said = capfd.readouterr().err
    assert f"process 1 of 2 ends because its launcher (process {launcher.pid}) is gone" in said


def test_so_it_is_where_one_launcher_starts_another(out: Path) -> None:
    """`deepspeed` does."""
    launcher = begin(out, *LAUNCH, *LAUNCH, RANK="0", WORLD_SIZE="2")
    assert len(processes_of(out)) == 3
    end(launcher)
    assert all_gone(out)


def test_so_it_is_behind_a_wrapper_that_changes_its_words(out: Path) -> None:
    script = out / "wrapper.sh"
    script.write_text('"$@" engine=zero2; true\n')
    launcher = begin(out, *LAUNCH, "bash", str(script), RANK="0", TORCHELASTIC_RUN_ID="none")
    end(launcher)
    assert all_gone(out)


def test_without_a_launcher_it_outlives_what_started_it(out: Path) -> None:
    end(begin(out, *LAUNCH))
    time.sleep(MOMENT)
    assert len(processes_of(out)) == 1


def test_a_shell_that_started_a_job_may_end(out: Path) -> None:
    """A script that has the job's words, and a RANK that is set by hand."""
    script = out / "job.sh"
    script.write_text(f'"$@" &\nuntil [ -e "{out}/running" ]; do sleep 0.02; done\n')
    assert begin(out, "bash", str(script), RANK="0").wait() == 0
    time.sleep(MOMENT)
    assert len(processes_of(out)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a parent's end")
def test_what_we_start_dies_with_us(out: Path) -> None:
    """As the jobs of `deepspec reproduce` do."""
    process = begin(out, sys.executable, "-c", PARENT)
    assert len(processes_of(out)) == 2
    end(process)
    assert all_gone(out)
