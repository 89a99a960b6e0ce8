"""FlexAttention is compiled once for batches of any shape: counted with a backend that only traces,
because what is counted happens in front of any backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from deepspec.drafters import attention
from deepspec.records import BlockBatch
from tests.trainers import MakeTrainer


@pytest.mark.slow  # a minute of tracing
@torch.no_grad()  # no backward on processors
def test_one_graph_for_any_batch(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: Callable[..., object] = partial(attention._flex, True, "eager")
    monkeypatch.setattr(attention, "_flex", lambda compiled: kernels())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = make_trainer("run", "training.anchors_per_sample=20", "drafter.block_size=7")
    embedding = trainer.target.embedding
    graphs = []
    for step in range(6):
        samples, batch = trainer.blocks_of(trainer.micro_batches(step % 3)[0], step)
        assert large(batch)
        features = trainer.source.features(samples)
        drafter = trainer.distillation.drafter
        expected = drafter(features, batch, embedding)
        found = drafter(features, batch, embedding, attention.build_visibility(batch, "flex"))
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 2
    assert graphs[1:] == [graphs[1]] * 5
    assert graphs[1] <= 4  # either is made once more where sizes compare otherwise than at first


def large(batch: BlockBatch) -> bool:
    """More queries than a tile: a batch of one has a graph of its own."""
    return batch.labels.numel() > 128
