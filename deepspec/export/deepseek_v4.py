"""The drafter in a DeepSeek V4 checkpoint, its `mtp.*` tensors: written, and read from there.

    out/
        model.safetensors   mtp.{stage}.*: names and shapes of the published checkpoints
        config.json         the target's config, and the drafter's keys dspark_* as published
        README.md           the model card

Written are bf16 weights, and fp32 where the published ones are fp32. Read are such folders and
whole V4 checkpoints, local or on the hub, in one file or in shards of which only those with the
drafter are opened; block-scaled FP8 and FP4 weights become what they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.utils import cached_file

from deepspec import __version__
from deepspec.config.schema import TargetConfig
from deepspec.drafters.dspark_v4 import DSparkV4Config, DSparkV4Drafter, shape_for
from deepspec.drafters.dspark_v4.experts import GROUP
from deepspec.errors import CheckpointError, ConfigError, TargetError, first_line
from deepspec.export.block_scales import dequantised
from deepspec.export.engines import Traits
from deepspec.export.files import (
    AGAIN,
    CONFIG,
    Headers,
    check_hash,
    deepspec_of,
    identity_in,
    weight_map,
)
from deepspec.export.inspection import layer_faults
from deepspec.export.names import public_name
from deepspec.model_files import read_model_config
from deepspec.targets import TargetEnds
from deepspec.targets.files import INDEX, SINGLE, WeightFiles
from deepspec.targets.identity import differing

MODEL_TYPE = "deepseek_v4"
# fields of DSparkV4Config that are the drafter's own, by their published names
OWN = {
    "dspark_block_size": "block_size",
    "dspark_noise_token_id": "mask_token_id",
    "dspark_target_layer_ids": "target_layer_ids",
    "dspark_markov_rank": "markov_rank",
}
SCALES = ("scale", "weight_scale_inv")  # beside `weight`: V4's name for it, and an older one
FP32 = re.compile(r".*\.(attn_sink|gate\.bias|hc_\w+)")  # as published; the rest is bf16
STAGE = re.compile(r"mtp\.(\d{1,3})\.")
EXPERTS = re.compile(r"(.*\.experts)\.(\d+)\.(w[123])")  # of a group


# ----------------------------------------------------------------------------------------- names


def published_names(name: str, shape: DSparkV4Config) -> list[str]:
    """What the tensor `name` of the module is called in a checkpoint; of stacked experts, each."""
    if name.startswith("stages."):
        name = name.removeprefix("stages.")
    else:
        name = f"{0 if name.startswith('main_') else shape.num_layers - 1}.{name}"
    name = "mtp." + re.sub(r"(hc_\w+)\.(\w+)$", r"\1_\2", name)
    if stacked := EXPERTS.fullmatch(name):
        prefix, group, matrix = stacked.groups()
        first = int(group) * GROUP
        last = min(first + GROUP, shape.n_routed_experts)
        return [f"{prefix}.{expert}.{matrix}.weight" for expert in range(first, last)]
    return [name]


# --------------------------------------------------------------------------------------- writing


def deepseek_v4_config(
    shape: DSparkV4Config, target: TargetEnds, profile: str, num_anchors: int
) -> dict[str, Any]:
    """config.json: the target's, in its published spelling too, and the drafter's keys.

    Raises ConfigError for the profile full: the format has no place for embedding and LM head.
    """
    if profile != "serving":
        raise ConfigError(
            f"export.profile={profile}: mtp.* tensors carry no embedding and LM head; set "
            "export.profile=serving"
        )
    text = target.config
    own = {key: shape.to_dict()[name] for key, name in OWN.items()}
    ratios = [text.compress_rates.get(kind, 0) for kind in text.layer_types]
    return {
        # no quantization_config, which speaks of the target's weights, and no path of this machine
        **{
            key: value
            for key, value in text.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        },
        "architectures": ["DeepseekV4ForCausalLM"],
        "dtype": "bfloat16",
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "num_hash_layers": text.mlp_layer_types.count("hash_moe"),
        "compress_ratios": ratios + [0] * shape.num_layers,  # stages compress nothing
        "dspark_num_layers": shape.num_layers,
        **own,
        "deepspec": {
            "version": __version__,
            "target": public_name(target.name),
            "identity": target.identity,
            "confidence_detached": shape.confidence_detached,
            "num_anchors": num_anchors,
        },
    }


def deepseek_v4_tensors(drafter: DSparkV4Drafter) -> dict[str, Tensor]:
    """All tensors by their published names: bf16, and fp32 where the published ones are."""
    return dict(_published(drafter))


def _published(drafter: DSparkV4Drafter) -> Iterator[tuple[str, Tensor]]:
    for own, tensor in drafter.state_dict().items():
        parts = tensor.unbind() if tensor.ndim == 3 else [tensor]  # experts are stacked
        for name, part in zip(published_names(own, drafter.config), parts, strict=True):
            dtype = torch.float32 if FP32.fullmatch(name) else torch.bfloat16
            # a copy: parts of one storage are no tensors of their own to safetensors
            yield name, part.detach().to("cpu", dtype, copy=True).contiguous()


# --------------------------------------------------------------------------------------- reading


def is_deepseek_v4(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a V4 drafter, alone or in its target."""
    return config.get("model_type") == MODEL_TYPE and all(key in config for key in OWN)


