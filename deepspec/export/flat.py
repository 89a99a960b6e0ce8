"""The flat Qwen3 layout: what vLLM, SGLang, llama.cpp and the public DeepSpec read.

config.json is a Qwen3 config of the *drafter's* backbone with DSpark's keys beside it, the tensors
have the drafter's own parameter names. Other layouts of DSpark drafters are described by turning
their config into this one (`speculators`), so what is said of a config here holds for them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from deepspec import __version__
from deepspec.drafters.dspark.config import DSparkConfig
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export.names import public_name
from deepspec.targets import TargetEnds

PROFILES = ("serving", "full")
ARCHITECTURES = ["Qwen3DSparkModel"]

# fields of DSparkConfig that have another name in config.json
FLAT_NAMES = {
    "num_layers": "num_hidden_layers",
    "markov_head": "markov_head_type",
    "confidence_head": "enable_confidence_head",
    "confidence_with_markov": "confidence_head_with_markov",
}
# what every drafter of this kind is; a checkpoint that says otherwise is not one
FIXED = {
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
    "int | None": (int, type(None)),
}


def flat_config(
    shape: DSparkConfig, target: TargetEnds, profile: str, num_anchors: int
) -> dict[str, Any]:
    """config.json: the drafter's backbone as a Qwen3 config, and DSpark's keys, at top level.

    `profile`: `serving` shares the target's embedding and LM head, `full` carries both.
    `num_anchors`: what it was trained with. Raises ConfigError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"export.profile={profile} is not one of {', '.join(PROFILES)}")
    values = shape.to_dict()
    detached, coverage = values.pop("confidence_detached"), values.pop("draft_vocab_coverage")
    if shape.draft_vocab_size is None:
        del values["draft_vocab_size"]
    rope = values.pop("rope_parameters")
    if rope["rope_type"] == "default":  # a target's partial or sectioned rotation is not ours
        rope = {key: rope[key] for key in ("rope_type", "rope_theta")}
    return {
        "architectures": ARCHITECTURES,
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
            **({} if coverage is None else {"draft_vocab_coverage": coverage}),
        },
    }


def conventions(config: dict[str, Any]) -> Iterator[str]:
    """What in a flat config is not as this drafter computes, a sentence each."""
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            yield f"{key} is {config[key]!r}, but only {value!r} is read"
    layer_types = sorted({str(kind) for kind in config.get("layer_types") or []})
    if foreign := [kind for kind in layer_types if kind != "full_attention"]:
        yield f"layer_types has {', '.join(foreign)}, but only full_attention is read"
    anchor_first = config.get("sample_from_anchor")
    if anchor_first is not True:
        # readers disagree on the default, and the wrong one drafts rubbish without an error
        found = "missing" if anchor_first is None else anchor_first
        yield (
            f"sample_from_anchor is {found}, expected true: a drafter whose first slot is a mask "
            "is not supported. If slot 0 of this one holds the anchor (block_size inputs give "
            "block_size drafts), put the key there"
        )


def shape_of(config: dict[str, Any]) -> DSparkConfig:
    """A flat config as DSparkConfig. Raises CheckpointError for keys missing or of other types."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    own = config.get("deepspec") or {}
    known = {
        # the public implementation writes these two only where there is such a head
        "markov_head_type": "vanilla",
        "confidence_head_with_markov": False,
        "draft_vocab_size": None,
        **config,
        "rope_parameters": rope,
        "confidence_detached": own.get("confidence_detached", False),
        "draft_vocab_coverage": own.get("draft_vocab_coverage"),
        "sample_from_anchor": True,  # else `conventions` says so
    }
    names = {field.name: FLAT_NAMES.get(field.name, field.name) for field in fields(DSparkConfig)}
    if missing := [key for key in names.values() if key not in known]:
        raise CheckpointError(f"misses {', '.join(missing)}; export again")
    for field in fields(DSparkConfig):
        expected, key = TYPES.get(str(field.type)), names[field.name]
        if expected and not isinstance(known[key], expected):
            raise CheckpointError(f"{key} is {known[key]!r}, expected {field.type}")
    shape = DSparkConfig.from_dict({name: known[key] for name, key in names.items()})
    if shape.draft_vocab_size == shape.vocab_size:  # as speculators say that it is not reduced
        shape = DSparkConfig.from_dict({**shape.to_dict(), "draft_vocab_size": None})
    return shape
