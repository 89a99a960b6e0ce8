"""Settings of the layers that change what a step costs and nothing else: the same gradients."""

from __future__ import annotations

import pytest
import torch

from deepspec.training.trainer import Trainer
from tests.trainers import MakeTrainer


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    samples, batch = trainer.blocks_of(trainer.micro_batches(0)[0], 0)
    trainer.loss_of(samples, batch, 1.0)[0].loss.backward()
    return {
        name: parameter.grad
        for name, parameter in trainer.distillation.drafter.named_parameters()
        if parameter.grad is not None
    }


def test_layers_computed_again_in_the_backward(make_trainer: MakeTrainer) -> None:
    expected = gradients(make_trainer("kept", "drafter.num_layers=2"))
    trainer = make_trainer(
        "again", "drafter.num_layers=2", "training.activation_checkpointing=true"
    )
    calls: list[int] = []
    trainer.distillation.drafter.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(trainer)
    assert len(calls) == 2
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.slow  # a minute of compiling
def test_compiled_layers_are_compiled_once_for_any_batch(make_trainer: MakeTrainer) -> None:
    """Once for the first layer, whose input needs no gradient, and once for the others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = make_trainer("plain", "drafter.num_layers=3")
    compiled = make_trainer("compiled", "drafter.num_layers=3", "training.compile=true")
    graphs = []
    for step in range(4):
        for trainer in (plain, compiled):
            trainer.distillation.zero_grad()
            trainer.step = step
        expected, found = gradients(plain), gradients(compiled)
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())  # sums in another order
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
