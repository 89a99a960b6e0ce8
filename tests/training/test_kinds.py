"""The other kinds through the trainer: they learn, are saved whole, and go on bit for bit."""

from __future__ import annotations

import pytest
import torch

from deepspec.training.checkpoint import load_drafter, read_checkpoint
from deepspec.training.metrics import read_metrics
from tests.trainers import MakeTrainer

KINDS = {
    "eagle3": ["drafter.kind=eagle3"],
    "mtp": ["drafter.kind=mtp", "drafter.block_size=1"],
}


@pytest.mark.parametrize("name", KINDS)
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
