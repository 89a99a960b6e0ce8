"""A DSpark drafter's shape, resolved against one target; written into every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.mask_token import resolve_mask_token
from deepspec.drafters.shape import DrafterShape, resolve_draft_vocab_size, resolve_shape
from deepspec.errors import CheckpointError, ConfigError

MARKOV_HEADS = ("vanilla", "gated", "rnn")


@dataclass(frozen=True)
class DSparkConfig(DrafterShape):
    """A backbone and its heads; DFlash is `markov_rank` 0 without confidence.

    Slot 0 holds the anchor (`sample_from_anchor`), so K inputs give K drafts. `num_target_layers`
    is 0 where an export does not say it. `draft_vocab_size` tokens of the vocabulary are drafted,
    None: all of them; `draft_vocab_coverage` of the training tokens are among these.
    """

    mask_token_id: int
    markov_head: str
    markov_rank: int
    confidence_head: bool
    confidence_with_markov: bool
    confidence_detached: bool
    sample_from_anchor: bool = True
    draft_vocab_size: int | None = None
    draft_vocab_coverage: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """See `DrafterShape.from_dict`; refuses drafters whose first slot is a mask."""
        config = super().from_dict(values)
        if not config.sample_from_anchor:
            raise CheckpointError(
                "sample_from_anchor is false: drafters whose first slot is a mask are not supported"
            )
        return config


def resolve_config(config: DrafterConfig, target: Any) -> DSparkConfig:
    """The drafter's shape for `target` (a `deepspec.targets` Target); nulls taken from it.

    Raises ConfigError for values that do not fit the target.
    """
    rank = 0 if config.kind == "dflash" else config.markov_rank
    if config.markov_head not in MARKOV_HEADS:
        raise ConfigError(
            f"drafter.markov_head={config.markov_head} is not one of {', '.join(MARKOV_HEADS)}"
        )
    return DSparkConfig(
        **resolve_shape(config, target),
        mask_token_id=resolve_mask_token(config.mask_token_id, target),
        markov_head=config.markov_head,
        markov_rank=rank,
        confidence_head=config.confidence_head and config.kind != "dflash",
        confidence_with_markov=config.confidence_with_markov and rank > 0,
        confidence_detached=config.confidence_detached,
        draft_vocab_size=resolve_draft_vocab_size(config.draft_vocab_size, target.vocab_size),
    )
