"""What every trained drafter's shape holds, resolved against one target."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeVar

from deepspec.config.schema import DrafterConfig
from deepspec.errors import CheckpointError, ConfigError
from deepspec.json_files import as_kind
from deepspec.model_files import wild_numbers
from deepspec.targets.attributes import common

S = TypeVar("S")

# rotations of a target of which its drafters take the base alone
BASE_ALONE = ("default", "proportional", "longrope", "llama3", "dynamic")

POSITIVE = (
    *("hidden_size", "vocab_size", "num_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "moe_intermediate_size", "block_size", "longest"),
)


@dataclass(frozen=True)
class DrafterShape:
    """Everything needed to build a module of decoder layers; written into every checkpoint.

    `hidden_size` is the target's: embedding and LM head are shared with it. `target_layer_ids`
    name a decoder layer's output (k -> hidden_states[k + 1]). `block_size` drafts a round.
    """

    hidden_size: int
    vocab_size: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    block_size: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    initializer_range: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        values["target_layer_ids"] = list(self.target_layer_ids)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises CheckpointError, as `read_shape`."""
        return read_shape(cls, values)


def read_shape(kind: type[S], values: dict[str, Any]) -> S:
    """Return the shape of the class `kind` that its `to_dict` made `values` of.

    Raises CheckpointError naming keys that are missing or unknown, and values of another type or
    that no drafter has.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    problems = [f"unexpected keys {unknown}"] if unknown else []
    problems += wild_numbers(values, "", finite=True)
    sizes = [(name, values[name]) for name in POSITIVE if isinstance(values.get(name), int)]
    problems += [f"{name} is {size}, expected 1 or more" for name, size in sizes if size < 1]
    try:
        shape = as_kind(kind, {name: value for name, value in values.items() if name in known})
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"the drafter config is damaged, or of another version: {'; '.join(problems)}"
        )
    return shape


def resolve_shape(config: DrafterConfig, target: Any) -> dict[str, Any]:
    """The fields of DrafterShape for `target` (a `deepspec.targets` Target); nulls taken from it.

    Raises ConfigError for values that do not fit the target.
    """
    text = target.config
    heads = int(config.num_attention_heads or text.num_attention_heads)
    key_value_heads = int(
        config.num_key_value_heads or getattr(text, "num_key_value_heads", None) or heads
    )
    if heads % key_value_heads:
        raise ConfigError(
            f"drafter.num_attention_heads={heads} is not a multiple of "
            f"drafter.num_key_value_heads={key_value_heads}"
        )
    return {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "target_layer_ids": tuple(target.layer_ids),
        "num_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": config.head_dim or common(text, "head_dim") or target.hidden_size // heads,
        "intermediate_size": config.intermediate_size or text.intermediate_size,
        "block_size": config.block_size,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "rope_parameters": _rope_parameters(text),
        "max_position_embeddings": text.max_position_embeddings,
        "initializer_range": getattr(text, "initializer_range", 0.02),
    }


def resolve_draft_vocab_size(size: int | None, whole: int) -> int | None:
    """None where it is the `whole` vocabulary. Raises ConfigError where it is more."""
    if size is not None and size > whole:
        raise ConfigError(
            f"drafter.draft_vocab_size={size} is more than the target's vocabulary of {whole}; "
            "choose fewer, or null for all of them"
        )
    return None if size == whole else size


def _rope_parameters(text: Any) -> dict[str, Any]:
    """The target's rotary parameters; of a table a kind of layer, those of its main kind.

    A drafter rotates whole heads by one position and one table: no layout can say a part of a head
    (Gemma 4), sections with positions of their own (Qwen3.5's mrope), or a second table for long
    texts (longrope), for which engines also have different rules. Such a target gives the base. So
    does one with a scaling that llama.cpp's converter drops from a drafter: the drafter learns the
    plain rotation as well, and then every engine drafts as it was trained.
    """
    parameters = dict(getattr(text, "rope_parameters", None) or {})
    for kind in ("full_attention", "main"):
        if isinstance(parameters.get(kind), dict):
            parameters = dict(parameters[kind])
    parameters.setdefault("rope_theta", getattr(text, "rope_theta", 10000.0))
    rope_type = parameters.setdefault("rope_type", "default")
    if rope_type in BASE_ALONE:
        return {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    ours = parameters.keys() - {"partial_rotary_factor", "mrope_section", "mrope_interleaved"}
    return {key: parameters[key] for key in sorted(ours)}
