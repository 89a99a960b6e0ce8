"""ZeRO stages 1 to 3 by DeepSpeed, through Accelerate.

What is peculiar to DeepSpeed 0.19 is here and nowhere else. Checkpoints do not use its own format:
stages 1 to 3 cannot all load another number of processes from it, and weights and moments by name,
gathered one parameter at a time, can.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspec.errors import CheckpointError
from deepspec.machine import import_deepspeed
from deepspec.training.distillation import Distillation
from deepspec.training.engine import MOMENTS, Engine


class ZeroEngine(Engine):
    """Optimizer state (1), gradients (2) and parameters (3) sharded over the processes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Accelerate tells transformers of stage 3, and then every model that is loaded comes in
        # shards: the frozen target too
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()

    def _start(self, device: str) -> dict[str, Any]:
        import_deepspeed(
            "engine=zero1, zero2 or zero3",
            "set engine=single (one process) or engine=zero0 (replicas)",
        )
        _alone()
        from accelerate import DeepSpeedPlugin

        self._stage = int(self._config.kind.removeprefix("zero"))
        # `accelerate launch --cpu` sets it, and then Accelerate forgets the plugin
        os.environ.pop("ACCELERATE_USE_CPU", None)
        plugin = DeepSpeedPlugin(hf_ds_config=self._settings(), zero3_init_flag=False)
        return {"deepspeed_plugin": plugin, "kwargs_handlers": [self._process_group(device)]}

    def _settings(self) -> dict[str, Any]:
        config = self._config
        zero: dict[str, Any] = {
            "stage": self._stage,
            "overlap_comm": config.overlap_comm and self._stage == 2,
            "reduce_bucket_size": config.bucket_size,
            "allgather_bucket_size": config.bucket_size,
        }
        if self._stage == 3:
            zero |= {
                "stage3_param_persistence_threshold": config.persistence_threshold,
                "stage3_prefetch_bucket_size": config.bucket_size,
            }
        if config.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            # batches are ours: DeepSpeed sees micro-batches, as many as a step has
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self._training.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # torch's AdamW also where the state is offloaded: DeepSpeed's compiles for 35 s
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }

    def prepare(self, distillation: Distillation) -> nn.Module:
        """See `Engine.prepare`; shards the parameters."""
        from deepspeed.utils import groups

        # DeepSpeed would make its own, which waits for half an hour whatever engine.timeout says
        groups._WORLD_GROUP = dist.new_group(timeout=self._timeout)
        self._drafter = distillation.drafter
        distillation.to(self.device)
        self._module: Any
        self._module, _ = self.accelerator.prepare(distillation, self._adamw(distillation))
        self._zero: Any = self._module.optimizer  # DeepSpeed's, around torch's
        return self._module

    def _release(self) -> None:
        """See `Engine._release`; the library's stage 3 holds modules in two places of its own."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator,
        )

        FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():  # one has an lru_cache inside
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()
        super()._release()

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`. DeepSpeed averages over processes; the loss wants a sum."""
        self._module.backward(loss * self.world)

    def update(self, learning_rate: float) -> float:
        """See `Engine.update`; but here weights are touched before the norm is known."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._module.step()
        return float(self._module.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`; gathered one parameter at a time, by the main process alone."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        local = self._stage == 3
        trained = self._gathered(
            {"": safe_get_local_fp32_param if local else safe_get_full_fp32_param}
        )
        fixed = {name: tensor.cpu() for name, tensor in self._fixed().items()}
        return {**trained, **fixed} if self.is_main else {}

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine.optimizer_state`."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        get = safe_get_local_optimizer_state if self._stage == 3 else safe_get_full_optimizer_state

        def getter(moment: str) -> Any:
            return lambda parameter: get(parameter, moment)

        return self._gathered({f"{moment}/": getter(moment) for moment in MOMENTS})

    def _gathered(self, getters: dict[str, Any]) -> dict[str, Tensor]:
        """Stages 1 and 2 know a parameter's fragments and sum them up; of stage 3 we know the
        shares ourselves, and no process but the main one ever holds a whole parameter."""
        kept = {}
        parameters: Iterator[tuple[str, Any]] = self._drafter.named_parameters()
        for name, parameter in parameters:
            for prefix, get in getters.items():
                full = get(parameter)  # a collective at stages 1 and 2: all take part
                if self._stage == 3:
                    full = self._to_main(full, parameter.ds_shape)
                if full is not None and self.is_main:
                    kept[prefix + name] = full.detach().float().cpu().clone().contiguous()
        return kept

    def _to_main(self, share: Tensor, shape: torch.Size) -> Tensor | None:
        """All processes' shares of a parameter, in the main one; the last is padded."""
        if self.world == 1:
            return share[: shape.numel()].view(shape)
        share = share.contiguous()
        shares = [torch.empty_like(share) for _ in range(self.world)] if self.is_main else None
        dist.gather(share, shares)
        return torch.cat(shares)[: shape.numel()].view(shape) if shares else None

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], step: int) -> None:
        """See `Engine.restore`."""
        parameters, fixed = dict(self._drafter.named_parameters()), self._fixed()
        if set(weights) != set(parameters) | set(fixed):
            raise CheckpointError("the checkpoint does not fit this drafter: other parameters")
        for name, tensor in fixed.items():
            tensor.copy_(weights[name])
        for shard in self._shards():  # empty until the first step
            state = self._zero.optimizer.state[shard]
            state["step"] = torch.tensor(float(step))
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(shard)
        put = self._put_share if self._stage == 3 else self._put_whole
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in parameters.items():
            put(parameter, weights[name], {m: moments[f"{m}/{name}"] for m in MOMENTS})

    def _put_whole(self, parameter: Any, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Stages 1 and 2: the parameter is whole, DeepSpeed cuts the fp32 copy and the moments."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for moment, state in moments.items():
            safe_set_full_optimizer_state(parameter, state, moment)

    def _put_share(self, parameter: Any, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Stage 3: cut here, because DeepSpeed forgets the padding of the last process's share."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        with GatheredParameters([parameter], modifier_rank=0):
            if self.is_main:
                parameter.data.copy_(value)
        size = parameter.ds_tensor.numel()

        def share(full: Tensor) -> Tensor:
            own = full.flatten()[self.rank * size : (self.rank + 1) * size].to(self.device)
            return nn.functional.pad(own, (0, size - own.numel()))

        safe_set_local_fp32_param(parameter, share(value))
        for moment, state in moments.items():
            safe_set_local_optimizer_state(parameter, share(state), moment)

    def _shards(self) -> Iterator[Tensor]:
        """This process's flat fp32 share of each parameter group: what torch's AdamW updates."""
        if self._stage == 3:
            yield from self._zero.fp32_partitioned_groups_flat
        else:
            yield from self._zero.single_partition_of_fp32_groups


def _alone() -> None:
    """DeepSpeed wants a process group even for one process: what a launcher would have set."""
    if "RANK" in os.environ:
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
