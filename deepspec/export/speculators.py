"""The layout of vLLM's speculators library: the one in which a draft vocabulary is served.

Here is what its algorithms have in common, and DSpark; EAGLE-3 is in `eagle3`.

config.json keeps the drafter's backbone apart, as a Qwen3 config under `transformer_layer_config`;
weights and their names are those of the flat layout. `aux_hidden_state_layer_ids` count hidden
states, of which the first is the embedding: our layer id k (a block's output) is k + 1 there.

From the public sources of speculators, vLLM and llama.cpp: both `DSparkSpeculator` (the config's
own default) and `DSparkDraftModel` (what `save_pretrained` puts there) stand for it; its
`transformer_layer_config` is written without the values that are Transformers' defaults; vLLM wants
`lm_head.weight` and `d2t` with a reduced vocabulary and skips `t2d`; checkpoints without
`sample_from_anchor` have a mask in slot 0. Not verified, for want of one of their checkpoints:
whether the LM head's rows for a reduced vocabulary are always the target's own. Where they are not,
loading beside a target refuses, as drafting here uses the target's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from deepspec.drafters.dspark.config import DSparkConfig
from deepspec.errors import CheckpointError, first_line
from deepspec.export import flat
from deepspec.export.files import deepspec_of
from deepspec.export.names import public_name
from deepspec.targets import TargetEnds

ARCHITECTURES = ("DSparkSpeculator", "DSparkDraftModel")
BACKBONE, AUXILIARY = "transformer_layer_config", "aux_hidden_state_layer_ids"
# what stands beside the backbone, under the same name as in a flat config
BESIDE = (
    "block_size",
    "mask_token_id",
    "sample_from_anchor",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "num_anchors",
    "tie_word_embeddings",
    "dtype",
)
# what is described otherwise here
APART = (*BESIDE, "architectures", "target_layer_ids", "num_target_layers", "draft_vocab_size")


def speculators_config(
    shape: DSparkConfig, target: TargetEnds, profile: str, num_anchors: int
) -> dict[str, Any]:
    """config.json; arguments as of `flat_config`."""
    whole = flat.flat_config(shape, target, profile, num_anchors)
    own = whole.pop("deepspec")
    backbone = {key: value for key, value in whole.items() if key not in APART}
    return {
        "architectures": ["DSparkSpeculator"],
        **library_part("dspark", shape.block_size, target),
        BACKBONE: {**backbone, "tie_word_embeddings": False, "dtype": "bfloat16"},
        "draft_vocab_size": shape.draft_vocab_size or shape.vocab_size,
        AUXILIARY: [layer_id + 1 for layer_id in shape.target_layer_ids],
        **{key: whole[key] for key in BESIDE},
        "deepspec": {
            **own,
            "target_layer_ids": list(shape.target_layer_ids),
            "num_target_layers": shape.num_target_layers,
        },
    }


def library_part(algorithm: str, tokens: int, target: TargetEnds) -> dict[str, Any]:
    """The keys that the library's configs have in common, whatever the algorithm; `tokens` are
    drafted a round."""
    return {
        "speculators_model_type": algorithm,
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": public_name(target.name),
                "architectures": list(getattr(target.config, "architectures", None) or []),
            },
        },
    }


def as_flat(config: dict[str, Any], num_target_layers: int | None = None) -> dict[str, Any]:
    """The same drafter as a flat config says it; arguments as of `opened`."""
    return {
        **opened(config, AUXILIARY, {"qwen3": Qwen3Config}, num_target_layers),
        # the library's defaults, written or not
        "markov_rank": 256,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        **{key: config[key] for key in BESIDE if key in config},
        "architectures": flat.ARCHITECTURES,
    }


def opened(
    config: dict[str, Any],
    auxiliary: str,
    backbones: Mapping[str, type[PreTrainedConfig]],
    num_target_layers: int | None = None,
) -> dict[str, Any]:
    """What a flat config says of the backbone, what Transformers knows by heart filled in.

    `auxiliary`: the key of the captured layers; `backbones`: what may stand under
    `transformer_layer_config` by its model_type, the first where it does not say.
    `num_target_layers` of the target, where it is at hand: the layout itself does not say it, so
    else it is 0. Raises CheckpointError where parts are missing.
    """
    backbone, captured = config.get(BACKBONE), config.get(auxiliary)
    if not isinstance(backbone, dict):
        raise CheckpointError(f"{BACKBONE} is missing or no object; export again")
    if not (type(captured) is list and captured and all(type(i) is int for i in captured)):
        raise CheckpointError(f"{auxiliary} is missing or no list of ids; export again")
    model_type = backbone.get("model_type", next(iter(backbones)))
    if model_type not in list(backbones):
        known = " and ".join(map(repr, backbones))
        raise CheckpointError(f"{BACKBONE}.model_type is {model_type!r}, but only {known} is read")
    try:
        whole = backbones[model_type](**backbone).to_dict()
    except Exception as error:  # Transformers looks at sizes and rotations in many ways
        raise CheckpointError(
            f"{BACKBONE} is no {model_type} config: {first_line(error)}"
        ) from None
    own = deepspec_of(config)
    recorded = own.get("num_target_layers")
    return {
        **whole,
        "target_layer_ids": [index - 1 for index in captured],
        "num_target_layers": recorded if type(recorded) is int else num_target_layers or 0,
        "draft_vocab_size": config.get("draft_vocab_size"),
        "deepspec": own,
    }


def dspark_serving_faults(config: dict[str, Any]) -> Iterator[str]:
    """`serving_faults` of a DSpark drafter."""
    yield from serving_faults(config, "dspark", AUXILIARY)
    tokens, size = drafted(config), config.get("block_size")
    if config.get("sample_from_anchor") is True and tokens not in (None, size):
        yield (
            f"speculative_tokens is {tokens}, but a block whose first slot holds the anchor gives "
            f"block_size={size} drafts"
        )


def serving_faults(config: dict[str, Any], algorithm: str, auxiliary: str) -> Iterator[str]:
    """What engines look for in this layout and would not find, a sentence each; `auxiliary` as of
    `opened`."""
    found = config.get("speculators_model_type")
    if found != algorithm:
        yield f"speculators_model_type is {found!r}, not {algorithm!r}"
    if drafted(config) is None:
        yield "speculators_config.proposal_methods[0].speculative_tokens is missing: vLLM reads it"
    if not verifier_of(config):
        yield "speculators_config.verifier.name_or_path is missing: vLLM reads it"
    recorded, found = deepspec_of(config).get("target_layer_ids"), config.get(auxiliary)
    if type(recorded) is list and all(type(layer_id) is int for layer_id in recorded):
        expected = [layer_id + 1 for layer_id in recorded]
        if found != expected:
            yield (
                f"{auxiliary} is {found}, expected {expected}: the target's layers {recorded}, "
                "each plus one, as hidden state 0 is the embedding"
            )


def drafted(config: dict[str, Any]) -> Any:
    """What stands for the number of drafts a round; None where nothing does."""
    methods = _object(config, "speculators_config").get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    return first.get("speculative_tokens") if isinstance(first, dict) else None


def verifier_of(config: dict[str, Any]) -> str:
    """The target that a config names; "" where it names none."""
    name = _object(_object(config, "speculators_config"), "verifier").get("name_or_path")
    return name if isinstance(name, str) else ""


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    found = holder.get(key)
    return found if isinstance(found, dict) else {}
