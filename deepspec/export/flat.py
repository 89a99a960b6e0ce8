"""The flat Qwen3 layout: what vLLM, SGLang, llama.cpp and the public DeepSpec read.

    out/
        model.safetensors   bf16, the drafter's own parameter names, no prefix
        config.json         a Qwen3 config of the *drafter's* backbone, DSpark's keys beside it
        README.md           the model card

Two profiles: `serving` leaves the embedding and LM head out, because engines share the target's;
`full` carries both. The keys are those of the public implementation's checkpoints; what only this
library needs (whose target, which files) is under the one extra key `deepspec`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec import __version__
from deepspec.atomic import atomic_folder, sha256
from deepspec.drafters.dspark.config import DSparkConfig
from deepspec.drafters.dspark.model import DSparkDrafter
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export.names import public_name
from deepspec.targets import TargetEnds

PROFILES = ("serving", "full")
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

# fields of DSparkConfig that have another name in config.json
FLAT_NAMES = {
    "num_layers": "num_hidden_layers",
    "markov_head": "markov_head_type",
    "confidence_head": "enable_confidence_head",
    "confidence_with_markov": "confidence_head_with_markov",
}
# what every drafter of this kind is; a checkpoint that says otherwise is not one
FIXED = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "is_causal": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}
TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "bool": bool,
    "float": (int, float),
    "str": str,
    "tuple[int, ...]": list,
}


# --------------------------------------------------------------------------------------- writing


def export_flat(
    drafter: DSparkDrafter, target: TargetEnds, out: Path, profile: str, card: str, num_anchors: int
) -> Path:
    """Write `drafter` for serving beside `target` into `out`, whole or not at all; returns `out`.

    `profile` is `serving` or `full`, `card` the text of README.md (`model_card`), `num_anchors`
    what it was trained with (training.anchors_per_sample). Weights are rounded to bf16. An earlier
    export is replaced. Raises CheckpointError when `out` holds anything else or cannot be written.
    """
    config = flat_config(drafter.config, target, profile, num_anchors)
    tensors = drafter.state_dict()
    if profile == "full":
        tensors |= _shared(target)
    _require_free(out)
    try:
        with atomic_folder(out) as folder:
            weights = folder / WEIGHTS
            rounded = {name: _bf16(tensor) for name, tensor in tensors.items()}
            save_file(rounded, weights, metadata={"format": "pt"})
            config["deepspec"]["sha256"] = sha256(weights)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (folder / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write the export {out}: {error}; free disk space or export to another "
            "folder. What was there is untouched"
        ) from error
    return out


def flat_config(
    shape: DSparkConfig, target: TargetEnds, profile: str, num_anchors: int
) -> dict[str, Any]:
    """config.json: the drafter's backbone as a Qwen3 config, and DSpark's keys, at top level.

    Raises ConfigError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"export.profile={profile} is not one of {', '.join(PROFILES)}")
    values = shape.to_dict()
    detached = values.pop("confidence_detached")
    rope = values.pop("rope_parameters")
    if rope["rope_type"] == "default":  # a target's partial or sectioned rotation is not ours
        rope = {key: rope[key] for key in ("rope_type", "rope_theta")}
    return {
        **FIXED,
        **{FLAT_NAMES.get(name, name): value for name, value in values.items()},
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],  # where readers older than rope_parameters look
        "layer_types": ["full_attention"] * shape.num_layers,
        "max_window_layers": shape.num_layers,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": getattr(target.config, "bos_token_id", None),
        "eos_token_id": getattr(target.config, "eos_token_id", None),
        "num_anchors": num_anchors,
        "dtype": "bfloat16",
        "deepspec": {
            "version": __version__,
            "profile": profile,
            "target": public_name(target.name),
            "target_tied": target.embedding.data_ptr() == target.head.weight.data_ptr(),
            "identity": target.identity,
            "confidence_detached": detached,
        },
    }


def _shared(target: TargetEnds) -> dict[str, Tensor]:
    return {EMBEDDING: target.embedding, HEAD: target.head.weight}


def _bf16(tensor: Tensor) -> Tensor:
    # a copy: tied weights share storage, which safetensors refuses
    return tensor.detach().to("cpu", torch.bfloat16, copy=True).contiguous()


def _require_free(out: Path) -> None:
    if not out.exists():
        return
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else [out.name]
    foreign = [name for name in found if name not in (WEIGHTS, CONFIG, CARD)]
    if foreign or (found and not is_flat_export(out)):
        raise CheckpointError(
            f"{out} is not just an earlier export (it holds {', '.join((foreign or found)[:3])}) "
            "and is not overwritten; choose another folder, or move its files away"
        )


# --------------------------------------------------------------------------------------- reading


def is_flat_export(folder: Path) -> bool:
    """Whether `folder` holds a flat export, by its config.json; the weights are not looked at."""
    try:
        return bool(_read_config(folder))
    except CheckpointError:
        return False


def flat_shape(folder: Path) -> DSparkConfig:
    """The drafter's shape in `folder`, without its weights; says which layers the target must give.

    Raises CheckpointError when config.json is missing, incomplete or describes another layout.
    """
    return _shape(_read_config(folder), folder / CONFIG)


