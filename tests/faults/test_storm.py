"""Faults at random moments of a real job, and then bitwise the weights of a job that had none.

The job: two processes under torchrun (ZeRO-2 where DeepSpeed is installed), fetching features from
two servers; for a cut cable it runs between two network namespaces instead. Every step is logged,
so a sample that is lost or seen twice shows in the steps and in the weights. After each fault no
process of the job is left.

    make storm      30 faults of ten kinds, with a table
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deepspec.cli import main
from deepspec.training.checkpoint import (
    DESCRIPTION,
    WEIGHTS,
    list_checkpoints,
    read_checkpoint,
    step_folder,
)
from tests import forked
from tests.hosts import LAUNCHER, Host, connected
from tests.jobs import HAVE_DEEPSPEED, all_gone, open_process, rank_of

pytestmark = pytest.mark.usefixtures("nothing_left")
ENGINE = "zero2" if HAVE_DEEPSPEED else "zero0"
SAVE_EVERY = 3
TIMEOUT = 40  # engine.timeout where a cable is cut; the two must also start within it
PORTS = (18371, 18372)
ADDRESSES = ",".join(f"http://127.0.0.1:{port}" for port in PORTS)
REMOTE = ("features=remote", f"features.servers=[{ADDRESSES}]", "features.prefetch=2")
Job = subprocess.Popen[str] | forked.Forked


@dataclass
class Storm:
    """One run folder under fire."""

    recipe: Path
    out: Path
    store: Path
    steps: int
    hosts: tuple[Host, Host] | None
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    servers: dict[int, forked.Forked] = field(default_factory=dict)

    # ---------------------------------------------------------------------------- the job

    @property
    def settings(self) -> list[str]:
        steps = [f"training.max_steps={self.steps}", f"training.save_every={SAVE_EVERY}"]
        return [f"out={self.out}", f"engine={ENGINE}", *steps, "training.log_every=1"]

    def start(self, *words: str, room: int | None = None) -> subprocess.Popen[str]:
        """By launch/torchrun.sh, on features from the servers unless `words` say otherwise."""
        command = [str(LAUNCHER), str(self.recipe), *self.settings, *(words or REMOTE)]
        environment = {**os.environ, "PROCESSES": "2", "PYTHON": sys.executable}
        job = open_process(command, env=environment)
        if room is not None:
            resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (room, room))  # before it starts any
        return job

    def saved(self) -> int:
        found = list_checkpoints(self.out / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def reached(self) -> int:
        """The last step that was logged."""
        log = self.out / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return max(steps, default=0)

    def until_some_step(self, *jobs: Job) -> None:
        """A few new steps, and then any moment of one."""
        wanted, deadline = self.reached() + self.rng.randint(1, 4), time.monotonic() + 300
        before = self.saved()
        while self.reached() < wanted or self.saved() == before == 0:
            assert all(job.poll() is None for job in jobs), jobs[0].communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.moment()

    def moment(self) -> None:
        """In a step, or in the middle of a save."""
        time.sleep(self.rng.uniform(0, 0.3))

    def ended(self, job: Job, *said: str, within: float = 120) -> float:
        """Seconds until the job failed, saying so."""
        begun = time.monotonic()
        output = job.communicate(timeout=within)[0]
        assert job.returncode != 0, output
        for words in said:
            assert words in output, output
        return time.monotonic() - begun

    # ------------------------------------------------------------------------- the faults

    def rank(self) -> float:
        """SIGKILL of one process."""
        job, rank = self.start(), self.rng.randint(0, 1)
        self.until_some_step(job)
        rank_of(job, rank).send_signal(signal.SIGKILL)
        return self.ended(job, f"rank      : {rank}", "SIGKILL", within=60)

    def rank_alone(self) -> float:
        """SIGKILL of one of two processes that no launcher started: the other one ends too."""
        words = ["train", f"recipe={self.recipe}", *self.settings, *REMOTE]
        jobs = forked.job(2, main, words)
        self.until_some_step(*jobs)
        killed = self.rng.choice(jobs)
        killed.send_signal(signal.SIGKILL)
        (other,) = set(jobs) - {killed}
        return self.ended(other, "lost contact")

    def agent(self) -> float:
        """SIGKILL of torchrun, which cannot end its processes: they end by themselves."""
        job = self.start()
        self.until_some_step(job)
        return self.kill_agent(job)

    def kill_agent(self, job: subprocess.Popen[str]) -> float:
        job.kill()
        begun = time.monotonic()
        assert all_gone(self.out, within=10)
        seconds = time.monotonic() - begun
        output = job.communicate()[0]
        assert "is gone; the same command goes on" in output or "lost contact" in output, output
        return seconds

    def twice(self) -> float:
        """The same command twice at the same moment: one trains, the other is refused."""
        jobs = [self.start(), self.start()]
        while not (refused := [job for job in jobs if job.poll() is not None]):
            time.sleep(0.01)
        (loser,) = refused
        seconds = self.ended(loser, "in use")
        (winner,) = set(jobs) - {loser}
        self.until_some_step(winner)
        winner.send_signal(signal.SIGTERM)
        return seconds + self.ended(winner, "is saved")

    def stopped(self) -> float:
        """A process is stopped, and the job with it; it is continued, and the job goes on."""
        job = self.start()
        self.until_some_step(job)
        rank = rank_of(job, self.rng.randint(0, 1))
        rank.suspend()
        time.sleep(1)
        reached = self.reached()
        time.sleep(2)
        assert self.reached() == reached
        rank.resume()
        self.until_some_step(job)
        job.send_signal(signal.SIGTERM)
        return self.ended(job, "is saved")

    def servers_of(self, job: subprocess.Popen[str]) -> None:
        """SIGKILL of one of two servers: the job goes on; SIGKILL of the other: it waits."""
        self.until_some_step(job)
        first, second = self.rng.sample(PORTS, 2)
        self.servers[first].kill()
        self.until_some_step(job)
        self.servers[second].kill()
        for port in PORTS:
            self.serve(port)
        self.until_some_step(job)

    def server(self) -> float:
        job = self.start()
        self.servers_of(job)
        job.send_signal(signal.SIGTERM)
        return self.ended(job, "is saved")

    def server_and_agent(self) -> float:
        """Both in one job, which saves a start."""
        job = self.start()
        self.servers_of(job)
        return self.kill_agent(job)

    def link(self) -> float:
        """A cable is cut between two hosts."""
        assert self.hosts is not None
        first, second = self.hosts
        words = (self.recipe, self.out, *self.settings[1:], f"engine.timeout={TIMEOUT}")
        jobs = [host.train(first, *words) for host in self.hosts]
        self.until_some_step(*jobs)
        second.link("down")
        seconds = [self.ended(job, "lost contact", within=TIMEOUT + 40) for job in jobs]
        second.link("up")
        return sum(seconds)

    def disk(self) -> float:
        """A disk without room for the next checkpoint."""
        job = self.start(room=20_000)
        return self.ended(job, "could not save", "Free disk space", within=120)

    def weights(self) -> float:
        """The newest checkpoint's weights are cut short."""
        return self.damaged(WEIGHTS, lambda content: content[:-10])

    def description(self) -> float:
        """The highest bit of one byte of the newest checkpoint's description: no UTF-8."""

        def flipped(content: bytes) -> bytes:
            place = self.rng.randrange(len(content))
            return content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :]

        return self.damaged(DESCRIPTION, flipped)

    def damaged(self, name: str, damage: Callable[[bytes], bytes]) -> float:
        """SIGKILL, and damage done while nobody looks: an earlier checkpoint is taken."""
        job = self.start()
        self.until_some_step(job)
        self.kill_agent(job)
        file = list_checkpoints(self.out / "checkpoints")[-1] / name
        file.write_bytes(damage(file.read_bytes()))
        job = self.start()
        self.until_some_step(job)
        job.send_signal(signal.SIGTERM)
        return self.ended(job, "passed over", str(file))

    def shard(self) -> float:
        """A shard of stored features is damaged: refused, and made again by the same command."""
        bad = self.rng.choice(sorted(self.store.glob("*.safetensors")))
        content = bytearray(bad.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1
        bad.write_bytes(content)
        job = self.start("features=stored", f"features.path={self.store}")
        seconds = self.ended(job, f"{bad} is corrupt", within=120)
        bad.with_suffix(".json").unlink()
        extract(self.recipe, self.store)
        return seconds

    # ------------------------------------------------------------------------ around them

    def serve(self, port: int) -> None:
        words = ("serve-target", f"recipe={self.recipe}", f"serve.port={port}")
        self.servers[port] = forked.command(*words)

    def strike(self, name: str) -> None:
        """One fault; what it cost is printed, and nothing of the job is left."""
        fault: Callable[[], float] = getattr(self, name)
        seconds, reached, saved = fault(), self.reached(), self.saved()
        lost = reached - saved
        row = f"{name:16}  at step {reached:3}  over after {seconds:5.1f} s  {lost} steps redone"
        print(row, flush=True)
        assert all_gone(self.out, within=0)
        assert lost <= SAVE_EVERY  # what the next start computes again


def extract(recipe: Path, store: Path) -> None:
    words = (f"recipe={recipe}", f"out={store}", "extract.shard_mib=0.08")
    forked.succeed(forked.command("extract", *words))


def storm(
    faults: list[str], steps: int, recipe: Path, answers: Path, folder: Path, stack: ExitStack
) -> None:
    """All of `faults`, then to the end; compared with a job that had none."""
    begun = time.monotonic()
    hosts = stack.enter_context(connected()) if "link" in faults else None
    recipe = answered_recipe(recipe, answers, folder)
    run = Storm(recipe, folder / "out", folder / "store", steps, hosts)
    calm = folder / "calm"
    words = ["train", f"recipe={recipe}", *run.settings, f"out={calm}"]
    forked.succeed(*forked.job(2, main, words), within=900)
    if "shard" in faults:
        extract(recipe, run.store)
    for port in PORTS:
        run.serve(port)
    stack.callback(lambda: [server.kill() for server in run.servers.values()])

    for name in faults:
        run.strike(name)
    reached, last_begun = run.reached(), time.monotonic()
    last = run.start()
    while run.reached() <= reached and last.poll() is None:
        time.sleep(0.01)
    restart = time.monotonic() - last_begun
    output = last.communicate(timeout=900)[0]
    assert last.returncode == 0, output
    assert output.count("checkpoint: ") == 1  # the first process alone reports
    assert all_gone(run.out, within=0)

    print(f"a restart made its first new step after {restart:.1f} s")
    print(f"{len(faults)} faults in {time.monotonic() - begun:.0f} s")
    logged = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, steps + 1))
    end = step_folder(run.out / "checkpoints", steps)
    read_checkpoint(end)
    wanted = load_file(step_folder(calm / "checkpoints", steps) / WEIGHTS)
    found = load_file(end / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(wanted[key]) for key in wanted)


