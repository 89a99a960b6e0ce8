"""Which engines load an export (checkpoint-formats.md, the table of exports).

An engine that refuses says so at start; one that loads the wrong profile or head drafts rubbish
without an error, so the answer belongs beside the files.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Support(NamedTuple):
    """Whether `engine` loads an export, and `why` (or why not)."""

    engine: str
    loads: bool
    why: str


def loads_in(config: dict[str, Any]) -> list[Support]:
    """The answer of every engine for an export with this `config.json` (`flat_config`, or
    `deepseek_v4_config`)."""
    if config["model_type"] == "deepseek_v4":
        why = "reads mtp.* tensors; embedding and LM head are the target's"
        return [
            *(Support(engine, True, why) for engine in ("vLLM", "SGLang", "llama.cpp")),
            Support("deepseek-ai/DeepSpec", False, "reads no mtp.* tensors"),
            Support("this library", True, "reads them alone, and in a target's checkpoint"),
        ]
    return [
        *(Support(engine, *_serving(engine, config)) for engine in ("vLLM", "SGLang", "llama.cpp")),
        Support("deepseek-ai/DeepSpec", *_reference(config)),
        Support("this library", True, "reads every flat export beside its target"),
    ]


def _serving(engine: str, config: dict[str, Any]) -> tuple[bool, str]:
    head, full = config["markov_head_type"], config["deepspec"]["profile"] == "full"
    if config["markov_rank"] == 0:
        return False, "knows no drafter of this kind without a Markov head (rank 0)"
    if head != "vanilla" and engine != "SGLang":
        return False, f"reads vanilla Markov heads only, not {head} ones"
    if engine == "llama.cpp" and full and not config["deepspec"]["target_tied"]:
        return (
            False,
            "goes wrong with embed_tokens when the target's LM head is untied: use serving",
        )
    if full:
        return True, "carries an embedding and LM head of its own"
    return True, "takes embedding and LM head from the target"


def _reference(config: dict[str, Any]) -> tuple[bool, str]:
    if config["deepspec"]["profile"] == "full":
        return True, "evaluates it with the embedding and LM head inside"
    return False, "needs embed_tokens and lm_head inside: use the full profile"