def load_flat(folder: Path, target: TargetEnds | None = None) -> DSparkDrafter:
    """The exported drafter, fp32 (of bf16 values), in evaluation mode; either profile.

    With a `target`, checks that the export was made for it and that it captures the drafter's
    layers. Raises CheckpointError for files that are missing, corrupt or do not fit each other,
    and for another target.
    """
    config = _read_config(folder)
    shape = _shape(config, folder / CONFIG)
    if target is not None:
        _check_target(folder, config, shape, target)
    tensors = _read_weights(folder / WEIGHTS, config.get("deepspec", {}).get("sha256"))
    shared = {name: tensors.pop(name) for name in (EMBEDDING, HEAD) if name in tensors}
    if target is not None:
        _check_shared(folder / WEIGHTS, shared, target)
    drafter = _build(shape, folder / CONFIG)
    _check_fit(folder / WEIGHTS, tensors, drafter.state_dict())
    drafter.load_state_dict(tensors)
    return drafter.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} holds no export ({CONFIG} is missing)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is unreadable: {error}") from None
    if not isinstance(raw, dict) or raw.get("architectures") != FIXED["architectures"]:
        found = raw.get("architectures") if isinstance(raw, dict) else raw
        raise CheckpointError(
            f"{file} has architectures {found!r:.60}, expected {FIXED['architectures']}; only the "
            "flat layout is read"
        )
    return raw


def _shape(config: dict[str, Any], file: Path) -> DSparkConfig:
    """config.json as DSparkConfig; every key of it that would change the numbers is looked at."""
    _check_layout(config, file)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    known = {
        # the public implementation writes these two only where there is such a head
        "markov_head_type": "vanilla",
        "confidence_head_with_markov": False,
        **config,
        "rope_parameters": rope,
        "confidence_detached": config.get("deepspec", {}).get("confidence_detached", False),
    }
    names = {field.name: FLAT_NAMES.get(field.name, field.name) for field in fields(DSparkConfig)}
    missing = [key for key in names.values() if key not in known]
    if missing:
        raise CheckpointError(f"{file} misses {', '.join(missing)}; export again")
    for field in fields(DSparkConfig):
        expected = TYPES.get(str(field.type))
        value = known[names[field.name]]
        if expected and not isinstance(value, expected):
            raise CheckpointError(
                f"{file}: {names[field.name]} is {value!r}, expected {field.type}"
            )
    return DSparkConfig.from_dict({name: known[key] for name, key in names.items()})


def _check_layout(config: dict[str, Any], file: Path) -> None:
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{file}: {key} is {config[key]!r}, but only {value!r} is read")
    layer_types = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if layer_types:
        raise CheckpointError(
            f"{file}: layer_types has {', '.join(layer_types)}, but only full_attention is read"
        )
    anchor_first = config.get("sample_from_anchor")
    if anchor_first is not True:
        # readers disagree on the default, and the wrong one drafts rubbish without an error
        found = "missing" if anchor_first is None else anchor_first
        raise CheckpointError(
            f"{file}: sample_from_anchor is {found}, expected true: a drafter whose first slot is "
            "a mask is not supported. If slot 0 of this one holds the anchor (block_size inputs "
            "give block_size drafts), put the key there"
        )


def _check_target(
    folder: Path, config: dict[str, Any], shape: DSparkConfig, target: TargetEnds
) -> None:
    extra = config.get("deepspec", {})
    identity = extra.get("identity", {})
    different = [key for key, value in identity.items() if target.identity.get(key) != value]
    sizes = {
        "hidden_size": (shape.hidden_size, target.hidden_size),
        "vocab_size": (shape.vocab_size, target.vocab_size),
        "num_target_layers": (shape.num_target_layers, target.num_layers),
    }
    different += [f"{key} ({own}, not {its})" for key, (own, its) in sizes.items() if own != its]
    if different:
        raise CheckpointError(
            f"{folder} was made for another target than {target.name}: the {', '.join(different)} "
            f"differ(s); set target.path to {extra.get('target', 'the one it was trained for')}, "
            "or train a drafter for this one"
        )
    if list(target.layer_ids) != list(shape.target_layer_ids):
        raise CheckpointError(
            f"{folder} reads the target's layers {list(shape.target_layer_ids)}, but the target "
            f"captures {list(target.layer_ids)}; set target.layer_ids to the former"
        )


def _read_weights(file: Path, recorded: str | None) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the export is incomplete")
    broken = f"{file} is corrupt or incomplete"
    if recorded is not None and sha256(file) != recorded:
        raise CheckpointError(
            f"{broken}: its sha256 is not the one in {CONFIG}; copy it again or export again"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{broken}: {error}; copy it again or export again") from None


def _check_shared(file: Path, shared: dict[str, Tensor], target: TargetEnds) -> None:
    """The full profile's embedding and head must be the target's: drafting uses the latter."""
    for name, own in _shared(target).items():
        if name in shared and not torch.equal(shared[name].to(torch.bfloat16), _bf16(own)):
            raise CheckpointError(
                f"{file}: {name} is not that of {target.name}; set target.path to the target this "
                "was exported for, or export again"
            )


def _build(shape: DSparkConfig, file: Path) -> DSparkDrafter:
    try:
        return DSparkDrafter(shape)
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{file} describes no drafter that can be built ({type(error).__name__}: {error}); "
            "compare its sizes, markov_head_type and rope_parameters with those it was trained with"
        ) from error


def _check_fit(file: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not called for" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own.shape)}"
        for name, own in expected.items()
        if name in tensors and tensors[name].shape != own.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{file} does not fit {CONFIG} beside it: {'; '.join(problems[:5])}{more}. Export again"
        )
