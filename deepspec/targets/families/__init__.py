"""Which families there are, by the `model_type` of their text config, and what they differ in.

A listed family passes every check of `deepspec check` (tests/targets/test_families.py). One that
only has other sizes needs no line here: what is not listed goes the generic way.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspec.errors import TargetError
from deepspec.targets.families.base import (
    PLAIN_ATTENTION,
    ROWS,
    SNAPSHOT,
    Family,
    Parts,
    attention_kinds,
)
from deepspec.targets.families.deepseek_v4 import DeepseekV4
from deepspec.targets.families.hyperclovax import HyperClovaX

__all__ = [
    "FAMILIES",
    "ROWS",
    "SNAPSHOT",
    "Family",
    "Parts",
    "attention_kinds",
    "find_parts",
    "resolve_rollback",
]


class Windowed(Family):
    """Sliding-window layers among full ones."""

    needs = ("sliding_window", "layer_types")


class Recurrent(Family):
    """Gated delta-rule layers: their state after a token cannot be taken back."""

    rollback = SNAPSHOT
    needs = ("layer_types",)


GENERIC = Family()
FAMILIES: dict[str, Family] = {
    "llama": GENERIC,
    "mistral": GENERIC,
    "qwen3": GENERIC,
    "qwen3_moe": GENERIC,
    "glm4_moe": GENERIC,
    "deepseek_v3": GENERIC,
    "gpt_oss": Windowed(),
    "gemma3_text": Windowed(),
    "gemma4_text": Windowed(),
    "gemma4_unified_text": Windowed(),
    "granite": GENERIC,
    "hyperclovax": HyperClovaX(),
    "qwen3_next": Recurrent(),
    "qwen3_5_text": Recurrent(),
    "qwen3_5_moe_text": Recurrent(),
    "deepseek_v4": DeepseekV4(),
}


def find_parts(model: Any) -> Parts:
    """The parts of a Hugging Face causal LM, of a multimodal one those of its text.

    Raises TargetError when they are not found or the family's config lacks something.
    """
    text_config = model.config.get_text_config()
    family = text_config.model_type
    rules = FAMILIES.get(family, GENERIC)
    rules.check(text_config)
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(backbone, "layers", None)
    output = model.get_output_embeddings()
    if backbone is None or not isinstance(layers, nn.ModuleList) or output is None:
        raise TargetError(
            f"target family {family!r} ({type(model).__name__}): no decoder layers or LM head "
            "found where Hugging Face causal LMs keep them; is target.path a causal language model?"
        )
    if more := sorted({name for name, _ in output.named_parameters()} - {"weight"}):
        raise TargetError(
            f"target family {family!r}: its LM head holds {', '.join(more)} besides its weight, "
            "which no draft layout can carry; choose another target"
        )
    embedding = model.get_input_embeddings()
    return Parts(
        family=family,
        rules=rules,
        text_config=text_config,
        backbone=backbone,
        layers=layers,
        embedding=embedding.weight.detach(),
        head=output.weight.detach(),
        embedding_scale=rules.embedding_scale(text_config, embedding),
    )


def resolve_rollback(wanted: str, model: Any, parts: Parts) -> str | None:
    """How decoding rolls `model` back: `wanted` (target.rollback), by "auto" what its family says.

    None for a family without a proven way. Raises TargetError where `wanted` would decode wrongly.
    """
    kinds = attention_kinds(parts.text_config)
    plain = kinds <= PLAIN_ATTENTION and not getattr(model, "_is_stateful", False)
    if wanted == ROWS and not plain:
        raise TargetError(
            f"target.rollback=rows: target family {parts.family!r} keeps a recurrent or compressed "
            f"state ({', '.join(sorted(kinds))}) that no position can roll back; set "
            "target.rollback=snapshot"
        )
    if wanted != "auto":
        return wanted
    return parts.rules.rollback if plain or parts.rules.rollback == SNAPSHOT else None