def answers_under_fire(recipe: Path, folder: Path, kills: int) -> Path:
    """Answers by two processes; torchrun is killed `kills` times while they are made."""
    out = folder / "answers" / "made.jsonl"
    words = ["regenerate", f"recipe={recipe}", f"out={out}", "regenerate.batch_size=1"]
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-m", *torchrun, "-m", "deepspec", *words]
    for kill in range(kills):
        job = open_process(command)
        while sum(part.read_bytes().count(b"\n") for part in out.parent.glob("*.jsonl*")) <= kill:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        job.kill()
        assert all_gone(out, within=10)
        job.communicate()
    last = open_process(command)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    return out


def answered_recipe(recipe: Path, answers: Path, folder: Path) -> Path:
    """The recipe on answers that are there: trainers of remote features have no target."""
    text = recipe.read_text()
    line = next(line for line in text.splitlines() if line.startswith("data:"))
    text = text.replace(line, f"data: {{path: [{answers}], max_length: 128}}")
    line = next(line for line in text.splitlines() if line.startswith("regenerate:"))
    path = folder / "answered.yaml"
    path.write_text(text.replace(line, "regenerate: {enabled: false}"))
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_short_storm(recipe: Path, quiet: Path, tmp_path: Path, stack: ExitStack) -> None:
    answers = quiet.parents[2] / "answers.jsonl"
    storm(["rank_alone", "server_and_agent"], 30, recipe, answers, tmp_path, stack)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_storm_of_eight(recipe: Path, quiet: Path, tmp_path: Path, stack: ExitStack) -> None:
    faults = ["link", "rank", "server", "shard", "agent", "disk", "stopped", "description"]
    storm(faults, 150, recipe, quiet.parents[2] / "answers.jsonl", tmp_path, stack)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_storm(recipe: Path, quiet: Path, tmp_path: Path, stack: ExitStack) -> None:
    answers = answers_under_fire(recipe, tmp_path, kills=3)
    rows = sorted(answers.read_text().splitlines())
    assert rows == sorted((quiet.parents[2] / "answers.jsonl").read_text().splitlines())
    kinds = {"rank": 7, "agent": 7, "server": 4, "link": 3, "twice": 3, "stopped": 2}
    kinds |= {"disk": 1, "weights": 1, "description": 1, "shard": 1}
    faults = [name for name, times in kinds.items() for _ in range(times)]
    random.Random(1).shuffle(faults)
    storm(faults, 320, recipe, answers, tmp_path, stack)
