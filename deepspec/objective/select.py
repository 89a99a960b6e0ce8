"""Which implementation computes the loss."""

from __future__ import annotations

from deepspec.config.schema import ObjectiveConfig
from deepspec.errors import ConfigError
from deepspec.objective.eager import eager_loss
from deepspec.objective.fused import fused_loss
from deepspec.objective.inputs import LossInputs, LossOutput
from deepspec.targets import FrozenHead

IMPLEMENTATIONS = {"eager": eager_loss, "fused": fused_loss}


def compute_loss(
    inputs: LossInputs,
    draft_head: FrozenHead,
    target_head: FrozenHead,
    config: ObjectiveConfig,
    denominator: float,
) -> LossOutput:
    """The loss of one micro-batch by `config.implementation`; see `eager_loss`."""
    if config.implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"objective.implementation={config.implementation} is not one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    implementation = IMPLEMENTATIONS[config.implementation]
    return implementation(inputs, draft_head, target_head, config, denominator)
