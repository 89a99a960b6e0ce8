"""The training objective: distillation toward the target, and the confidence label."""

from deepspec.objective.inputs import LossInputs, LossOutput, slots_of
from deepspec.objective.select import compute_loss

__all__ = ["LossInputs", "LossOutput", "compute_loss", "slots_of"]
