"""A DSpark drafter's shape, resolved against one target; written into every checkpoint."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from deepspec.config.schema import DrafterConfig
from deepspec.errors import CheckpointError, ConfigError
from deepspec.targets.attributes import common

MARKOV_HEADS = ("vanilla", "gated", "rnn")


@dataclass(frozen=True)
class DSparkConfig:
    """Everything needed to build the module; DFlash is `markov_rank` 0 without confidence.

    `hidden_size` is the target's: embedding and LM head are shared with it. `target_layer_ids`
    name a decoder layer's output (k -> hidden_states[k + 1]) of `num_target_layers`, 0 where an
    export does not say that. Slot 0 holds the anchor (`sample_from_anchor`), so K inputs give K
    drafts. `draft_vocab_size` tokens of the vocabulary are drafted, None: all of them;
    `draft_vocab_coverage` of the training tokens are among these.
    """

    hidden_size: int
    vocab_size: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    block_size: int
    mask_token_id: int
    markov_head: str
    markov_rank: int
    confidence_head: bool
    confidence_with_markov: bool
    confidence_detached: bool
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    initializer_range: float
    sample_from_anchor: bool = True
    draft_vocab_size: int | None = None
    draft_vocab_coverage: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        values["target_layer_ids"] = list(self.target_layer_ids)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DSparkConfig:
        """The inverse of `to_dict`. Raises CheckpointError naming missing or unknown keys."""
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= set(values) <= known:
            raise CheckpointError(
                f"the drafter config has unexpected keys {sorted(set(values) - known)} and misses "
                f"{sorted(needed - set(values))}; was the checkpoint written by another version?"
            )
        config = cls(**{**values, "target_layer_ids": tuple(values["target_layer_ids"])})
        if not config.sample_from_anchor:
            raise CheckpointError(
                "sample_from_anchor is false: drafters whose first slot is a mask are not supported"
            )
        return config


def resolve_config(config: DrafterConfig, target: Any) -> DSparkConfig:
    """The drafter's shape for `target` (a `deepspec.targets` Target); nulls taken from it.

    Raises ConfigError for values that do not fit the target.
    """
    text = target.config
    rank = 0 if config.kind == "dflash" else config.markov_rank
    if config.markov_head not in MARKOV_HEADS:
        raise ConfigError(
            f"drafter.markov_head={config.markov_head} is not one of {', '.join(MARKOV_HEADS)}"
        )
    heads = int(config.num_attention_heads or text.num_attention_heads)
    key_value_heads = int(
        config.num_key_value_heads or getattr(text, "num_key_value_heads", None) or heads
    )
    if heads % key_value_heads:
        raise ConfigError(
            f"drafter.num_attention_heads={heads} is not a multiple of "
            f"drafter.num_key_value_heads={key_value_heads}"
        )
    return DSparkConfig(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_layers,
        target_layer_ids=tuple(target.layer_ids),
        num_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=config.head_dim or common(text, "head_dim") or target.hidden_size // heads,
        intermediate_size=config.intermediate_size or text.intermediate_size,
        block_size=config.block_size,
        mask_token_id=resolve_mask_token(config.mask_token_id, target),
        markov_head=config.markov_head,
        markov_rank=rank,
        confidence_head=config.confidence_head and config.kind != "dflash",
        confidence_with_markov=config.confidence_with_markov and rank > 0,
        confidence_detached=config.confidence_detached,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_parameters=_rope_parameters(text),
        max_position_embeddings=text.max_position_embeddings,
        initializer_range=getattr(text, "initializer_range", 0.02),
        draft_vocab_size=_draft_vocab_size(config.draft_vocab_size, target.vocab_size),
    )


def _draft_vocab_size(size: int | None, whole: int) -> int | None:
    """None where it is the `whole` vocabulary."""
    if size is not None and size > whole:
        raise ConfigError(
            f"drafter.draft_vocab_size={size} is more than the target's vocabulary of {whole}; "
            "choose fewer, or null for all of them"
        )
    return None if size == whole else size


def resolve_mask_token(configured: int | None, target: Any) -> int:
    """The id whose embedding fills the unknown slots: configured, or the tokenizer's mask token.

    Without either, the last row of the embedding that the tokenizer never emits. Raises
    ConfigError when the id is outside the vocabulary or none can be found.
    """
    if configured is None:
        configured = target.tokenizer.mask_token_id
    if configured is None:
        configured = target.tokenizer.get_vocab().get("<|mask|>")
    if configured is None and len(target.tokenizer) < target.vocab_size:
        configured = len(target.tokenizer)  # Qwen3: 151669, the first row behind the vocabulary
    if configured is None:
        raise ConfigError(
            "the tokenizer has no mask token and no unused embedding row; set drafter.mask_token_id"
            " to a token that never occurs in text"
        )
    if not 0 <= configured < target.vocab_size:
        raise ConfigError(
            f"drafter.mask_token_id={configured} is outside the target's vocabulary of "
            f"{target.vocab_size}; choose an id from 0 to {target.vocab_size - 1}"
        )
    return int(configured)


def _rope_parameters(text: Any) -> dict[str, Any]:
    """The target's rotary parameters; of a table a kind of layer, those of its main kind.

    A drafter rotates whole heads, whatever part of one its target does: no layout can say another.
    """
    parameters = dict(getattr(text, "rope_parameters", None) or {})
    for kind in ("full_attention", "main"):
        if isinstance(parameters.get(kind), dict):
            parameters = dict(parameters[kind])
    parameters.pop("partial_rotary_factor", None)
    parameters.setdefault("rope_theta", getattr(text, "rope_theta", 10000.0))
    if parameters.setdefault("rope_type", "default") == "proportional":  # Gemma 4: of a part
        parameters["rope_type"] = "default"
    return parameters
