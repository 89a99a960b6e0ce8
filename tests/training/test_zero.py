"""Processes and sharding change nothing: every engine on 1, 2 and 4 processes against one process.

The processes are real (gloo, DeepSpeed where it is installed). 13 samples in steps of four leave a
last step of one, so all other processes are without work there.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec.config.schema import TargetConfig
from deepspec.errors import ConfigError, LostContactError, MissingDependencyError
from deepspec.targets import Target, load_target
from deepspec.training.checkpoint import OPTIMIZER, WEIGHTS, read_checkpoint, step_folder
from deepspec.training.engine import contact, open_engine
from tests.conftest import make_model, make_tokenizer
from tests.forked import job, succeed
from tests.trainers import MakeTrainer, build_trainer
from tests.training.zero_job import train

STEPS, HALF = 6, 3
HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="DeepSpeed is not installed")
ZERO3 = ("engine.kind=zero3", "engine.persistence_threshold=100")  # else all of it stays whole


def run_jobs(
    processes: int, target: Path, jobs: dict[Path, tuple[int, str, tuple[str, ...]]]
) -> None:
    """Run all of `jobs` in the same processes: run folder -> (last step, start, overrides)."""
    words: list[str] = []
    for folder, (steps, start, overrides) in jobs.items():
        words += ["then"] if words else []
        words += [str(folder), str(steps), start, f"target.path={target}", "target.dtype=float32"]
        words += overrides
    succeed(*job(processes, train, words), within=240)


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def alone(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process that was never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = build_trainer(target, folder)
    losses = []
    for _ in range(STEPS):
        metrics = trainer.train_step()
        losses.append([metrics[key] for key in ("loss", "gradient_norm", "accept_length")])
    row = {"losses": losses, "validation": trainer.validate()}
    (folder / "rank0.json").write_text(json.dumps(row))
    trainer.save()
    return folder


def assert_same_course(folder: Path, alone: Path) -> None:
    """Per-step metrics and validation."""
    found, expected = result(folder), result(alone)
    steps = len(found["losses"])
    for own, other in zip(found["losses"], expected["losses"][-steps:], strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    assert found["validation"] == pytest.approx(expected["validation"], rel=1e-4)


def assert_same(folder: Path, alone: Path) -> None:
    """The course, and the weights and moments it ends with."""
    assert_same_course(folder, alone)
    for name in (WEIGHTS, OPTIMIZER):
        own = load_file(step_folder(folder / "checkpoints", STEPS) / name)
        other = load_file(step_folder(alone / "checkpoints", STEPS) / name)
        assert own.keys() == other.keys()
        for key, tensor in own.items():
            scale = float(other[key].abs().max())
            torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-4 * scale)


def test_two_replicas_are_one_process(alone: Path, target_folder: Path, tmp_path: Path) -> None:
    run_jobs(2, target_folder, {tmp_path: (STEPS, "new", ("engine.kind=zero0",))})
    assert_same(tmp_path, alone)


@needs_deepspeed
def test_sharding_and_resharding_change_nothing(
    alone: Path, target: Target, target_folder: Path, tmp_path: Path
) -> None:
    """ZeRO 1 to 3 on two processes; half of it then goes on as 4, 1, and other stages."""
    kinds = {
        "zero1": ("engine.kind=zero1",),
        "zero2": ("engine.kind=zero2", "training.micro_batch_size=1"),
        "zero3": (*ZERO3, "training.micro_batch_size=2"),
        "zero2-offloaded": ("engine.kind=zero2", "engine.offload=cpu"),
        "zero3-offloaded": (*ZERO3, "engine.offload=cpu"),
    }
    jobs = {tmp_path / name: (STEPS, "new", words) for name, words in kinds.items()}
    for name in ("zero2", "zero3"):
        jobs[tmp_path / f"half-{name}"] = (HALF, "new", kinds[name])
    run_jobs(2, target_folder, jobs)
    for name in kinds:
        assert_same(tmp_path / name, alone)
    seen = [sample for rank in (0, 1) for sample in result(tmp_path / "zero2", rank)["seen"]]
    counts = Counter(seen)
    # one epoch is four steps: each of the 13 once, and the first two steps of the next
    assert len(seen) == 13 + 8
    assert sorted(counts) == [f"sample-{index:03d}" for index in range(13)]
    assert max(counts.values()) == 2

    halves = {
        name: step_folder(tmp_path / f"half-{name}" / "checkpoints", HALF)
        for name in ("zero2", "zero3")
    }
    four = {
        tmp_path / "2-to-3": (STEPS, str(halves["zero2"]), ZERO3),
        tmp_path / "3-to-1": (STEPS, str(halves["zero3"]), ("engine.kind=zero1",)),
    }
    run_jobs(4, target_folder, four)
    for folder in four:
        assert_same(folder, alone)

    trainer = build_trainer(target, tmp_path / "3-to-single")
    trainer.resume(read_checkpoint(halves["zero3"]))
    losses = [trainer.train_step()["loss"] for _ in range(STEPS - HALF)]
    assert losses == pytest.approx([row[0] for row in result(alone)["losses"][HALF:]], rel=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero0", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_target_that_is_split_changes_nothing(
    engine: str, alone: Path, target_folder: Path, tmp_path: Path
) -> None:
    """Tensor parallel and ZeRO-3, beside replicas of a drafter and beside a sharded one; also in
    the checkpoint's own dtype."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    half = (f"target.path={tmp_path / 'target'}", "target.dtype=auto")
    jobs = {
        "tensor": ("target.parallel=tensor", f"engine.kind={engine}"),
        "zero3": ("target.parallel=zero3", f"engine.kind={engine}"),
        "half": ("target.parallel=zero3", f"engine.kind={engine}", *half),
    }
    run_jobs(2, target_folder, {tmp_path / name: (STEPS, "new", w) for name, w in jobs.items()})
    whole = load_target(TargetConfig(str(tmp_path / "target"), num_layer_ids=3), "cpu")
    assert whole.dtype == torch.bfloat16
    first = build_trainer(whole, tmp_path / "whole").train_step()["loss"]
    assert result(tmp_path / "half")["losses"][0][0] == pytest.approx(first, rel=1e-5)
    for name in ("tensor", "zero3"):
        assert_same_course(tmp_path / name, alone)
    # not so tensor: its sums round differently, and Adam divides by what may be nearly nothing
    assert_same(tmp_path / "zero3", alone)


def test_engines_that_cannot_be(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAVE_DEEPSPEED:
        with pytest.raises(MissingDependencyError, match=r"deepspec\[deepspeed\]"):
            make_trainer("run", "engine.kind=zero2")
    with pytest.raises(ConfigError, match="needs DeepSpeed"):
        make_trainer("run", "engine.offload=cpu")
    config = make_trainer("fine").config
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="engine=single is one process, but 2 were started"):
        open_engine(config.engine, config.training, config.tracking, Path())


def test_only_a_lost_process_is_called_that() -> None:
    """The whole of it, between two hosts, is in tests/launch/test_two_hosts.py."""
    gloo = "[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4567"
    with pytest.raises(LostContactError, match=r"\(Connection closed by peer .*:4567\)"), contact():
        raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="must match the size"), contact():
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
