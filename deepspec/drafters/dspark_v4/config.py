"""The shape of a V4-native drafter: its target's own sizes, and what is chosen for the drafter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.mask_token import resolve_mask_token
from deepspec.drafters.shape import read_shape
from deepspec.errors import ConfigError

FAMILY = "deepseek_v4"
# what a stage takes over from its target, under the name that both configs have for it
FROM_TARGET = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "routed_scaling_factor",
    "swiglu_limit",
    "rms_norm_eps",
    "initializer_range",
)
# keys of `drafter.` that the format leaves no choice about
FIXED: dict[str, Any] = {
    "intermediate_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "markov_head": "vanilla",
    "confidence_head": True,
    "confidence_with_markov": True,
}


@dataclass(frozen=True)
class DSparkV4Config:
    """Everything needed to build the module (checkpoint-formats.md, "DeepSeek-V4 draft").

    Fields that the target's config has too are called as there. Constants of the format, and so no
    fields: one key/value head whose keys are its values, scores divided by sqrt(head_dim), one
    shared expert, sqrt(softplus) scores, routed weights that are normalised, a vanilla Markov head,
    a confidence head without bias that reads W1[x] too, and the anchor in slot 0.
    """

    hidden_size: int
    vocab_size: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    num_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    rope_theta: float
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    block_size: int
    mask_token_id: int
    markov_rank: int
    confidence_detached: bool
    rms_norm_eps: float
    initializer_range: float
    # what the format fixes, for readers of any kind of shape
    markov_head: ClassVar[str] = "vanilla"
    confidence_head: ClassVar[bool] = True
    draft_vocab_size: ClassVar[None] = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "target_layer_ids": list(self.target_layer_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DSparkV4Config:
        """The inverse of `to_dict`. Raises CheckpointError, as `read_shape`."""
        return read_shape(cls, values)


def shape_for(text: Any, **chosen: Any) -> DSparkV4Config:
    """The shape that a V4 config (Transformers' DeepseekV4Config) gives a drafter.

    `chosen`: the fields that are the drafter's own.
    """
    return DSparkV4Config(
        **{name: getattr(text, name) for name in FROM_TARGET},
        # of layers without a compressor: no YaRN
        rope_theta=float(text.rope_parameters["main"]["rope_theta"]),
        num_target_layers=text.num_hidden_layers,
        **chosen,
    )


def resolve_config(config: DrafterConfig, target: Any) -> DSparkV4Config:
    """The drafter's shape for `target` (a `deepspec.targets` Target), which must be a V4.

    Raises ConfigError for another family, and for keys that the format leaves no choice about.
    """
    if target.config.model_type != FAMILY:
        raise ConfigError(
            f"drafter.kind=dspark_v4 drafts for {FAMILY} targets only, but target.path is a "
            f"{target.config.model_type} one; set drafter=dspark, which drafts for every family"
        )
    for key, only in FIXED.items():
        if (value := getattr(config, key)) != only:
            raise ConfigError(
                f"drafter.{key}={value} is not to be had with drafter.kind=dspark_v4, whose format "
                f"fixes it; set drafter.{key}={'null' if only is None else str(only).lower()}, or "
                "drafter=dspark, the dense kind, which drafts for V4 too"
            )
    if config.markov_rank < 1:
        raise ConfigError("drafter.markov_rank=0, but drafter.kind=dspark_v4 has a Markov head")
    return shape_for(
        target.config,
        target_layer_ids=tuple(target.layer_ids),
        num_layers=config.num_layers,
        block_size=config.block_size,
        mask_token_id=resolve_mask_token(config.mask_token_id, target),
        markov_rank=config.markov_rank,
        confidence_detached=config.confidence_detached,
    )
