"""config.json of a model and the index of its weights: held to limits before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.json_files import read_as, read_json

# Far above every published model, and far below what fills a memory or takes minutes to build.
MOST = {
    **dict.fromkeys(("block_size", "dspark_block_size", "speculative_tokens"), 1024),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_target_layers"), 4096),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "hc_mult"), 2**16),
    **dict.fromkeys(("qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups"), 2**20),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 2**24),
    **dict.fromkeys(("vocab_size", "draft_vocab_size", "markov_rank", "dspark_markov_rank"), 2**28),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 2**40),
}


def read_model_config(
    file: Path, error: type[DeepSpecError], way_out: str, *, finite: bool = False
) -> dict[str, Any]:
    """Return the object in the config.json `file`; `finite` refuses numbers that are not.

    Raises FileNotFoundError where nothing is there, and `error` with `way_out` for what cannot be
    read and for sizes that no model has, at any depth.
    """
    config = read_json(file, error, way_out)
    for problem in wild_numbers(config, "", finite):
        raise error(f"{file}: {problem}; {way_out}")
    return config


def wild_numbers(value: Any, place: str, finite: bool) -> Iterator[str]:
    """Yield what is wrong with the numbers in `value`, at any depth: sizes that no model has and,
    where they have to be `finite`, those that are not. `place` is where `value` stands."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from wild_numbers(part, f"{place}.{key}".lstrip("."), finite)
    elif isinstance(value, list):
        for part in value:
            yield from wild_numbers(part, place, finite)
    elif isinstance(value, int | float):
        most = MOST.get(place.rpartition(".")[2])
        if finite and isinstance(value, float) and not math.isfinite(value):
            yield f"{place:.100} is {value}, expected a finite number"
        elif most is not None and not value <= most:  # nor is NaN
            yield f"{place:.100} is {value!r:.40}, expected at most {most}"


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def read_weight_map(index: Path, error: type[DeepSpecError], way_out: str) -> dict[str, str]:
    """Return the file of every tensor by the `index` of a model in several files.

    Raises FileNotFoundError where nothing is there, and `error` with `way_out` for what cannot be
    read and for files that do not lie beside the index.
    """
    found = read_as(_Index, index, error, way_out).weight_map
    for file in found.values():
        if Path(file).name != file:
            raise error(f"{index} names {file!r:.100}, which is no file beside it; {way_out}")
    return found
