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

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.utils import cached_file

from deepspec import __version__
from deepspec.atomic import atomic_folder, sha256
from deepspec.config.schema import TargetConfig
from deepspec.drafters.dspark_v4 import DSparkV4Config, DSparkV4Drafter, shape_for
from deepspec.drafters.dspark_v4.experts import GROUP
from deepspec.errors import CheckpointError, TargetError
from deepspec.export.block_scales import dequantised
from deepspec.export.names import public_name
from deepspec.targets import TargetEnds
from deepspec.targets.files import INDEX, SINGLE, WeightFiles
from deepspec.targets.identity import differing

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
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
STAGE = re.compile(r"mtp\.(\d+)\.")
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


def export_deepseek_v4(
    drafter: DSparkV4Drafter, target: TargetEnds, out: Path, card: str, num_anchors: int
) -> Path:
    """Write `drafter` into `out`, whole or not at all; returns `out`.

    `card` is the text of README.md (`model_card`), `num_anchors` what it was trained with
    (training.anchors_per_sample). An earlier export is replaced. Raises CheckpointError when `out`
    holds anything else or cannot be written.
    """
    config = deepseek_v4_config(drafter.config, target, num_anchors)
    _require_free(out)
    try:
        with atomic_folder(out) as folder:
            save_file(dict(_published(drafter)), folder / WEIGHTS, metadata={"format": "pt"})
            config["deepspec"]["sha256"] = sha256(folder / WEIGHTS)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (folder / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write the export {out}: {error}; free disk space or export to another "
            "folder. What was there is untouched"
        ) from error
    return out


def deepseek_v4_config(
    shape: DSparkV4Config, target: TargetEnds, num_anchors: int
) -> dict[str, Any]:
    """config.json: the target's, in its published spelling too, and the drafter's keys."""
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


def card_facts(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (`deepseek_v4_config`) by the keys under which `model_card` looks things up."""
    return {
        **config,
        **{name: config[key] for key, name in OWN.items()},
        "num_hidden_layers": config["dspark_num_layers"],
        "num_target_layers": config["num_hidden_layers"],
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "num_anchors": config["deepspec"]["num_anchors"],
        "deepspec": {**config["deepspec"], "profile": "serving"},
    }


def _published(drafter: DSparkV4Drafter) -> Iterator[tuple[str, Tensor]]:
    for own, tensor in drafter.state_dict().items():
        parts = tensor.unbind() if tensor.ndim == 3 else [tensor]  # experts are stacked
        for name, part in zip(published_names(own, drafter.config), parts, strict=True):
            dtype = torch.float32 if FP32.fullmatch(name) else torch.bfloat16
            # a copy: parts of one storage are no tensors of their own to safetensors
            yield name, part.detach().to("cpu", dtype, copy=True).contiguous()


def _require_free(out: Path) -> None:
    if not out.exists():
        return
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else [out.name]
    foreign = [name for name in found if name not in (WEIGHTS, CONFIG, CARD)]
    if foreign or (found and not _is_ours(out)):
        raise CheckpointError(
            f"{out} is not just an earlier export (it holds {', '.join((foreign or found)[:3])}) "
            "and is not overwritten; choose another folder, or move its files away"
        )


def _is_ours(folder: Path) -> bool:
    """Whether it was written here: a published checkpoint may hold the same files, and a target."""
    return is_deepseek_v4(folder) and "deepspec" in _read_config(folder)


# --------------------------------------------------------------------------------------- reading


def is_deepseek_v4(folder: Path) -> bool:
    """Whether the local `folder` holds a V4 drafter, alone or in its target, by its config.json."""
    try:
        return folder.is_dir() and bool(_read_config(folder))
    except CheckpointError:
        return False


def deepseek_v4_shape(folder: Path) -> DSparkV4Config:
    """The drafter's shape in `folder`, or in the hub checkpoint of that name, without its weights.

    Raises CheckpointError when config.json is missing, incomplete or describes something else.
    """
    return _shape(folder, _read_config(folder), _Tensors(folder))


def load_deepseek_v4(folder: Path, target: TargetEnds | None = None) -> DSparkV4Drafter:
    """The drafter of `folder`, or of the hub checkpoint of that name, fp32, in evaluation mode.

    With a `target`, checks that it is one this drafter fits, that an export was made for it, and
    that it captures the drafter's layers. Raises CheckpointError for files that are missing,
    corrupt or do not fit each other, and for another target.
    """
    config, tensors = _read_config(folder), _Tensors(folder)
    shape = _shape(folder, config, tensors)
    if target is not None:
        _check_target(folder, config, shape, target)
    recorded = config.get("deepspec", {}).get("sha256")
    if recorded is not None and sha256(folder / WEIGHTS) != recorded:
        raise CheckpointError(
            f"{folder / WEIGHTS} is corrupt or incomplete: its sha256 is not the one in {CONFIG}; "
            "copy it again or export again"
        )
    with torch.device("meta"):
        drafter = DSparkV4Drafter(shape)
    expected = drafter.state_dict()
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
        found = {name: STAGE.match(name) for name in self._files.names()}
        self.names = {name for name, stage in found.items() if stage}
        if not self.names:
            raise CheckpointError(f"{folder} holds no mtp.* tensors, which a V4 drafter is made of")
        self.stages = 1 + max(int(stage[1]) for stage in found.values() if stage)

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
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable {CONFIG} ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") != MODEL_TYPE:
        found = raw.get("model_type") if isinstance(raw, dict) else raw
        raise CheckpointError(
            f"{folder / CONFIG} has model_type {found!r:.60}, expected {MODEL_TYPE!r}"
        )
    if missing := [key for key in OWN if key not in raw]:
        raise CheckpointError(
            f"{folder / CONFIG} misses {', '.join(missing)}: a V4 checkpoint without a DSpark "
            "drafter, or an incomplete export"
        )
    return raw


def _shape(folder: Path, config: dict[str, Any], tensors: _Tensors) -> DSparkV4Config:
    """The target's part as Transformers reads it; the number of stages by the tensors there are."""
    own = {name: config[key] for key, name in OWN.items()}
    layers = own.pop("target_layer_ids")
    try:
        return shape_for(
            DeepseekV4Config.from_dict(config),
            **{name: int(value) for name, value in own.items()},
            target_layer_ids=tuple(int(layer) for layer in layers),
            num_layers=tensors.stages,
            confidence_detached=config.get("deepspec", {}).get("confidence_detached", False),
        )
    except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no V4 drafter: {error}") from None


def _check_target(
    folder: Path, config: dict[str, Any], shape: DSparkV4Config, target: TargetEnds
) -> None:
    made_for = config.get("deepspec", {})
    different = differing(made_for.get("identity", {}), target.identity)
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
