"""EAGLE-3 drafters as they are mostly published: a flat Llama config, and what SGLang reads.

config.json is the layer's config (`LlamaForCausalLMEagle3`) with `draft_vocab_size` and
`eagle_config` beside it; tensors are the drafter's own, the layer's under `midlayer.`. All that is
said of a config in `eagle3` holds here, of the one that `as_speculators` makes.

Read in the public sources of SGLang (`llama_eagle3.py`, its workers, `set_eagle3_layers_to_capture`
of targets), vLLM (`llama_eagle3.py`, registry, what configures the captured layers), llama.cpp's
conversion, and SpecForge's configs:
- The layer computes as in `eagle3`; SGLang knows no `norm_before_residual`, and the others take a
  missing one for false here. None of the three has normed heads for it.
- LM head: SGLang shares the target's where `draft_vocab_size` is null (the key must be there). Else
  it wants `lm_head.weight` inside and starts without it too, on random values. So null stands
  exactly where no head is inside; vLLM and llama.cpp go by the tensor. `tie_word_embeddings` true
  would make the embedding the head.
- Embedding: SGLang always takes the target's, as its files have it, and drops one inside; vLLM and
  llama.cpp take the one inside, if there is one.
- Captured layers: under `eagle_config` SGLang counts blocks (our ids) and adds one itself; without
  them it captures hidden states 2, n/2 and n - 3 of n layers. By two merged changes it counts
  hidden states of gpt-oss, and of DeepSeek V3 and what computes like it unless the first is 1: for
  these it is not promised. vLLM reads the key at top level alone and counts hidden states (our ids
  plus one), else takes the same default. Both keys are written. How many layers there are, both
  learn under `eagle_config`.
- llama.cpp was read as in `eagle3`; a change of July 2026 is said to read the top-level key, and
  was not read itself.
- How many tokens are drafted a round, it does not say: ours under `deepspec`, else the default.

Not verified: any of it by running; a published head's own files; that releases have these sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.base import Drafter
from deepspec.drafters.eagle3 import Eagle3Config
from deepspec.errors import CheckpointError
from deepspec.export.eagle3 import (
    AUXILIARY,
    BESIDE,
    drafter_faults,
    eagle3_config,
    eagle3_form,
    eagle3_shape,
    eagle3_traits,
    load_eagle3,
    unread,
)
from deepspec.export.engines import Traits
from deepspec.export.files import CONFIG, Headers, deepspec_of
from deepspec.export.speculators import BACKBONE
from deepspec.export.tensors import HEAD
from deepspec.targets import TargetEnds

ARCHITECTURES = ("LlamaForCausalLMEagle3",)
EAGLE_CONFIG = "eagle_config"
# keys that are not the layer's
APART = (
    "architectures",
    EAGLE_CONFIG,
    AUXILIARY,
    *BESIDE,
    "target_hidden_size",
    "draft_vocab_size",
    "deepspec",
)
# targets whose layers SGLang counts otherwise
OTHERWISE = (
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "glm4_moe_lite",
)


FLAT_EAGLE3 = eagle3_form("midlayer.")


def flat_eagle3_config(
    shape: Eagle3Config, target: TargetEnds, profile: str, num_anchors: int
) -> dict[str, Any]:
    """config.json; arguments as of `flat_config`."""
    whole = eagle3_config(shape, target, profile, num_anchors)
    layer = whole[BACKBONE]
    del layer["layer_types"], layer["use_sliding_window"]  # no Llama has them
    head_inside = profile == "full" or target.logit_scale != 1
    return {
        "architectures": list(ARCHITECTURES),
        **layer,
        "draft_vocab_size": shape.draft_vocab_size or (shape.vocab_size if head_inside else None),
        "target_hidden_size": shape.hidden_size,
        EAGLE_CONFIG: {AUXILIARY: list(shape.target_layer_ids), "use_aux_hidden_state": True},
        AUXILIARY: whole[AUXILIARY],
        "deepspec": {
            **whole["deepspec"],
            "block_size": shape.block_size,
            "target_type": target.config.model_type,
        },
    }


def as_speculators(config: dict[str, Any]) -> dict[str, Any]:
    """The same drafter as a config of the speculators layout says it, without what is for engines
    alone."""
    own, eagle = deepspec_of(config), _eagle_config(config)
    tokens = own.get("block_size", DrafterConfig.block_size)
    return {
        BACKBONE: {key: value for key, value in config.items() if key not in APART},
        **{key: eagle.get(key, config.get(key, value)) for key, value in BESIDE.items()},
        "target_hidden_size": config.get("target_hidden_size"),
        AUXILIARY: _hidden_states(config),
        "draft_vocab_size": config.get("draft_vocab_size"),
        "speculators_config": {"proposal_methods": [{"speculative_tokens": tokens}]},
        "deepspec": own,
    }


def _eagle_config(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get(EAGLE_CONFIG)
    return found if isinstance(found, dict) else {}


def _hidden_states(config: dict[str, Any]) -> Any:
    """What stands for the captured hidden states, counted from the embedding; None: nothing."""
    blocks, states = _eagle_config(config).get(AUXILIARY), config.get(AUXILIARY)
    if states is None and type(blocks) is list and all(type(block) is int for block in blocks):
        return [block + 1 for block in blocks]
    return blocks if states is None else states


# --------------------------------------------------------------------------------------- reading


def flat_eagle3_shape(folder: Path, config: dict[str, Any]) -> Eagle3Config:
    """As of `eagle3_shape`."""
    _require_read(folder, config)
    return eagle3_shape(folder, as_speculators(config))


def load_flat_eagle3(folder: Path, config: dict[str, Any], target: TargetEnds | None) -> Drafter:
    """The drafter; see `load_tensors`."""
    _require_read(folder, config)
    return load_eagle3(folder, as_speculators(config), target, FLAT_EAGLE3)


def _require_read(folder: Path, config: dict[str, Any]) -> None:
    for problem in _unread(config):
        raise CheckpointError(f"{folder / CONFIG}: {problem}")


def _unread(config: dict[str, Any]) -> Iterator[str]:
    """As of `unread`."""
    yield from unread(as_speculators(config))
    eagle = _eagle_config(config)
    switches = ((config, "tie_word_embeddings", False), (eagle, "use_aux_hidden_state", True))
    for holder, key, value in switches:
        if holder.get(key, value) != value:
            yield f"{key} is {holder[key]!r}, but only {value!r} is read"
    if _hidden_states(config) is None:
        yield (
            f"{AUXILIARY} is missing, so engines capture hidden states 2, n/2 and n - 3 of n "
            f"layers: write [1, n/2 - 1, n - 4] under {EAGLE_CONFIG}"
        )


# ------------------------------------------------------------------------------------ inspection


def flat_eagle3_faults(config: dict[str, Any], headers: Headers | None) -> Iterator[str]:
    """What no engine should be given, a sentence each (no `headers`: they are unreadable)."""
    size, inside = config.get("draft_vocab_size"), headers is not None and HEAD in headers
    if "draft_vocab_size" not in config:
        yield "draft_vocab_size is missing: SGLang reads it (null: the target's LM head)"
    elif headers is not None and size is None and inside:
        yield f"draft_vocab_size is null, but {HEAD} is inside: SGLang drafts with the target's"
    elif headers is not None and size is not None and not inside:
        yield f"{HEAD} is missing, but draft_vocab_size is {size!r}: SGLang drafts with random rows"
    if not isinstance(config.get(EAGLE_CONFIG, {}), dict):
        yield f"{EAGLE_CONFIG} is {config[EAGLE_CONFIG]!r:.60}, expected an object"
    if config.get("model_type") != "llama":
        yield f"model_type is {config.get('model_type')!r:.60}, but only 'llama' is read"
        return
    blocks, states = _eagle_config(config).get(AUXILIARY), config.get(AUXILIARY)
    if None not in (blocks, states) and states != _hidden_states({**config, AUXILIARY: None}):
        yield (
            f"{AUXILIARY} is {states!r:.60}, and {blocks!r:.60} under {EAGLE_CONFIG}: engines "
            "capture different layers unless each is one more than there"
        )
    if _hidden_states(config) is not None:
        yield from drafter_faults(as_speculators(config), headers, FLAT_EAGLE3)


def flat_eagle3_traits(config: dict[str, Any], headers: Headers) -> Traits:
    """What engines' answers depend on; a key that is missing is a fault anyway."""
    traits = eagle3_traits(as_speculators(config), headers)
    assert traits.eagle3 is not None
    counted = _eagle_config(config).get(AUXILIARY) is not None
    named = {"vLLM": config.get(AUXILIARY) is not None, "SGLang": counted}
    eagle3 = replace(
        traits.eagle3,
        unread=next(_unread(config), None),
        named=tuple(engine for engine, there in named.items() if there),
        counted=counted,
        sglang=_not_in_sglang(config),
    )
    return replace(traits, layout="flat", eagle3=eagle3)


def _not_in_sglang(config: dict[str, Any]) -> str | None:
    own = deepspec_of(config)
    if own.get("target_type") in OTHERWISE:
        return f"counts the layers of {own['target_type']} targets otherwise"
    if own.get("scaled_embedding") is True:
        return "takes the target's embedding unscaled, and this target scales it"
    return None
