"""EAGLE-3 in the flat layout, on disk and back; what is checked of it.

Known to be right by: names, shapes and keys written out here from the layout's description (D 32,
layers [1, 2, 3] of 6, V 260); the tensors of the speculators layout, whose layer is held against
Transformers' own; and a round trip that must equal the drafter with its weights rounded to bf16.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from deepspec.checks.export import check_export
from deepspec.config.schema import RunConfig, TargetConfig, as_dict
from deepspec.drafters.eagle3 import Eagle3Drafter
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export import LAYOUTS, loads_in, model_card, open_export
from deepspec.export.files import headers_of
from deepspec.targets import Target
from tests.checks.test_export import assert_nothing_is_too_strange
from tests.export.exports import (
    assert_a_head_of_its_own_is_for_engines,
    assert_same_logits,
    edit,
    in_bf16,
)
from tests.export.test_eagle3 import export as export_any
from tests.export.test_eagle3 import make_eagle3, tensors
from tests.export.test_speculators import config_of

IDS = "eagle_aux_hidden_state_layer_ids"


def make(target: Target, size: int | None = None) -> Eagle3Drafter:
    return make_eagle3(target, size, qk_norm=False)


def export(drafter: Eagle3Drafter, target: Target, out: Path, profile: str = "serving") -> Path:
    return export_any(drafter, target, out, profile, layout="flat")


def eagle(**changes: Any) -> Callable[[Path], None]:
    """Change keys of eagle_config; None removes one."""

    def change(folder: Path) -> None:
        found = config_of(folder)["eagle_config"] | changes
        edit(folder, eagle_config={key: found[key] for key in found if found[key] is not None})

    return change


def null_size(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    whole = re.sub(r'"draft_vocab_size": \d+', '"draft_vocab_size": null', text)
    (folder / "config.json").write_text(whole)


# ---------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize(
    ("profile", "size", "written"),
    [("serving", None, None), ("full", None, 260), ("serving", 100, 100), ("full", 100, 100)],
)
def test_config_says_what_the_description_says(
    target: Target, tmp_path: Path, profile: str, size: int | None, written: int | None
) -> None:
    config = config_of(export(make(target, size), target, tmp_path / "out", profile))
    read = LlamaConfig(**config)
    own = config["deepspec"]
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", False)
    assert config["draft_vocab_size"] == written
    assert config[IDS] == [2, 3, 4]
    assert config["eagle_config"] == {IDS: [1, 2, 3], "use_aux_hidden_state": True}
    assert config["target_hidden_size"] == read.hidden_size == 32
    assert (read.num_hidden_layers, read.vocab_size, read.intermediate_size) == (1, 260, 48)
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (4, 2, 8)
    assert (read.hidden_act, read.attention_bias, read.mlp_bias) == ("silu", False, False)
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert not {"layer_types", "norm_before_residual", "speculators_config"} & set(config)
    assert (own["num_target_layers"], own["block_size"], own["target_type"]) == (6, 4, "qwen3")


@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("size", [None, 100])
def test_tensors_are_those_of_the_other_layout_under_midlayer(
    target: Target, tmp_path: Path, profile: str, size: int | None
) -> None:
    drafter = make(target, size)
    folders = (
        export(drafter, target, tmp_path / "flat", profile),
        export_any(drafter, target, tmp_path / "other", profile),
    )
    found, other = (load_file(folder / "model.safetensors") for folder in folders)
    expected = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in other.items()}
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert found["midlayer.hidden_norm.weight"].shape == (32,)
    assert ("embed_tokens.weight" in found) == (profile == "full")
    assert ("lm_head.weight" in found) == (config_of(folders[0])["draft_vocab_size"] is not None)


# -------------------------------------------------------------------------------------- and back


def foreign(folder: Path) -> Path:
    """As others publish one: layers as SGLang counts them, and no key of ours."""
    edit(folder, deepspec=None, target_hidden_size=None, **{IDS: None})
    return folder


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("size", [None, 100])
def test_round_trip_equals_the_rounded_original(
    target: Target, tmp_path: Path, profile: str, size: int | None, whose: str
) -> None:
    original = make(target, size)
    folder = export(original, target, tmp_path / "out", profile)
    expected = original.config
    if whose == "theirs":
        with_null = config_of(folder)["draft_vocab_size"] is None
        foreign(folder)
        if with_null:  # edit drops nulls
            edit(folder, draft_vocab_size=0)
            null_size(folder)
        expected = replace(expected, block_size=7)  # the default, as nothing says it
    opened = open_export(folder)
    name = Path(target.name).name if whose == "ours" else ""
    assert (opened.kind, opened.target) == ("eagle3", name)
    loaded = opened.load(target)
    assert loaded.config == expected
    loaded.config = original.config
    assert_same_logits(loaded, in_bf16(original), target)
    if size is not None:
        assert loaded.vocabulary.equal(original.vocabulary)
    found = check_export(folder, target)
    assert (found.layout, found.faults, found.doubts) == ("flat", [], [])


def test_normed_heads_are_refused(target: Target, tmp_path: Path) -> None:
    message = r"format=flat cannot hold .*drafter\.qk_norm=false\); set .*=speculators$"
    with pytest.raises(ConfigError, match=message):
        export(make_eagle3(target), target, tmp_path / "out")


# ---------------------------------------------------------------------------------------- checked


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no size": (lambda f: edit(f, draft_vocab_size=None), "draft_vocab_size is missing: SGLang"),
    "null and a head": (null_size, r"is null, but lm_head\.weight is inside"),
    "no head": (
        tensors(lambda t: t.pop("lm_head.weight")),
        r"lm_head\.weight is missing, but draft_vocab_size is 100",
    ),
    "another model": (lambda f: edit(f, model_type="qwen3"), "model_type is 'qwen3', but only"),
    "ids alike": (eagle(**{IDS: [2, 3, 4]}), r"is \[2, 3, 4\], and \[2, 3, 4\] under eagle_config"),
    "no such ids": (eagle(**{IDS: "x"}), "and 'x' under eagle_config"),
    "no object": (lambda f: edit(f, eagle_config=[1]), r"eagle_config is \[1\], expected an"),
    "the last layer": (
        lambda f: (eagle(**{IDS: [1, 2, 5]})(f), edit(f, **{IDS: None})),
        r"\[1, 2, 5\] of 6 have \[5\], the last layer's output",
    ),
    "sizes": (
        lambda f: edit(f, intermediate_size=40),
        r"midlayer\.mlp\.gate_proj\.weight is \[48, 32\], expected \[40, 32\]",
    ),
    "other names": (
        tensors(lambda t: t.update({"layers.0.x": t.pop("midlayer.hidden_norm.weight")})),
        r"midlayer\.hidden_norm\.weight is missing",
    ),
    "no table": (tensors(lambda t: t.pop("d2t")), "d2t is missing"),
    "ids outside": (tensors(lambda t: t["d2t"].add_(200)), "d2t leads to the ids"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_every_break_is_found(target: Target, tmp_path: Path, what: str) -> None:
    folder = export(make(target, 100), target, tmp_path / "out")
    breaking, message = BREAKS[what]
    breaking(folder)
    found = check_export(folder)
    assert any(re.search(message, fault) for fault in found.faults), found.faults
    assert not any(entry.loads for entry in found.support)


UNREAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "residual": (lambda f: edit(f, norm_before_residual=True), "norm_before_residual is True"),
    "norm under eagle_config": (eagle(norm_before_fc=True), "norm_before_fc is True"),
    "two layers": (lambda f: edit(f, num_hidden_layers=2), "num_hidden_layers is 2"),
    "uncounted layers": (lambda f: edit(f, num_hidden_layers=None), "num_hidden_layers is None"),
    "bias": (lambda f: edit(f, attention_bias=True), "attention_bias is True"),
    "tied": (lambda f: edit(f, tie_word_embeddings=True), "tie_word_embeddings is True"),
    "last states": (eagle(use_aux_hidden_state=False), "use_aux_hidden_state is False"),
    "another size": (lambda f: edit(f, target_hidden_size=64), "target_hidden_size is 64"),
    "no ids": (
        lambda f: edit(f, eagle_config=None, **{IDS: None}),
        "engines capture hidden states 2, n/2 and n - 3",
    ),
}


@pytest.mark.parametrize("what", UNREAD)
def test_what_engines_compute_and_this_library_does_not(
    target: Target, tmp_path: Path, what: str
) -> None:
    folder = export(make(target, 100), target, tmp_path / "out")
    change, message = UNREAD[what]
    change(folder)
    found = check_export(folder, target)
    answers = {entry.engine: entry for entry in found.support}
    assert found.faults == []
    assert answers["vLLM"].loads
    assert answers["SGLang"].loads
    assert not answers["this library"].loads
    assert message in answers["this library"].why
    for read in (open_export, lambda folder: LAYOUTS["flat"].load(folder, config_of(folder), None)):
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            read(folder)
        assert str(folder) in str(caught.value)


def test_a_head_of_its_own_is_for_engines(target: Target, tmp_path: Path) -> None:
    folder = export(make(target, 100), target, tmp_path / "out")
    assert_a_head_of_its_own_is_for_engines(folder, target)


@pytest.mark.slow
def test_no_value_of_any_key_is_too_strange(target: Target, tmp_path: Path) -> None:
    assert_nothing_is_too_strange(export(make(target), target, tmp_path / "out"))


# --------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("ids", "changes", "engines"),
    [
        ([1, 2, 3], {}, {"vLLM", "SGLang"}),
        ([1, 3], {}, {"vLLM", "SGLang"}),
        ([1, 3, 4], {}, {"vLLM", "SGLang", "llama.cpp"}),
        ([1, 2, 3], {IDS: None}, {"SGLang"}),
        ([1, 3, 4], {IDS: None}, {"vLLM", "SGLang", "llama.cpp"}),
        ([1, 2, 3], {"eagle_config": {}}, {"vLLM"}),
        ([1, 3], {"eagle_config": {}}, set()),
        ([1, 3, 4], {"eagle_config": {}}, {"vLLM", "SGLang", "llama.cpp"}),
        ([1, 2, 3], {"target_type": "gpt_oss"}, {"vLLM"}),
        ([1, 2, 3], {"scaled_embedding": True}, {"vLLM"}),
    ],
)
def test_engines(
    ids: list[int], changes: dict[str, Any], engines: set[str], target: Target
) -> None:
    """Of a target of 8 layers: what engines capture by themselves are hidden states 2, 4 and 5."""
    shape = replace(make(target).config, num_target_layers=8, target_layer_ids=tuple(ids))
    drafter, own = Eagle3Drafter(shape), LAYOUTS["flat"]
    config = own.config(shape, target, "serving", 32)
    for key, value in changes.items():
        (config["deepspec"] if key in config["deepspec"] else config)[key] = value
    headers = headers_of(own.tensors(drafter, target, "serving"))
    assert list(own.faults(config, headers)) == []
    traits = own.traits(config, headers)
    found = {entry.engine for entry in loads_in(traits) if entry.loads}
    assert found == engines | {"this library"}
    run = as_dict(RunConfig(recipe="x", out="x", target=TargetConfig(path="x")))
    card = model_card("drafter", shape, config, traits, run, 400, None)
    sglang = (
        "--speculative-algorithm EAGLE3 --speculative-draft-model-path drafter \\\n"
        "  --speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5\n"
        "```\n"
    )
    assert (sglang in card) == ("SGLang" in engines)
    assert "\n\n\n" not in card
