"""An EAGLE-3 drafter's shape, resolved against one target; written into every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.causal import resolve_layer
from deepspec.drafters.shape import DrafterShape, resolve_draft_vocab_size


@dataclass(frozen=True)
class Eagle3Config(DrafterShape):
    """One layer; `qk_norm`: whether the heads of its queries and keys are normed.

    `num_target_layers` is 0 where an export does not say it. `draft_vocab_size` tokens of the
    vocabulary are drafted, None: all of them; `draft_vocab_coverage` of the training tokens are
    among these.
    """

    qk_norm: bool = True
    draft_vocab_size: int | None = None
    draft_vocab_coverage: float | None = None


def resolve_config(config: DrafterConfig, target: Any) -> Eagle3Config:
    """The drafter's shape for `target`; nulls taken from it. Raises ConfigError."""
    return Eagle3Config(
        **resolve_layer(config, target),
        qk_norm=config.qk_norm,
        draft_vocab_size=resolve_draft_vocab_size(config.draft_vocab_size, target.vocab_size),
    )
