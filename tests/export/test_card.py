"""The model card and the engines it names.

Known to be right by: the table of the layout's description, row by row, written out here; a YAML
parser reading the head; and the commands' own syntax (JSON inside vLLM's option).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepspec.config.schema import DataConfig, RunConfig, TargetConfig, TrainingConfig, as_dict
from deepspec.drafters.dspark import DSparkConfig
from deepspec.export import LAYOUTS, Traits, loads_in, model_card
from deepspec.export.files import headers_of
from deepspec.export.names import public_name
from deepspec.targets import Target
from tests.export.conftest import make_drafter

ACCEPTANCE = "| benchmark | T | accepted length |\n|---|---|---|\n| gsm8k | 0 | 3.21 |"
RUN = as_dict(
    RunConfig(
        recipe="tiny",
        out="runs/tiny",
        target=TargetConfig(path="x"),
        data=DataConfig(path=["/home/me/secret/train.jsonl", "owner/prompts"]),
        training=TrainingConfig(anchors_per_sample=32),
    )
)


Parts = tuple[DSparkConfig, dict[str, Any], Traits]


def parts_of(
    target: Target, kind: str, profile: str, tied: bool = True, layout: str = "flat", size: int = 0
) -> Parts:
    """What a card is made of: shape, config.json, traits."""
    drafter, own = make_drafter(target, kind, draft_vocab_size=size or None), LAYOUTS[layout]
    config = own.config(drafter.config, target, profile, 32)
    config["deepspec"]["target_tied"] = tied
    config["deepspec"]["target"] = "Qwen/Qwen3-4B"
    headers = headers_of(own.tensors(drafter, target, profile))
    return drafter.config, config, own.traits(config, headers)


@pytest.mark.parametrize(
    ("kind", "profile", "tied", "engines"),
    [
        ("vanilla", "serving", True, {"vLLM", "SGLang", "llama.cpp"}),
        ("vanilla", "serving", False, {"vLLM", "SGLang", "llama.cpp"}),
        ("vanilla", "full", True, {"vLLM", "SGLang", "llama.cpp", "deepseek-ai/DeepSpec"}),
        ("vanilla", "full", False, {"vLLM", "SGLang", "deepseek-ai/DeepSpec"}),
        ("gated", "serving", True, {"SGLang"}),
        ("gated", "full", True, {"SGLang", "deepseek-ai/DeepSpec"}),
        ("rnn", "full", False, {"SGLang", "deepseek-ai/DeepSpec"}),
        ("rank0", "serving", True, set()),
        ("rank0", "full", True, {"deepseek-ai/DeepSpec"}),
        ("speculators", "serving", False, {"vLLM", "llama.cpp"}),
        ("speculators", "full", True, {"vLLM", "llama.cpp"}),
        ("reduced", "serving", False, {"vLLM", "llama.cpp"}),
        ("reduced", "full", True, {"vLLM", "llama.cpp"}),
    ],
)
def test_engines_are_those_of_the_table(
    target: Target, kind: str, profile: str, tied: bool, engines: set[str]
) -> None:
    if kind in ("speculators", "reduced"):
        size = 100 if kind == "reduced" else 0
        parts = parts_of(target, "vanilla", profile, tied, "speculators", size)
    else:
        parts = parts_of(target, kind, profile, tied)
    support = loads_in(parts[-1])
    assert {entry.engine for entry in support if entry.loads} == engines | {"this library"}
    assert all(entry.why for entry in support)

    card = model_card("drafter", *parts, RUN, 400, None)
    assert ("vllm serve" in card) == ("vLLM" in engines)
    assert ("sglang.launch_server" in card) == ("SGLang" in engines)
    assert ("--spec-type draft-dspark" in card) == ("llama.cpp" in engines)
    for entry in support:
        assert f"| {entry.engine} | {'yes' if entry.loads else 'no'} | {entry.why} |" in card


def test_the_card_says_what_it_is(target: Target) -> None:
    parts = parts_of(target, "vanilla", "serving")
    card = model_card("me/qwen3-4b-dspark", *parts, RUN, 400, ACCEPTANCE)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen3-4B"
    assert "license" not in head
    assert {"dspark", "speculative-decoding"} <= set(head["tags"])
    assert ACCEPTANCE in card
    assert "400 optimizer steps of 512 samples with up to 32 anchors each" in card
    assert "learning rate 0.0006" in card
    assert "0.1 cross-entropy + 0.9 L1 distance to the target + 1.0 confidence" in card
    assert "exp(-j / 4)" in card, "decay is the block size unless set"
    assert "temperature 0.7, top-p 0.8, top-k 20" in card
    assert "train.jsonl, owner/prompts" in card
    assert "secret" not in card
    option = re.search(r"--speculative-config '(.*)'", card)
    assert option is not None
    assert json.loads(option[1]) == {
        "method": "dspark",
        "model": "me/qwen3-4b-dspark",
        "num_speculative_tokens": 4,
    }
    assert "\n\n\n" not in card
    assert card.endswith("```\n")


def test_the_card_of_a_draft_vocabulary(target: Target) -> None:
    shape, config, traits = parts_of(target, "vanilla", "serving", layout="speculators", size=100)
    card = model_card(
        "out", replace(shape, draft_vocab_coverage=0.9871), config, traits, RUN, 1, None
    )
    assert (
        "| draft vocabulary | 100 of 260 tokens, 98.7 % of those in the training answers |" in card
    )
    assert "with the LM head's rows for the draft vocabulary, without embedding" in card
    assert "| layout | speculators |" in card
    assert "100 of 260 tokens |" in model_card("out", shape, config, traits, RUN, 1, None)


def test_the_card_of_a_local_dflash_drafter(target: Target) -> None:
    shape, config, traits = parts_of(target, "rank0", "serving")
    config["deepspec"]["target"] = "tiny_target"
    shape = replace(shape, confidence_head=False)
    card = model_card("out", shape, config, traits, RUN, 1, None)
    head = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in head, "a folder's name is no model on the hub"
    assert "dflash" in head["tags"]
    assert "A DFlash drafter" in card
    assert "Not measured yet." in card
    assert "confidence," not in card
    assert "\n\n\n" not in card


def test_paths_are_private_and_hub_names_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert public_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert public_name(str(tmp_path / "secret" / "model")) == "model"
    assert public_name("./model") == "model"
    assert public_name("~/model") == "model"
    (tmp_path / "data" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("data/model") == "model"