def drafter_files(folder: Path) -> set[str] | None:
    """The weight files that hold the drafter, None where there is but one. Raises CheckpointError.

    They need not be there: so a few of a target's many are fetched.
    """
    files = weight_map(folder)
    return None if files is None else {file for name, file in files.items() if STAGE.match(name)}


def deepseek_v4_shape(folder: Path) -> DSparkV4Config:
    """The drafter's shape in `folder`, or in the hub checkpoint of that name, without its weights.

    Raises CheckpointError when config.json is missing, incomplete or describes something else.
    """
    return _shape(folder / CONFIG, _read_config(folder), _Tensors(folder).stages)


def load_deepseek_v4(folder: Path, target: TargetEnds | None = None) -> DSparkV4Drafter:
    """The drafter of `folder`, or of the hub checkpoint of that name, fp32, in evaluation mode.

    With a `target`, checks that it is one this drafter fits, that an export was made for it, and
    that it captures the drafter's layers. Raises CheckpointError for files that are missing,
    corrupt or do not fit each other, and for another target.
    """
    config, tensors = _read_config(folder), _Tensors(folder)
    shape = _shape(folder / CONFIG, config, tensors.stages)
    if target is not None:
        _check_target(folder, config, shape, target)
    check_hash(folder, config)
    expected = _on_meta(shape)
    with torch.device("meta"):
        drafter = DSparkV4Drafter(shape)
    tensors.check_names([name for own in expected for name in published_names(own, shape)])
    weights = {
        own: _stacked(tensors, published_names(own, shape), like) for own, like in expected.items()
    }
    drafter.load_state_dict(weights, assign=True)  # nothing is held twice
    return drafter.eval()


class _Tensors:
    """The drafter's tensors among those of a checkpoint, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if folder.exists() and not any((folder / file).is_file() for file in (SINGLE, INDEX)):
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; it is incomplete")
        with self._readable():
            self._files = WeightFiles(TargetConfig(path=str(folder)))
        self.names = {name for name in self._files.names() if STAGE.match(name)}
        try:
            self.stages = _stages(self.names)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def check_names(self, wanted: list[str]) -> None:
        """Raises CheckpointError where some of `wanted` are missing or there are others."""
        scales = {name for weight in wanted for name in _scale_names(weight)}
        problems = [f"{name} is missing" for name in wanted if name not in self.names]
        others = self.names - set(wanted) - scales
        problems += [f"{name} is not called for" for name in sorted(others)]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"the tensors of {self._folder} do not fit its {CONFIG}: "
                f"{'; '.join(problems[:5])}{more}"
            )

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor `name` in fp32, dequantised. Raises CheckpointError for another shape."""
        scale = next((found for found in _scale_names(name) if found in self.names), None)
        with self._readable():
            stored = self._files.read(name)
            scales = None if scale is None else self._files.read(scale)
        tensor = dequantised(f"{self._folder}: {name}", stored, scales)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._folder}: {name} is {list(tensor.shape)}, expected {list(shape)} by its "
                f"{CONFIG}"
            )
        return tensor

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (TargetError, SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"the weights of {self._folder} are missing, corrupt or incomplete: {error}"
            ) from None


def _stages(names: Iterable[str]) -> int:
    """Return how many stages the tensors of these `names` make. Raises CheckpointError."""
    found = {int(stage[1]) for stage in map(STAGE.match, names) if stage}
    if not found:
        raise CheckpointError("there are no mtp.* tensors, which a V4 drafter is made of")
    if found != set(range(len(found))):
        raise CheckpointError(f"of the stages up to mtp.{max(found)} some are missing")
    return len(found)


def _scale_names(weight: str) -> list[str]:
    base, _, kind = weight.rpartition(".")
    return [f"{base}.{scale}" for scale in SCALES] if kind == "weight" else []


