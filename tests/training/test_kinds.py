"""The other kinds through the trainer: they learn, are saved whole, and go on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepspec.training.checkpoint import load_drafter, read_checkpoint
from deepspec.training.metrics import read_metrics
from tests.trainers import MakeTrainer
from tests.training.test_zero import ZERO3, needs_deepspeed, result, run_jobs

KINDS = {
    "eagle3": ["drafter.kind=eagle3"],
    "eagle3, fewer tokens": [
        "drafter.kind=eagle3",
        "drafter.qk_norm=false",
        "drafter.draft_vocab_size=150",
    ],
    "mtp": ["drafter.kind=mtp", "drafter.block_size=1"],
}


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_loss_falls_and_drafts_are_accepted(make_trainer: MakeTrainer, name: str) -> None:
    trainer = make_trainer("run", *KINDS[name], "training.epochs=12", "training.learning_rate=0.02")
    before = trainer.validate()["validation_accept_length"]
    trainer.train()
    losses = [row["loss"] for row in read_metrics(trainer.folder.metrics) if "loss" in row]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert trainer.validate()["validation_accept_length"] > before


@pytest.mark.parametrize("name", KINDS)
def test_checkpoint_is_the_drafter_and_resumes_bitwise(
    make_trainer: MakeTrainer, name: str
) -> None:
    whole = make_trainer("whole", *KINDS[name], "training.max_steps=7")
    whole.train()
    broken = make_trainer("broken", *KINDS[name], "training.max_steps=7")
    for _ in range(4):
        broken.train_step()
    saved = read_checkpoint(broken.save())
    loaded = load_drafter(saved)
    assert loaded.config == broken.shape
    weights = broken.engine.weights()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.state_dict().items())

    resumed = make_trainer("resumed", *KINDS[name], "training.max_steps=7")
    resumed.resume(saved)
    resumed.train()
    expected = whole.engine.weights()
    for key, tensor in resumed.engine.weights().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.slow
@needs_deepspeed
def test_sharded_weights_are_there_at_every_step_of_a_block(
    make_trainer: MakeTrainer, target_folder: Path, tmp_path: Path
) -> None:
    """One layer is run K times in a forward; ZeRO 3 has to gather it each time."""
    jobs = {tmp_path / name: (4, "new", (*words, *ZERO3)) for name, words in KINDS.items()}
    run_jobs(2, target_folder, jobs)
    for name, words in KINDS.items():
        trainer = make_trainer(f"alone-{name}", *words)
        losses = [trainer.train_step()["loss"] for _ in range(4)]
        assert [row[0] for row in result(tmp_path / name)["losses"]] == pytest.approx(losses, 1e-4)
