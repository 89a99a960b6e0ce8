"""EAGLE-3 drafters in the layout of vLLM's speculators library.

config.json keeps the layer apart, as a Llama config under `transformer_layer_config`, or as a Qwen3
config where its heads are normed. Tensors are the drafter's own, the layer's under `layers.0.`;
embedding, LM head, `d2t` and `t2d` as in every layout. `eagle_aux_hidden_state_layer_ids` count
hidden states, the first of which is the embedding: our layer id k (a block's output) is k + 1.

Read in the public sources of speculators, vLLM (`llama_eagle3.py`, `qwen3_eagle3.py`), llama.cpp
and SGLang (`llama_eagle3.py`):
- The pair of token x_{t+1} and feature g_t stands at position t, halves are rotated against each
  other, and a slot hands its output before the last norm to the next: as here.
- vLLM takes a missing `norm_before_residual` for true and llama.cpp for false, so it is written,
  and so are the later switches (`norm_before_fc`, `fc_norm`, `norm_output`): all false.
- vLLM goes by `speculators_model_type` and by the layer's `model_type`, captures what the config
  names (of targets of some families), and takes from the target what is not inside. Its Llama layer
  reads three captured layers, its Qwen3 layer any number.
- llama.cpp goes by `architectures`, knows no normed heads, and captures hidden states 2, n/2 and
  n - 3 of n layers, whatever the config names.
- SGLang reads EAGLE-3 under a flat config only: `eagle3_flat`, described by turning it into this.

Not verified: any of it by running; whether llama.cpp captures what the config names by now.
EAGLE-3 drafters of others mostly have an LM head that was trained with them, and other switches:
engines load these, this library does not, as drafting here uses the target's head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen3Config

from deepspec.drafters.base import Drafter
from deepspec.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from deepspec.errors import CheckpointError
from deepspec.export.engines import Eagle3Traits, Traits
from deepspec.export.files import CONFIG, Headers, deepspec_of
from deepspec.export.flat import own_part, rotation_of, shape_of
from deepspec.export.inspection import layer_faults, tensor_faults, traits_of
from deepspec.export.speculators import (
    BACKBONE,
    drafted,
    library_part,
    opened,
    serving_faults,
)
from deepspec.export.tensors import Form, load_tensors
from deepspec.targets import TargetEnds

ARCHITECTURES = ("Eagle3Speculator", "Eagle3DraftModel")
AUXILIARY = "eagle_aux_hidden_state_layer_ids"
LAYERS = {"llama": LlamaConfig, "qwen3": Qwen3Config}  # without and with normed heads
OUTSIDE = ("fc.weight", "norm.weight", "d2t")  # of the layer
# how a drafter here computes: beside the layer's config, and in it
BESIDE = {
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}
WITHIN = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def eagle3_form(layer: str) -> Form:
    """`layer`: what stands before the names of the layer's tensors."""
    return Form(Eagle3Drafter, lambda name: name if name in OUTSIDE else layer + name)


EAGLE3 = eagle3_form("layers.0.")


def eagle3_config(
    shape: Eagle3Config, target: TargetEnds, profile: str, _num_anchors: int
) -> dict[str, Any]:
    """config.json; arguments as of `flat_config`."""
    layer = {
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "initializer_range": shape.initializer_range,
        **rotation_of(shape),
        **WITHIN,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": getattr(target.config, "bos_token_id", None),
        "eos_token_id": getattr(target.config, "eos_token_id", None),
        "dtype": "bfloat16",
    }
    return {
        "architectures": [ARCHITECTURES[0]],
        **library_part("eagle3", shape.block_size, target),
        BACKBONE: layer,
        "draft_vocab_size": shape.draft_vocab_size or shape.vocab_size,
        **BESIDE,
        "target_hidden_size": shape.hidden_size,
        AUXILIARY: [layer_id + 1 for layer_id in shape.target_layer_ids],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "deepspec": {
            **own_part(shape, target, profile),
            "target_layer_ids": list(shape.target_layer_ids),
            "num_target_layers": shape.num_target_layers,
        },
    }