def _stacked(tensors: _Tensors, names: list[str], like: Tensor) -> Tensor:
    """The tensor that is called `names` in the files, as `like`: of experts, one each."""
    if like.ndim < 3:
        return tensors.read(names[0], like.shape)
    stacked = torch.empty(like.shape)
    for part, name in zip(stacked, names, strict=True):
        part.copy_(tensors.read(name, part.shape))
    return stacked


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        file = folder / CONFIG if folder.exists() else Path(str(cached_file(str(folder), CONFIG)))
        raw = read_model_config(file, CheckpointError, AGAIN, finite=True)
    except OSError as error:
        raise CheckpointError(f"{folder} holds no readable {CONFIG} ({error})") from None
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder / CONFIG} has model_type {raw.get('model_type')!r:.60}, expected "
            f"{MODEL_TYPE!r}"
        )
    if missing := [key for key in OWN if key not in raw]:
        raise CheckpointError(
            f"{folder / CONFIG} misses {', '.join(missing)}: a V4 checkpoint without a DSpark "
            "drafter, or an incomplete export"
        )
    return raw


def _shape(file: Path, config: dict[str, Any], stages: int) -> DSparkV4Config:
    """The target's part as Transformers reads it; as many stages as there are tensors of."""
    own = {name: config[key] for key, name in OWN.items()}
    layers = own.pop("target_layer_ids")
    try:
        return shape_for(
            DeepseekV4Config.from_dict(config),
            **{name: int(value) for name, value in own.items()},
            target_layer_ids=tuple(int(layer) for layer in layers),
            num_layers=stages,
            confidence_detached=deepspec_of(config).get("confidence_detached") is True,
        )
    except Exception as error:  # Transformers looks at sizes and rotations in many ways
        raise CheckpointError(f"{file} describes no V4 drafter: {first_line(error)}") from None


def _on_meta(shape: DSparkV4Config) -> dict[str, Tensor]:
    """Return the tensors of a drafter of `shape` without values. Raises CheckpointError where there
    can be none."""
    try:
        with torch.device("meta"):
            return dict(DSparkV4Drafter(shape).state_dict())
    except Exception as error:
        raise CheckpointError(f"no V4 drafter has these sizes: {first_line(error)}") from None


def _check_target(
    folder: Path, config: dict[str, Any], shape: DSparkV4Config, target: TargetEnds
) -> None:
    made_for = deepspec_of(config)
    different = differing(identity_in(config), target.identity)
    sizes = {
        "family": (MODEL_TYPE, target.config.model_type),
        "hidden_size": (shape.hidden_size, target.hidden_size),
        "vocab_size": (shape.vocab_size, target.vocab_size),
        "num_hidden_layers": (shape.num_target_layers, target.num_layers),
    }
    different += [f"{key} ({own}, not {its})" for key, (own, its) in sizes.items() if own != its]
    if different:
        raise CheckpointError(
            f"{folder} was made for another target than {target.name}: the {', '.join(different)} "
            f"differ(s); set target.path to {made_for.get('target', 'the one it came with')}, or "
            "train a drafter for this one"
        )
    if list(target.layer_ids) != list(shape.target_layer_ids):
        raise CheckpointError(
            f"{folder} reads the target's layers {list(shape.target_layer_ids)}, but the target "
            f"captures {list(target.layer_ids)}; set target.layer_ids to the former"
        )


# ------------------------------------------------------------------------------------ inspection


def deepseek_v4_faults(config: dict[str, Any], headers: Headers | None) -> Iterator[str]:
    """What is wrong with a config.json and the tensors beside it (None: they are unreadable)."""
    if headers is None:
        return
    own = {name: info for name, info in headers.items() if STAGE.match(name)}
    try:
        shape = _shape(Path(CONFIG), config, _stages(own))
        module = _on_meta(shape)
    except CheckpointError as error:
        yield str(error)
        return
    yield from layer_faults(shape.target_layer_ids, shape.num_target_layers, last=True)
    if not 0 <= shape.mask_token_id < shape.vocab_size:
        yield f"dspark_noise_token_id {shape.mask_token_id} is none of {shape.vocab_size} tokens"
    wanted = {
        name: tuple(tensor.shape[-2:] if tensor.ndim == 3 else tensor.shape)
        for key, tensor in module.items()
        for name in published_names(key, shape)
    }
    scales = {scale for name in wanted for scale in _scale_names(name)}
    yield from (f"{name} is not called for" for name in own if name not in wanted.keys() | scales)
    for name, size in wanted.items():
        if name not in own:
            yield f"{name} is missing"
        elif not any(scale in own for scale in _scale_names(name)):  # else the loader looks at it
            dtype = "F32" if FP32.fullmatch(name) else "BF16"
            if own[name].dtype != dtype:
                yield f"{name} is {own[name].dtype} without a scale, expected {dtype}"
            if own[name].shape != size:
                yield f"{name} is {list(own[name].shape)}, expected {list(size)}"


def deepseek_v4_traits(config: dict[str, Any]) -> Traits:
    """What engines go by: they read the drafter as a part of its target."""
    rank = config.get("dspark_markov_rank")
    return Traits(
        layout=MODEL_TYPE,
        markov_head="vanilla",
        markov_rank=rank if isinstance(rank, int) else 0,
        reduced=False,
        embedding=False,
        lm_head=False,
        tied=None,
    )
