"""Targets too large for one device: split over the processes of a job, or over devices and disk.

    replicated   every process holds all of it
    tensor       Transformers' tensor-parallel plan, over all processes; each forward is shared
    zero3        DeepSpeed ZeRO-3 partitions the weights; each process forwards its own samples
    device_map   Accelerate's device map: one process over its devices, then memory, then disk

With tensor and zero3 every forward is a chain of collectives: all processes make equally many,
which the training loop does and nothing else here promises. So those two are for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from deepspec.config.schema import COLLECTIVE, RunConfig, TargetConfig
from deepspec.errors import ConfigError, TargetError
from deepspec.machine import import_deepspeed
from deepspec.processes import world_size
from deepspec.records import Sample, TargetFeatures
from deepspec.targets.families import Parts
from deepspec.targets.gguf import is_gguf
from deepspec.targets.target import Target

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # DeepSpeed's names; else it takes float32


def check_parallel(config: TargetConfig, hf_config: Any) -> None:
    """Raises TargetError where a family or a start does not allow `target.parallel`.

    Needs the checkpoint's config only: nothing has been loaded yet.
    """
    kind, text = config.parallel, hf_config.get_text_config()
    if kind not in COLLECTIVE:
        return
    if is_gguf(config.path):
        raise TargetError(
            f"target.parallel={kind} does not split a GGUF file; set target.parallel=device_map, "
            "or replicated"
        )
    if world_size() == 1:
        raise TargetError(
            f"target.parallel={kind} splits the target over several processes, but there is one; "
            "start more (torchrun), or set target.parallel=device_map"
        )
    if kind == "zero3":
        if getattr(hf_config, "quantization_config", None) is not None:
            raise TargetError(
                "target.parallel=zero3 does not split quantised checkpoints: every process would "
                "load it whole; set target.parallel=tensor or device_map"
            )
        return
    plan = _plan_of(type(text))
    if not plan:
        raise TargetError(
            f"target family {text.model_type!r} has no tensor-parallel plan in Transformers; set "
            "target.parallel=zero3 or device_map"
        )
    heads = {
        name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    }
    if any(name.endswith("k_proj") for name in plan):
        for name, count in heads.items():
            if count is not None and count % world_size():
                raise TargetError(
                    f"target.parallel=tensor: {count} {name} cannot be split over {world_size()} "
                    "processes; start a number that divides it, or set target.parallel=zero3"
                )


def check_split(config: RunConfig) -> None:
    """Raises ConfigError where a training wants more of a split target than features."""
    if config.target.parallel not in COLLECTIVE:
        return
    if config.regenerate.enabled and not config.regenerate.server:
        raise ConfigError(
            f"target.parallel={config.target.parallel} cannot answer the prompts: make the answers "
            "first (deepspec regenerate target.parallel=device_map) and set data.path=[FILE] "
            "regenerate.enabled=false, or set regenerate.server"
        )
    if config.evaluation.enabled:
        raise ConfigError(
            f"target.parallel={config.target.parallel} cannot evaluate: set "
            "evaluation.enabled=false, and run deepspec evaluate target.parallel=device_map "
            "afterwards"
        )


def _plan_of(kind: type) -> dict[str, str]:
    """The plan of a family's own config class; the class of all configs is not asked, for what
    another family left there would hold for every one."""
    from transformers import PreTrainedConfig

    own = (base for base in kind.__mro__ if base is not PreTrainedConfig)
    return next((plan for base in own if (plan := vars(base).get("base_model_tp_plan"))), {})


def placement(config: TargetConfig) -> dict[str, Any]:
    """What `from_pretrained` is told of where the weights go."""
    if config.parallel == "tensor":
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=world_size())}
    if config.parallel == "device_map":
        return {
            "device_map": "auto",
            "max_memory": _limits(config.max_memory),
            "offload_folder": config.offload_folder,
        }
    return {}


def _limits(most: str | None) -> dict[int | str, str] | None:
    """`most` on every accelerator, or on a machine without one in memory."""
    if most is None:
        return None
    count = torch.cuda.device_count()
    return dict.fromkeys(range(count), most) | {"cpu": most if not count else "1000GiB"}


class TensorParallelTarget(Target):
    """All processes compute every forward together, so each sees the samples of all."""

    @torch.no_grad()
    def features(self, samples: Sequence[Sample], all_finals: bool = True) -> TargetFeatures:
        """See `Target.features`. A collective; other samples in one process would be computed as
        if they were these, so they are exchanged first."""
        shared: list[Sequence[Sample]] = [[] for _ in range(world_size())]
        dist.all_gather_object(shared, list(samples))
        computed = [super(TensorParallelTarget, self).features(own, all_finals) for own in shared]
        return computed[dist.get_rank()]


@contextmanager
def zero3_loading(dtype: torch.dtype) -> Iterator[None]:
    """Inside, Transformers loads a model in shards: no process holds all of it at any time.

    DeepSpeed makes all weights `dtype`, whatever they are in the files.
    """
    import_deepspeed("target.parallel=zero3", "set target.parallel=tensor or device_map")
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(_zero3_settings(dtype))  # held by a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # this model alone
        del kept


def zero3_backbone(parts: Parts, dtype: torch.dtype, device: torch.device) -> None:
    """Let DeepSpeed gather a layer at a time in the forward of `parts.backbone`."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl")
    parts.backbone.eval().requires_grad_(False)
    set_z3_leaf_modules(parts.backbone, list({type(layer) for layer in parts.layers}))
    # not the whole model: its root hook would never see the backbone called, and nothing prefetch
    engine, *_ = deepspeed.initialize(model=parts.backbone, config=_zero3_settings(dtype))
    parts.backbone.__dict__["zero3_engine"] = engine  # kept alive, and not as a submodule


def _zero3_settings(dtype: torch.dtype) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
        },
    }
    if dtype in HALVES:
        settings[HALVES[dtype]] = {"enabled": True}
    return settings