# --------------------------------------------------------------------------------------- reading


def eagle3_shape(
    folder: Path, config: dict[str, Any], num_target_layers: int | None = None
) -> Eagle3Config:
    """The shape that a config.json describes; `num_target_layers` as of `opened`.

    Raises CheckpointError for what is missing, and for layers that compute otherwise than here.
    """
    try:
        for problem in unread(config):
            raise CheckpointError(problem)
        return _shape(config, num_target_layers)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def load_eagle3(
    folder: Path, config: dict[str, Any], target: TargetEnds | None, form: Form = EAGLE3
) -> Drafter:
    """The drafter; see `load_tensors`."""
    layers = None if target is None else target.num_layers
    shape = eagle3_shape(folder, config, layers)
    return load_tensors(form, folder, config, shape, target)


def unread(config: dict[str, Any]) -> Iterator[str]:
    """What of an export engines may well compute, but this library does not, a sentence each."""
    layer = config.get(BACKBONE)
    # layers that are not counted are as many as Transformers thinks
    layer = {"num_hidden_layers": None, **layer} if isinstance(layer, dict) else {}
    for holder, known in ((config, BESIDE), (layer, WITHIN)):
        for key, value in known.items():
            if holder.get(key, value) != value:
                yield f"{key} is {holder[key]!r}, but only {value!r} is read"
    kinds = layer.get("layer_types")
    if kinds not in (None, ["full_attention"]):
        yield f"layer_types is {kinds!r:.60}, but only full_attention is read"
    size = layer.get("hidden_size")
    if config.get("target_hidden_size") not in (None, size):
        yield f"target_hidden_size is {config['target_hidden_size']!r}, but only {size} is read"


def _shape(config: dict[str, Any], num_target_layers: int | None) -> Eagle3Config:
    whole = opened(config, AUXILIARY, LAYERS, num_target_layers)
    whole["block_size"] = drafted(config)
    whole["qk_norm"] = whole["model_type"] == "qwen3"
    return shape_of(whole, Eagle3Config)


# ------------------------------------------------------------------------------------ inspection


def eagle3_faults(config: dict[str, Any], headers: Headers | None) -> Iterator[str]:
    """What no engine should be given, a sentence each (no `headers`: they are unreadable)."""
    yield from serving_faults(config, "eagle3", AUXILIARY)
    if "norm_before_residual" not in config:
        yield "norm_before_residual is missing: engines disagree on what that means"
    yield from drafter_faults(config, headers)


def drafter_faults(
    config: dict[str, Any], headers: Headers | None, form: Form = EAGLE3
) -> Iterator[str]:
    """Faults of the drafter that a config describes, and of the tensors beside it."""
    try:
        shape = _shape(config, None)
    except CheckpointError as error:
        yield str(error)
        return
    yield from layer_faults(shape.target_layer_ids, shape.num_target_layers)
    if shape.block_size < 1:
        yield f"speculative_tokens is {shape.block_size}, expected at least 1"
    if headers is not None and not any(unread(config)):
        yield from tensor_faults(form, headers, shape)


def eagle3_traits(config: dict[str, Any], headers: Headers) -> Traits:
    """What engines' answers depend on; a key that is missing is a fault anyway."""
    layer, own = config.get(BACKBONE), deepspec_of(config)
    layer = layer if isinstance(layer, dict) else {}
    captured, layers = config.get(AUXILIARY), own.get("num_target_layers")
    eagle3 = Eagle3Traits(
        qk_norm=layer.get("model_type") == "qwen3",
        captured=tuple(captured) if isinstance(captured, list) else (),
        num_target_layers=layers if type(layers) is int else 0,
        unread=next(unread(config), None),
    )
    flat = {**layer, "draft_vocab_size": config.get("draft_vocab_size"), "deepspec": own}
    return replace(traits_of("speculators", flat, headers), eagle3=eagle3)
