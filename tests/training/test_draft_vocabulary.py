"""Training with fewer tokens to draft: it learns, is saved, and goes on with the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepspec.data.vocabulary import count_tokens
from deepspec.errors import TrainingError
from deepspec.targets import Target
from deepspec.training.checkpoint import (
    WEIGHTS,
    load_drafter,
    read_checkpoint,
    read_tensors,
    read_vocabulary,
)
from deepspec.training.metrics import read_metrics
from tests.trainers import MakeTrainer

REDUCED = "drafter.draft_vocab_size=40"


def test_it_learns_within_its_vocabulary(make_trainer: MakeTrainer) -> None:
    """The random target says anything: what it puts outside of them stays in the loss."""
    settings = ("drafter.draft_vocab_size=150", "training.epochs=15", "training.learning_rate=0.02")
    trainer = make_trainer("run", *settings)
    drafter = trainer.distillation.drafter
    assert drafter.bias_weight.shape == (150, 8)
    assert drafter.markov_head.markov_w1.weight.shape == (260, 8)
    before = trainer.validate()["validation_accept_length"]
    trainer.train()
    losses = [row["loss"] for row in read_metrics(trainer.folder.metrics) if "loss" in row]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert trainer.validate()["validation_accept_length"] > before


def test_both_implementations_train_alike(make_trainer: MakeTrainer) -> None:
    weights = []
    for name in ("eager", "fused"):
        trainer = make_trainer(name, REDUCED, f"objective.implementation={name}")
        for _ in range(5):
            trainer.train_step()
        weights.append(trainer.engine.weights())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_knows_the_tokens(make_trainer: MakeTrainer, target: Target) -> None:
    trainer = make_trainer("run", REDUCED)
    checkpoint = read_checkpoint(trainer.save())
    loaded = load_drafter(checkpoint)
    assert read_vocabulary(checkpoint).equal(loaded.vocabulary)
    counts = count_tokens(trainer.samples, target.vocab_size)
    inside = torch.zeros(260, dtype=torch.bool).index_fill(0, loaded.vocabulary, True)
    assert inside.sum() == 40
    assert counts[inside].min() >= counts[~inside].max()
    whole = read_checkpoint(make_trainer("whole").save())
    assert read_vocabulary(whole) is None
    assert "d2t" not in read_tensors(whole, WEIGHTS)


def test_resumed_is_bitwise_the_uninterrupted_run(make_trainer: MakeTrainer) -> None:
    whole = make_trainer("whole", REDUCED)
    whole.train()
    broken = make_trainer("broken", REDUCED)
    for _ in range(5):
        broken.train_step()
    resumed = make_trainer("resumed", REDUCED)
    resumed.resume(read_checkpoint(broken.save()))
    resumed.train()
    expected = whole.engine.weights()
    for name, tensor in resumed.engine.weights().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_from_before_there_were_draft_vocabularies(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    trainer.train_step()
    saved = read_checkpoint(trainer.save())
    older = {key: v for key, v in saved.shape.items() if not key.startswith("draft_vocab")}
    assert len(older) == len(saved.shape) - 2
    make_trainer("resumed").resume(replace(saved, shape=older))


def test_other_tokens_are_refused(make_trainer: MakeTrainer) -> None:
    saved = read_checkpoint(make_trainer("run", REDUCED).save())
    with pytest.raises(TrainingError, match=r"drafts other tokens than this run \(d2t differs\)"):
        make_trainer("other data", REDUCED, samples=5).resume(saved)
    with pytest.raises(TrainingError, match=r"another shape \(draft_vocab_size differ\)"):
        make_trainer("other size", "drafter.draft_vocab_size=50").resume(saved)
