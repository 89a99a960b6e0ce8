"""The flat Qwen3 layout: what vLLM, SGLang, llama.cpp and the public DeepSpec read.

config.json is a Qwen3 config of the *drafter's* backbone with DSpark's keys beside it, the tensors
have the drafter's own parameter names. Other layouts of DSpark drafters are described by turning
their config into this one (`speculators`), so what is said of a config here holds for them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from deepspec import __version__
from deepspec.drafters.dspark.config import DSparkConfig
from deepspec.drafters.dspark.model import DSparkDrafter
from deepspec.drafters.shape import DrafterShape
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export.files import deepspec_of
from deepspec.export.names import public_name
from deepspec.export.tensors import Form
from deepspec.targets import TargetEnds

PROFILES = ("serving", "full")
ARCHITECTURES = ["Qwen3DSparkModel"]
DSPARK = Form(DSparkDrafter)
Shape = TypeVar("Shape", bound=DrafterShape)

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
POSITIVE = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "block_size",
    "max_position_embeddings",
)
# what JSON may hold for a field of each type
TYPES: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) in (int, float),
    "str": lambda value: type(value) is str,
    "tuple[int, ...]": lambda value: _list_of(int, value),
    "dict[str, Any]": lambda value: type(value) is dict,
    "int | None": lambda value: value is None or type(value) is int,
    "float | None": lambda value: value is None or type(value) in (int, float),
}


def _list_of(kind: type, value: Any) -> bool:
    return type(value) is list and all(type(element) is kind for element in value)


def flat_config(
    shape: DSparkConfig, target: TargetEnds, profile: str, num_anchors: int
) -> dict[str, Any]:
    """config.json: the drafter's backbone as a Qwen3 config, and DSpark's keys, at top level.

    `profile`: `serving` shares the target's embedding and LM head, `full` carries both.
    `num_anchors`: what it was trained with. Raises ConfigError for an unknown profile.
    """
    values = shape.to_dict()
    detached = values.pop("confidence_detached")
    del values["draft_vocab_coverage"]
    if shape.draft_vocab_size is None:
        del values["draft_vocab_size"]
    return {
        "architectures": ARCHITECTURES,
        **FIXED,
        **{FLAT_NAMES.get(name, name): value for name, value in values.items()},
        **rotation_of(shape),
        "layer_types": ["full_attention"] * shape.num_layers,
        "max_window_layers": shape.num_layers,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": getattr(target.config, "bos_token_id", None),
        "eos_token_id": getattr(target.config, "eos_token_id", None),
        "num_anchors": num_anchors,
        "dtype": "bfloat16",
        "deepspec": {**own_part(shape, target, profile), "confidence_detached": detached},
    }


def rotation_of(shape: Any) -> dict[str, Any]:
    """The keys of a backbone's config that say how a drafter of `shape` rotates."""
    rope = dict(shape.rope_parameters)
    if rope["rope_type"] == "default":  # a target's partial or sectioned rotation is not ours
        rope = {key: rope[key] for key in ("rope_type", "rope_theta")}
    # the second is where readers older than rope_parameters look
    return {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}


def rotation_in(config: dict[str, Any]) -> Any:
    """The rotation in a backbone's config, also in older spellings; no dictionary where the file is
    wrong."""
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict):
        rope = {"rope_type": rope.get("type", "default"), **rope}
        rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
        rope.pop("type", None)
    return rope


def own_part(shape: Any, target: TargetEnds, profile: str) -> dict[str, Any]:
    """What stands under `deepspec`: for this library alone. Raises ConfigError for a profile that
    there is not."""
    if profile not in PROFILES:
        raise ConfigError(f"export.profile={profile} is not one of {', '.join(PROFILES)}")
    coverage = shape.draft_vocab_coverage
    return {
        "version": __version__,
        "profile": profile,
        "target": public_name(target.name),
        "target_tied": target.tied,
        "scaled_embedding": target.embedding_scale != 1,
        "identity": target.identity,
        **({} if coverage is None else {"draft_vocab_coverage": coverage}),
    }


def conventions(config: dict[str, Any]) -> Iterator[str]:
    """What in a flat config is not as this drafter computes, a sentence each."""
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            yield f"{key} is {config[key]!r}, but only {value!r} is read"
    layer_types = config.get("layer_types") or []
    if not _list_of(str, layer_types):
        yield f"layer_types is {layer_types!r}, expected a list of names"
    elif foreign := sorted(set(layer_types) - {"full_attention"}):
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


def checked_shape(config: dict[str, Any], file: Path) -> DSparkConfig:
    """The shape in a flat config that was read from `file`. Raises CheckpointError."""
    for problem in conventions(config):
        raise CheckpointError(f"{file}: {problem}")
    try:
        shape = shape_of(config, DSparkConfig)
        for problem in size_faults(shape):
            raise CheckpointError(problem)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return shape


def size_faults(shape: DSparkConfig) -> Iterator[str]:
    """Sizes with which no drafter can work, a sentence each."""
    if not 0 <= shape.mask_token_id < shape.vocab_size:
        yield f"mask_token_id {shape.mask_token_id} is outside the vocabulary of {shape.vocab_size}"
    if shape.markov_rank < 0:
        yield f"markov_rank is {shape.markov_rank}, expected at least 0"


def shape_of(config: dict[str, Any], kind: type[Shape]) -> Shape:
    """A flat config as a shape of this `kind`. Raises CheckpointError for keys missing or of other
    types."""
    own = deepspec_of(config)
    known = {
        # the public implementation writes these two only where there is such a head
        "markov_head_type": "vanilla",
        "confidence_head_with_markov": False,
        "draft_vocab_size": None,
        **config,
        "rope_parameters": rotation_in(config),
        "confidence_detached": own.get("confidence_detached", False),
        "draft_vocab_coverage": own.get("draft_vocab_coverage"),
        "sample_from_anchor": True,  # else `conventions` says so
    }
    names = {field.name: FLAT_NAMES.get(field.name, field.name) for field in fields(kind)}
    if missing := [key for key in names.values() if key not in known]:
        raise CheckpointError(f"misses {', '.join(missing)}; export again")
    for field in fields(kind):
        key = names[field.name]
        if not TYPES[str(field.type)](known[key]):
            raise CheckpointError(f"{key} is {known[key]!r}, expected {field.type}")
    for key in POSITIVE:
        if known[key] <= 0:
            raise CheckpointError(f"{key} is {known[key]}, expected at least 1")
    size, whole = known["draft_vocab_size"], known["vocab_size"]
    if size is not None and not 0 < size <= whole:
        raise CheckpointError(f"draft_vocab_size is {size}, expected 1 to vocab_size={whole}")
    if size == whole:  # how the speculators layout says that it is not reduced
        known["draft_vocab_size"] = None
    return kind.from_dict({name: known[key] for name, key in names.items()})
