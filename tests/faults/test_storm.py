"""Faults at random moments of a real job, and then bitwise the weights of a job that had none.

The job: two processes under torchrun (ZeRO-2 where DeepSpeed is installed), fetching features from
two servers; for a cut cable it runs between two network namespaces instead. Every step is logged,
so a sample that is lost or seen twice shows in the steps and in the weights.

    make storm      20 kills and cuts, and each of the other faults, with a table
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
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deepspec.training.checkpoint import WEIGHTS, list_checkpoints, read_checkpoint, step_folder
from tests.hosts import Host, connected
from tests.jobs import HAVE_DEEPSPEED, kill_all, open_process, rank_of, train_command

pytestmark = pytest.mark.usefixtures("nothing_left")
ENGINE = "zero2" if HAVE_DEEPSPEED else "zero0"
SAVE_EVERY = 3
TIMEOUT = 25  # engine.timeout where a cable is cut; the two must also start within it
PORTS = (18371, 18372)


@dataclass
class Storm:
    """One run folder under fire."""

    recipe: Path
    out: Path
    store: Path
    steps: int
    hosts: tuple[Host, Host] | None
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    servers: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    rows: list[tuple[str, int, float, int]] = field(default_factory=list)

    # ---------------------------------------------------------------------------- the job

    @property
    def words(self) -> list[str]:
        steps = [f"training.max_steps={self.steps}", f"training.save_every={SAVE_EVERY}"]
        return [*steps, "training.log_every=1"]

    def start(self, *words: str, room: int | None = None) -> subprocess.Popen[str]:
        """By torchrun, on features from the servers unless `words` say otherwise."""
        addresses = ",".join(f"http://127.0.0.1:{port}" for port in PORTS)
        remote = ("features=remote", f"features.servers=[{addresses}]", "features.prefetch=2")
        launcher = ("--standalone", "--nproc-per-node", "2")
        settings = [f"engine={ENGINE}", *self.words, *(words or remote)]
        command = train_command(self.recipe, self.out, *settings, launcher=launcher)
        if room is None:
            return open_process(command)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit
        )

    def saved(self) -> int:
        found = list_checkpoints(self.out / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def reached(self) -> int:
        """The last step that was logged."""
        log = self.out / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return max(steps, default=0)

    def until_some_step(self, *jobs: subprocess.Popen[str]) -> None:
        """A few new steps, and then any moment of one."""
        wanted, deadline = self.reached() + self.rng.randint(1, 4), time.monotonic() + 200
        before = self.saved()
        while self.reached() < wanted or self.saved() == before == 0:
            assert all(job.poll() is None for job in jobs), jobs[0].communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 0.3))

    def ended(self, job: subprocess.Popen[str], *said: str, within: float = 60) -> float:
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
        return self.ended(job, f"rank      : {rank}", "SIGKILL", within=30)

    def server(self) -> float:
        """SIGKILL of one of two servers: the job goes on; SIGKILL of the other: it waits."""
        job = self.start()
        self.until_some_step(job)
        first, second = self.rng.sample(PORTS, 2)
        self.servers[first].kill()
        self.until_some_step(job)
        self.servers[second].kill()
        for port in PORTS:
            self.serve(port)
        self.until_some_step(job)
        job.send_signal(signal.SIGTERM)
        return self.ended(job)

    def link(self) -> float:
        """A cable is cut between two hosts."""
        assert self.hosts is not None
        first, second = self.hosts
        words = (
            self.recipe,
            self.out,
            f"engine={ENGINE}",
            *self.words,
            f"engine.timeout={TIMEOUT}",
        )
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

    def checkpoint(self) -> float:
        """The newest checkpoint is damaged while nobody looks."""
        job = self.start()
        self.until_some_step(job)
        kill_all(job)
        file = list_checkpoints(self.out / "checkpoints")[-1] / WEIGHTS
        file.write_bytes(file.read_bytes()[:-10])
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
        command = [sys.executable, "-m", "deepspec", "serve-target", f"recipe={self.recipe}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.servers[port] = subprocess.Popen(
            [*command, f"serve.port={port}"], stdout=subprocess.PIPE, env=environment, text=True
        )

    def strike(self, name: str) -> None:
        """One fault; what it cost is noted."""
        fault: Callable[[], float] = getattr(self, name)
        seconds, reached, saved = fault(), self.reached(), self.saved()
        assert reached - saved <= SAVE_EVERY  # what the next start computes again
        self.rows.append((name, reached, seconds, reached - saved))


def extract(recipe: Path, store: Path) -> None:
    words = [f"recipe={recipe}", f"out={store}", "extract.shard_mib=0.08"]
    command = [sys.executable, "-m", "deepspec", "extract", *words]
    subprocess.run(command, check=True, capture_output=True, timeout=200)


def storm(
    faults: list[str], steps: int, recipe: Path, quiet: Path, folder: Path, stack: ExitStack
) -> None:
    """All of `faults`, then to the end; compared with a job that had none."""
    hosts = stack.enter_context(connected()) if "link" in faults else None
    launcher = ("--standalone", "--nproc-per-node", "2")
    recipe = answered_recipe(recipe, quiet.parents[2] / "answers.jsonl", folder)
    run = Storm(recipe, folder / "out", folder / "store", steps, hosts)
    calm = folder / "calm"
    settings = [f"engine={ENGINE}", *run.words]
    undisturbed = open_process(train_command(recipe, calm, *settings, launcher=launcher))
    output = undisturbed.communicate(timeout=600)[0]
    assert undisturbed.returncode == 0, output
    if "shard" in faults:
        extract(recipe, run.store)
    for port in PORTS:
        run.serve(port)
    stack.callback(lambda: [server.kill() for server in run.servers.values()])

    for name in faults:
        run.strike(name)
    begun = time.monotonic()
    last = run.start()
    while run.reached() <= run.rows[-1][1] and last.poll() is None:
        time.sleep(0.01)
    restart = time.monotonic() - begun
    output = last.communicate(timeout=600)[0]
    assert last.returncode == 0, output

    for name, reached, seconds, redone in run.rows:
        print(f"{name:10}  at step {reached:3}  over after {seconds:5.1f} s  {redone} steps redone")
    print(f"a restart made its first new step after {restart:.1f} s")
    logged = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, steps + 1))
    end = step_folder(run.out / "checkpoints", steps)
    read_checkpoint(end)
    wanted = load_file(step_folder(calm / "checkpoints", steps) / WEIGHTS)
    found = load_file(end / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(wanted[key]) for key in wanted)


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
    storm(["rank", "server"], 45, recipe, quiet, tmp_path, stack)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_storm_of_eight(recipe: Path, quiet: Path, tmp_path: Path, stack: ExitStack) -> None:
    faults = ["link", "rank", "server", "shard", "rank", "disk", "link", "checkpoint"]
    storm(faults, 150, recipe, quiet, tmp_path, stack)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_storm(recipe: Path, quiet: Path, tmp_path: Path, stack: ExitStack) -> None:
    faults = ["rank"] * 8 + ["server"] * 6 + ["link"] * 6 + ["disk", "checkpoint", "shard"]
    random.Random(1).shuffle(faults)
    storm(faults, 200, recipe, quiet, tmp_path, stack)
