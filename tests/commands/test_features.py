"""The four sources of features, by command: one trajectory, whatever is killed on the way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspec.cli import main
from deepspec.commands.feature_sources import extract_features
from deepspec.commands.stages import TrainingData
from deepspec.config.loading import config_from
from deepspec.data.files import read_jsonl
from deepspec.errors import DataError
from deepspec.targets import Target
from tests.jobs import LAST, assert_same_weights, kill_all, open_process, train_command
from tests.trainers import SETTINGS, make_samples

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHARDS = "extract.shard_mib=0.08"


@pytest.fixture(scope="module")
def answers(quiet: Path) -> Path:
    """What the quiet run was trained on."""
    return quiet.parents[2] / "answers.jsonl"


def extract_command(recipe: Path, answers: Path, store: Path, *launcher: str) -> list[str]:
    words = [f"recipe={recipe}", f"data.path=[{answers}]", "regenerate.enabled=false", SHARDS]
    return [sys.executable, *launcher, "-m", "deepspec", "extract", *words, f"out={store}"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow  # two minutes of starting processes
def test_extract_is_killed_goes_on_and_is_trained_on(
    recipe: Path,
    quiet: Path,
    answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two processes share the shards; what they finished before SIGKILL is kept as it is."""
    store = tmp_path / "store"
    killed = open_process(extract_command(recipe, answers, store, *TORCHRUN))
    while not list(store.glob("shard-*.json")) and killed.poll() is None:
        time.sleep(0.005)
    kill_all(killed)
    before = {file: file.stat().st_mtime_ns for file in store.glob("shard-*.json")}

    said = run(extract_command(recipe, answers, store, *TORCHRUN))
    assert f"{len(before)} are there from before" in said
    assert all(file.stat().st_mtime_ns == moment for file, moment in before.items())
    main(["verify-store", f"path={store}"])
    assert "14 samples" in capsys.readouterr().out

    out = tmp_path / "run"
    words = ["features=stored", f"features.path={store}"]
    run(train_command(recipe, out, *words))
    assert not (out / "answers.jsonl").exists()  # samples and features came from the store
    assert_same_weights(out / LAST, quiet)

    bad = sorted(store.glob("*.safetensors"))[0]
    bad.write_bytes(bad.read_bytes()[:-1])
    refused = ["train", f"recipe={recipe}", f"out={tmp_path / 'refused'}", *words]
    for command in (["verify-store", f"path={store}"], refused):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert f"error: {bad} is corrupt" in capsys.readouterr().err
    bad.with_suffix(".json").unlink()
    run(extract_command(recipe, answers, store))
    main(["verify-store", f"path={store}"])
    assert "all as they were written" in capsys.readouterr().out


def test_extract_makes_answers_beside_the_shards(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Theirs are JSON files too, and no shards; started again, nothing is made twice."""
    for there in (0, 1):
        main(["extract", f"recipe={recipe}", f"out={tmp_path}"])
        assert f"{there} are there from before" in capsys.readouterr().err
    main(["verify-store", f"path={tmp_path}"])
    assert "14 samples" in capsys.readouterr().out


def test_a_store_that_lacks_samples_in_the_end_is_no_success(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two processes makes its share, the other none."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = config_from(SETTINGS, ["extract.shard_mib=0.02"])
    data = TrainingData(make_samples(13), [], {})
    with pytest.raises(DataError, match=r"has \d+ of 13 samples; finish it by the same"):
        extract_features(config, target, data, tmp_path, lambda: None)


def test_a_store_without_all_final_states_is_refused_where_the_drafter_reads_them(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the message says to do helps."""
    mtp = ["drafter=mtp", "drafter.block_size=1", "drafter.markov_rank=0"]

    def train(store: Path) -> list[str]:
        words = ["features=stored", f"features.path={store}", "training.max_steps=1"]
        return ["train", f"recipe={recipe}", *mtp, *words, f"out={tmp_path / 'run'}"]

    for kind, store in (("dspark", tmp_path / "some"), ("mtp", tmp_path / "all")):
        main(["extract", f"recipe={recipe}", f"drafter.kind={kind}", f"out={store}"])
    with pytest.raises(SystemExit, match="2"):
        main(train(tmp_path / "some"))
    error = capsys.readouterr().err
    assert "holds final states only where a supervised token follows" in error
    assert f"deepspec extract recipe={recipe.stem} drafter.kind=mtp" in error
    main(train(tmp_path / "all"))


@pytest.mark.slow
def test_hybrid_under_two_processes(recipe: Path, quiet: Path, tmp_path: Path) -> None:
    out, launcher = tmp_path / "run", ("--standalone", "--nproc-per-node", "2")
    run(train_command(recipe, out, "features=hybrid", "engine=zero0", launcher=launcher))
    assert_same_weights(out / LAST, quiet)
    stored = [
        row["id"]
        for file in (out / "features").glob("hybrid-*.json")
        for row in json.loads(file.read_text())["samples"]
    ]
    ids = [row["id"] for _, row in read_jsonl(out / "answers.jsonl")]
    assert sorted(stored) == sorted(ids)  # each once, whichever process met it first
    assert {file.name[:8] for file in (out / "features").glob("hybrid-*")} == {
        "hybrid-0",
        "hybrid-1",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("features.source=stored", "needs features.path=DIR"),
        ("features.source=remote", r"needs features.servers=\[http"),
        ("features=hybrid features.overlap=true", "is for features=online, not hybrid"),
        ("features.overlap=true target.parallel=zero3", "in one order, which a thread beside"),
        ("features=hybrid target.parallel=zero3", "asks the target only for what a process"),
        ("features=hybrid target.parallel=tensor", "asks the target only for what a process"),
        ("features=remote features.servers=[http://a:1]", "no target here to answer the prompts"),
        (
            "features=remote features.servers=[http://a:1] engine=zero2 engine.timeout=30",
            r"features\.patience=600 must be below engine\.timeout=30",
        ),
        ("target.parallel=tensor", "cannot answer the prompts: make the answers"),
        ("target.parallel=zero3 regenerate.enabled=false", "cannot evaluate: set evaluation"),
        ("target.parallel=pipeline", "must be one of replicated, tensor, zero3, device_map"),
        ("extract.dtype=int8", "must be one of auto, bfloat16, float8"),
        ("serve.port=99999", "from 0 to 65535"),
    ],
)
def test_mistakes(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "recipe=tiny", *words.split()])
    assert re.search(message, capsys.readouterr().err)
