"""The engine under the loop: processes, device, optimizer, and its state by name.

Accelerate starts the processes and knows their devices. Only the drafter's parameters enter the
engine; the target stays outside (house plan, decision 6). `Engine` is one process, or several
replicas whose gradients are summed once a step; `zero.ZeroEngine` shards them with DeepSpeed. Both
give weights and moments by parameter name, so a checkpoint knows no number of processes.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from deepspec.config.schema import EngineConfig, TrackingConfig, TrainingConfig
from deepspec.drafters.base import Drafter
from deepspec.errors import CheckpointError, ConfigError, LostContactError
from deepspec.processes import local_rank, rank, world_size
from deepspec.training.distillation import Distillation
from deepspec.training.tracking import check_trackers

MOMENTS = ("exp_avg", "exp_avg_sq")
PATIENCE = timedelta(days=7)  # for answers, which one process makes while the others wait
# what gloo and NCCL call it; both raise a RuntimeError, as mistakes in the use of them do
LOST_CONTACT = ("/gloo/transport/", "ncclRemoteError")


def choose_device(wanted: str) -> str:
    """`engine.device` as a device torch knows, this process's own of several.

    Raises ConfigError when it is not there.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    found = torch.cuda.device_count()
    if not found:
        raise ConfigError("engine.device=cuda, but torch sees no CUDA device; see deepspec doctor")
    if local_rank() >= found:
        raise ConfigError(
            f"process {local_rank()} of this machine has no CUDA device of its own; start at most "
            f"{found} processes (one a device), or set engine.device=cpu"
        )
    return f"cuda:{local_rank()}" if world_size() > 1 else "cuda"


def open_engine(
    config: EngineConfig, training: TrainingConfig, tracking: TrackingConfig, folder: Path
) -> Engine:
    """The engine of `config.kind`. Raises ConfigError for one that this start does not fit."""
    if config.kind == "single" and world_size() > 1:
        raise ConfigError(
            f"engine=single is one process, but {world_size()} were started; set engine=zero0 "
            "(replicas), zero1, zero2 or zero3 (sharded by DeepSpeed)"
        )
    if config.kind in ("single", "zero0"):
        return Engine(config, training, tracking, folder)
    from deepspec.training.zero import ZeroEngine

    return ZeroEngine(config, training, tracking, folder)


@contextmanager
def contact() -> Iterator[None]:
    """Around all that processes do together. Raises LostContactError where one does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_CONTACT):
            raise
        said = str(error).strip().splitlines()[0].rpartition("] ")[2]  # without gloo's source line
        raise LostContactError(
            f"process {rank()} of {world_size()} lost contact with another one ({said}): its "
            "machine, the network between them or the process itself failed; an error of its own, "
            "if it printed one, is the cause. Once that is mended, the same command goes on from "
            "the last checkpoint"
        ) from error


class Engine:
    """AdamW on fp32 parameters; every process holds everything."""

    def __init__(
        self,
        config: EngineConfig,
        training: TrainingConfig,
        tracking: TrackingConfig,
        folder: Path,
    ) -> None:
        check_trackers(tracking)
        self._config, self._training = config, training
        self._timeout = timedelta(seconds=config.timeout)
        kind = choose_device(config.device).partition(":")[0]
        self.accelerator = Accelerator(
            log_with=list(tracking.trackers) or None,
            project_dir=folder,
            **self._start(kind),
        )
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        assert self.world == world_size(), "Accelerate did not take the processes as they are"
        self.is_main = self.rank == 0
        self._brief = self._patient = None
        if dist.is_initialized():
            self._brief = dist.new_group(backend="gloo", timeout=self._timeout)
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def _start(self, device: str) -> dict[str, Any]:
        """How Accelerate is to start the processes."""
        options: dict[str, Any] = {"cpu": device == "cpu"}
        if world_size() > 1:
            options["kwargs_handlers"] = [self._process_group(device)]
        return options

    def _process_group(self, device: str) -> InitProcessGroupKwargs:
        return InitProcessGroupKwargs(
            backend="gloo" if device == "cpu" else "nccl",
            timeout=self._timeout,
        )

    # ----------------------------------------------------------------------------- processes

    def wait(self, patiently: bool = False) -> None:
        """Until all processes are here; `patiently`, however long one of them still works."""
        if dist.is_initialized():
            dist.barrier(group=self._patient if patiently else self._brief)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in fp64 and in rank order: the same everywhere."""
        if self.world == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(gathered, own)
        return torch.stack(gathered).sum(0).tolist()

    def close(self) -> None:
        """Release what the training allocated and leave the job, the main process first: when one
        is gone, a launcher may end the rest. The evaluation that follows has the memory then."""
        self._release()
        if dist.is_initialized():
            self.wait()
            dist.destroy_process_group()
            # without a pause gloo's threads may abort a process that succeeded
            time.sleep(0.2 if self.is_main else 1.0)

    def _release(self) -> None:
        """Drop module, gradients, optimizer state and buffers, which Accelerate holds too."""
        for name in ("_drafter", "_optimizer", "_module", "_zero"):
            self.__dict__.pop(name, None)
        self.accelerator.free_memory()
        gc.collect()  # modules, hooks and the trainer's generator form cycles

    # ------------------------------------------------------------------------------ training

    def prepare(self, distillation: Distillation) -> nn.Module:
        """Place the module and make its optimizer; returns the module to call."""
        self._drafter: Drafter = distillation.drafter
        distillation.to(self.device)
        self._optimizer: Any = self.accelerator.prepare(self._adamw(distillation))
        return distillation

    def _adamw(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            module.parameters(),
            lr=self._training.learning_rate,
            betas=(self._training.betas[0], self._training.betas[1]),
            weight_decay=self._training.weight_decay,
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch's share of the step's loss."""
        self.accelerator.backward(loss)

    def update(self, learning_rate: float) -> float:
        """Sum the gradients over the processes, clip, update, forget them.

        Returns their norm before clipping. Where it is not finite, no weight is touched.
        """
        parameters = list(self._drafter.parameters())
        if self.world > 1:
            self._sum_gradients(parameters)
        norm = self.accelerator.clip_grad_norm_(parameters, self._training.max_grad_norm)
        norm = float(torch.as_tensor(norm))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """In one message: each costs the network a round trip, however small it is."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    # --------------------------------------------------------------------------------- state

    def weights(self) -> dict[str, Tensor]:
        """Full fp32 parameters by name, and fixed tensors as they are, on CPU.

        All processes call it; the main one gets them.
        """
        trained = {
            name: parameter.detach().float().cpu().contiguous()
            for name, parameter in self._drafter.named_parameters()
        }
        return {**trained, **{name: tensor.cpu() for name, tensor in self._fixed().items()}}

    def _fixed(self) -> dict[str, Tensor]:
        """What a drafter is made of besides its parameters, by name: not trained, never sharded."""
        trained = dict(self._drafter.named_parameters())
        state = self._drafter.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in trained}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Full moments by `<moment>/<parameter>`, as `weights`; the step count is the caller's."""
        state = self._optimizer.optimizer.state
        return {
            f"{moment}/{name}": state[parameter][moment].detach().cpu().contiguous()
            for name, parameter in self._drafter.named_parameters()
            for moment in MOMENTS
            if parameter in state
        }

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], step: int) -> None:
        """Put back what `weights` and `optimizer_state` gave after `step` steps, on any engine."""
        try:
            self._drafter.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit this drafter: {error}") from None
        for name, parameter in self._drafter.named_parameters():
            self._optimizer.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{moment: moments[f"{moment}/{name}"].to(self.device) for moment in MOMENTS},
            }
