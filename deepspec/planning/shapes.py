"""The numbers that every formula reads: shapes of target and drafter, and of one micro-batch.

Legend: T context tokens, N blocks, K block size, S = N*K slots, D hidden size, L captured layers,
H heads, G key/value heads, E head dimension, I width of the MLP, V vocabulary, R Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deepspec.config.schema import DrafterConfig, RunConfig, TargetConfig
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import ConfigError
from deepspec.targets import Target, TargetEnds

FP32, BF16 = 4, 2  # bytes
# kinds of drafter that `activations`, `dspark_v4` and `work` have formulas for
PLANNED = ("dspark", "dflash", "dspark_v4", "eagle3", "mtp")


@dataclass(frozen=True)
class Shapes:
    """A drafter and its target without their weights.

    `drafted`: tokens that can be drafted, V or fewer. `parameters`: numbers of each trainable
    parameter; `largest`: the most that one module has of its own. `casts`: numbers of the weights
    that autocast copies to bf16, and keeps. `target_parameters` counts tied weights once;
    `target_active`: those a token's forward multiplies with, LM head apart; `ends`: those of
    embedding and head; `scaled_ends`: those that are held twice, as files and as the family scales
    them; `saved_value`: bytes of a number under target.dtype=auto; `by_token`: the drafter's
    `latent_of_token`; `text`: the target's text config.
    """

    drafter: Any  # the kind's own config
    drafted: int
    parameters: tuple[int, ...]
    largest: int
    casts: int
    target_parameters: int
    target_active: int
    ends: int
    scaled_ends: int
    saved_value: int
    soft_cap: bool
    by_token: bool
    text: Any

    @property
    def rank(self) -> int:
        """R, 0 without a sequential head."""
        return getattr(self.drafter, "markov_rank", 0)

    @property
    def trainable(self) -> int:
        """Numbers that are trained."""
        return sum(self.parameters)

    def value(self, config: TargetConfig) -> int:
        """Bytes of one number of the target: its weights, and so its features."""
        return {"float32": FP32, "bfloat16": BF16}.get(config.dtype, self.saved_value)


def shapes_of(target: TargetEnds, config: DrafterConfig) -> Shapes:
    """Shapes of `target` and of its drafter; the drafter is built on the meta device.

    Of ends alone, the parameters of what is between them are 0.

    Raises ConfigError for a drafter that does not fit the target, and for one of a kind without
    formulas.
    """
    if config.kind not in PLANNED:
        raise ConfigError(
            f"drafter.kind={config.kind} has no formulas for memory and work, which there are for "
            f"{', '.join(PLANNED)}; train it without a plan, or add them to deepspec/planning"
        )
    kind = drafter_kind(config.kind)
    if target.tokenizer is None and config.mask_token_id is None:
        config = replace(config, mask_token_id=0)  # no size depends on which token it is
    shape = kind.resolve(config, target)
    with torch.device("meta"):
        drafter = kind.build(shape)
    parameters = dict(target.model.named_parameters()) if isinstance(target, Target) else {}
    linear = [module.weight for module in drafter.modules() if isinstance(module, nn.Linear)]
    tied = getattr(target.config, "tie_word_embeddings", False)
    ends = target.embedding.numel() + (0 if tied else target.head.weight.numel())
    scaled = target.embedding.numel() * (target.embedding_scale != 1)
    scaled += target.head.weight.numel() * (target.logit_scale != 1)
    return Shapes(
        drafter=shape,
        drafted=shape.vocab_size if drafter.d2t is None else len(drafter.d2t),
        parameters=tuple(parameter.numel() for parameter in drafter.parameters()),
        largest=max(_own(module) for module in drafter.modules()),
        # W2 is read by the objective, which computes in fp32
        casts=sum(weight.numel() for weight in linear if weight is not drafter.bias_weight),
        target_parameters=sum(_numel(parameter) for parameter in parameters.values()),
        target_active=max(0, _active(target.config, parameters) - ends),
        ends=ends,
        scaled_ends=scaled,
        saved_value=target.dtype.itemsize,
        soft_cap=target.head.soft_cap is not None,
        by_token=drafter.latent_of_token,
        text=target.config,
    )


def _own(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # whole, where DeepSpeed has it


def _active(text: Any, parameters: dict[str, Any]) -> int:
    """Parameters without the experts that a token is not sent to."""
    chosen = getattr(text, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(text, name, None))), None)
    total = idle = 0
    for name, parameter in parameters.items():
        total += _numel(parameter)
        if chosen and experts and ".experts." in name:
            idle += _numel(parameter) * (experts - chosen) // experts
    return total - idle


@dataclass(frozen=True)
class MicroBatch:
    """`contexts`: tokens of each sample; `blocks`: its anchors; `block_size` K."""

    contexts: tuple[int, ...]
    blocks: tuple[int, ...]
    block_size: int

    @property
    def tokens(self) -> int:
        """T: the samples are packed end to end."""
        return sum(self.contexts)

    @property
    def padded(self) -> int:
        """Tokens of the target's forward, where rows are as long as the longest."""
        return max(self.contexts) * len(self.contexts)

    @property
    def slots(self) -> int:
        """S."""
        return sum(self.blocks) * self.block_size

    @property
    def positions(self) -> int:
        """Of the target, that slots are held against: blocks of one sample overlap. Expected, for
        anchors all over the sample; where only its end is an answer there are fewer."""
        return round(
            sum(
                context * (1 - (1 - min(1.0, blocks / context)) ** self.block_size)
                for context, blocks in zip(self.contexts, self.blocks, strict=True)
            )
        )

    def pairs(self, queries: int, keys: int) -> tuple[tuple[int, int], ...]:
        """(queries, keys that they meet) of each sample: its context and its blocks.

        Of a block there are so many `queries` and `keys`.
        """
        return tuple(
            (blocks * queries, context + blocks * keys)
            for context, blocks in zip(self.contexts, self.blocks, strict=True)
        )


@dataclass(frozen=True)
class Job:
    """Where a config is to run: `world` processes, one a device; `cuda` or on processors."""

    config: RunConfig
    shapes: Shapes
    world: int
    cuda: bool

    @property
    def value(self) -> int:
        """Bytes of one number of the target."""
        return self.shapes.value(self.config.target)

    @property
    def work(self) -> int:
        """Bytes of one number of the drafter's products: training.precision."""
        return BF16 if self.config.training.precision == "bf16" else FP32

    @property
    def micro_batches(self) -> int:
        """Micro-batches a process and step."""
        training = self.config.training
        return -(-training.batch_size // (self.world * training.micro_batch_size))
