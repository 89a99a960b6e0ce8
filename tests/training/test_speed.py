"""The share of the peak by hand, where it is said, and what a wait for features is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from deepspec.commands.stages import speed_of
from deepspec.config.schema import TargetConfig
from deepspec.drafters.registry import DRAFTERS
from deepspec.features.sources import Online
from deepspec.machine import peak_flops
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import load_target
from deepspec.training.speed import Speed
from tests.trainers import MakeTrainer, build_trainer


def sample(tokens: int, answer: int) -> Sample:
    mask = torch.arange(tokens) >= tokens - answer
    return Sample(torch.arange(tokens), mask, str(tokens))


def test_tokens_and_operations_of_a_step() -> None:
    """Blocks are at most the anchors that an answer has; an empty share is no work."""
    seen = []

    def work(contexts: list[int], blocks: list[int]) -> float:
        seen.append((list(contexts), list(blocks)))
        return 1e6 * sum(contexts)

    step = [[sample(600, 100), sample(400, 3)], [sample(1000, 200)], []]
    assert Speed(work, peak=1e10).note(step, 50, 0.5) == "4k tokens/s  MFU 40%"
    assert seen == [([600, 400], [50, 2]), ([1000], [50])]
    assert Speed(work, peak=None).note(step, 50, 5.0) == "400 tokens/s"


def test_a_training_says_it(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer("run", "training.max_steps=2", "engine.peak_tflops=1e-6")
    trainer.speed = speed_of(trainer.config, trainer.target, trainer.engine)
    assert trainer.speed is not None
    assert trainer.speed.peak == 1e6
    trainer.train()
    said = re.search(r"tokens/s  MFU (\d+)%", capsys.readouterr().err)
    assert said is not None
    assert int(said[1]) > 100  # of a device that does a million operations a second


def test_a_peak_that_a_step_exceeds_is_measured_again_or_not_shown() -> None:
    """One that was given stands: more than all of it tells that it is wrong."""
    measured = [2e10, 2e10, 5e9]
    step = [[sample(1000, 200)]]  # a step of 1e9 operations
    speed = Speed(lambda contexts, blocks: 1e6 * sum(contexts), 1e10, lambda: measured.pop(0))
    assert speed.note(step, 50, 0.2).endswith("MFU 50%")
    assert len(measured) == 3
    assert speed.note(step, 50, 0.08) == "12.5k tokens/s  MFU 62%"  # of 2e10
    assert len(measured) == 2
    assert speed.note(step, 50, 0.04) == "25k tokens/s"
    assert speed.note(step, 50, 0.2) == "5k tokens/s"  # nor later, when it would look right
    assert len(measured) == 1
    given = Speed(lambda contexts, blocks: 1e6 * sum(contexts), 1e10)
    assert given.note(step, 50, 0.05).endswith("MFU 200%")


def test_a_training_exceeds_no_measured_peak(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a million operations a second, as if other work had disturbed the measurement."""
    trainer = make_trainer("run", "training.max_steps=3")
    trainer.speed = speed_of(trainer.config, trainer.target, trainer.engine)
    assert trainer.speed is not None
    assert trainer.speed.peak is not None
    trainer.speed.peak = 1e6
    trainer.train()
    shown = re.findall(r"tokens/s  MFU (\d+)%", capsys.readouterr().err)
    assert shown
    assert all(int(share) <= 100 for share in shown)


def test_a_kind_without_formulas_trains_without_mfu(
    make_trainer: MakeTrainer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(DRAFTERS, "another", DRAFTERS["mtp"])
    trainer = make_trainer("run", "training.max_steps=1", "drafter.kind=mtp")
    trainer.config.drafter.kind = "another"
    trainer.speed = speed_of(trainer.config, trainer.target, trainer.engine)
    trainer.train()
    shown = capsys.readouterr().err
    assert "tokens/s" in shown
    assert "MFU" not in shown


def test_a_processor_is_measured() -> None:
    """Between a tenth and a thousand GFLOP/s a thread, as any processor of these years."""
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert peak is not None
    assert 1e8 < peak / torch.get_num_threads() < 1e12


class Queued(Online):
    """A target whose kernels take long on the device, and no time here."""

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        return super().features(samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_wait_for_features_is_the_devices(target_folder: Path, tmp_path: Path) -> None:
    config = TargetConfig(path=str(target_folder), dtype="float32", num_layer_ids=3)
    target = load_target(config, "cuda")
    words = ("engine.device=cuda", "objective.compile=never")
    trainer = build_trainer(target, tmp_path, *words, source=Queued(target))
    waits = [trainer.train_step()["feature_wait"] for _ in range(trainer.total_steps)]
    assert min(waits[1:]) > 0.5  # the first step loads kernels
