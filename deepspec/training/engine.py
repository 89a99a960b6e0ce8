"""The engine under the loop: device, precision, optimizer, and the optimizer's state by name.

Accelerate moves models and gradients. Only the drafter's parameters enter it; the target stays
outside (house plan, decision 6).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deepspec.config.schema import EngineConfig, TrackingConfig, TrainingConfig
from deepspec.errors import CheckpointError, ConfigError
from deepspec.training.tracking import check_trackers

MOMENTS = ("exp_avg", "exp_avg_sq")


def choose_device(wanted: str) -> str:
    """`engine.device` as a device torch knows. Raises ConfigError when it is not there."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("engine.device=cuda, but torch sees no CUDA device; see deepspec doctor")
    return ("cuda" if available else "cpu") if wanted == "auto" else wanted


class Engine:
    """One process, AdamW, fp32 parameters; bf16 by autocast."""

    def __init__(
        self,
        config: EngineConfig,
        training: TrainingConfig,
        tracking: TrackingConfig,
        folder: Path,
    ) -> None:
        choose_device(config.device)
        check_trackers(tracking)
        self._training = training
        self.accelerator = Accelerator(
            cpu=config.device == "cpu", log_with=list(tracking.trackers) or None, project_dir=folder
        )
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process

    def prepare(self, drafter: nn.Module) -> nn.Module:
        """Place the drafter and make its optimizer; returns the module to call."""
        self._drafter = drafter.to(self.device)
        optimizer = torch.optim.AdamW(
            drafter.parameters(),
            lr=self._training.learning_rate,
            betas=(self._training.betas[0], self._training.betas[1]),
            weight_decay=self._training.weight_decay,
        )
        self._module, self._optimizer = self.accelerator.prepare(self._drafter, optimizer)
        return self._module

    def autocast(self) -> Any:
        """bf16 arithmetic where `training.precision` asks for it."""
        enabled = self._training.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch's share of the loss."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor:
        """Clip the gradients to `max_grad_norm`; their norm before that, a scalar."""
        limit = self._training.max_grad_norm
        return torch.as_tensor(self.accelerator.clip_grad_norm_(self._module.parameters(), limit))

    def step(self, learning_rate: float) -> None:
        """Update the parameters and forget the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Full fp32 parameters by name, on CPU."""
        return {
            name: parameter.detach().float().cpu().contiguous()
            for name, parameter in self._drafter.named_parameters()
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """Full moments by `<moment>/<parameter>`, on CPU; the step count is the checkpoint's."""
        state = self._optimizer.optimizer.state
        return {
            f"{moment}/{name}": state[parameter][moment].detach().cpu().contiguous()
            for name, parameter in self._drafter.named_parameters()
            for moment in MOMENTS
            if parameter in state
        }

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], step: int) -> None:
        """Put back what `weights` and `optimizer_state` gave after `step` steps."""
        try:
            self._drafter.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit this drafter: {error}") from None
        for name, parameter in self._drafter.named_parameters():
            self._optimizer.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{moment: moments[f"{moment}/{name}"].to(self.device) for moment in MOMENTS},
            }
