"""What an engine wraps: the drafter's forward and the objective as one module.

ZeRO-3 gathers a module's parameters around its forward; the objective reads the Markov head's W2,
so it has to happen inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec.config.schema import RunConfig
from deepspec.drafters.base import Drafter
from deepspec.objective import compute_loss, slots_of
from deepspec.records import BlockBatch, TargetFeatures
from deepspec.targets import TargetEnds


class Distillation(nn.Module):
    """Loss of one micro-batch: the drafter in `training.precision`, the objective in fp32 but for
    its products on CUDA.

    Only the drafter's parameters are seen by the engine.
    """

    def __init__(self, drafter: Drafter, target: TargetEnds, config: RunConfig) -> None:
        super().__init__()
        self.drafter = drafter
        vocabulary, head = drafter.vocabulary, target.head
        if vocabulary is not None:
            vocabulary, head = vocabulary.to(target.device), target.head.rows(vocabulary)
        # in a tuple: no submodules, no buffers
        self._frozen = (target.embedding, head, target.head, vocabulary)
        self._config = config.objective
        self._bf16 = config.training.precision == "bf16"
        drafter.recomputed = config.training.activation_checkpointing
        if config.training.compile:
            for layer in drafter.compilable:
                layer.compile(dynamic=True)

    def forward(
        self, context: Tensor, final: Tensor, batch: BlockBatch, denominator: float
    ) -> tuple[Tensor, ...]:
        """The fields of LossOutput; a plain tuple, because DeepSpeed's hooks look into no other."""
        embedding, draft_head, target_head, vocabulary = self._frozen
        features = TargetFeatures(context, final)
        with torch.autocast(context.device.type, torch.bfloat16, enabled=self._bf16):
            output = self.drafter(features, batch, embedding)
        # a processor without bf16 units, which is most, does the products over V faster in fp32
        dtype = torch.bfloat16 if self._bf16 and context.is_cuda else None
        inputs = slots_of(output, self.drafter, batch, features, vocabulary, dtype)
        loss = compute_loss(inputs, draft_head, target_head, self._config, denominator)
        return loss.loss, loss.ce_sum, loss.l1_sum, loss.confidence_sum, loss.acceptance
