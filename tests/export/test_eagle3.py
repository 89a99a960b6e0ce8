"""EAGLE-3 in the layout of the speculators library, on disk and back; what is checked of it.

Known to be right by: names, shapes and keys written out here from the layout's description (D 32,
layers [1, 2, 3] of 6, V 260); Transformers' own Llama and Qwen3 layers, which given the exported
weights must make what the drafter drafts (an attention whose projections read pairs is theirs but
for its input); and a round trip that must equal the drafter with its weights rounded to bf16.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from deepspec.checks.export import check_export
from deepspec.config.schema import DrafterConfig, RunConfig, TargetConfig, as_dict
from deepspec.drafters.base import Observation, greedy
from deepspec.drafters.causal import CausalProposer
from deepspec.drafters.eagle3 import Eagle3Drafter, resolve_config
from deepspec.errors import CheckpointError
from deepspec.export import LAYOUTS, loads_in, model_card, open_export, write_export
from deepspec.export.engines import Eagle3Traits
from deepspec.export.files import headers_of
from deepspec.targets import Target, load_target
from tests.checks.test_export import assert_nothing_is_too_strange
from tests.export.exports import (
    assert_a_head_of_its_own_is_for_engines,
    assert_same_logits,
    edit,
    in_bf16,
    library_part,
    observed,
    rewrite,
)
from tests.export.test_speculators import BACKBONE, config_of

NORMED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def make_eagle3(target: Target, size: int | None = None, qk_norm: bool = True) -> Eagle3Drafter:
    """Block 4; weights outside the bf16 grid. Of a draft vocabulary, tokens that are spread."""
    config = DrafterConfig(
        kind="eagle3",
        num_layers=1,
        block_size=4,
        intermediate_size=48,
        qk_norm=qk_norm,
        draft_vocab_size=size,
    )
    drafter = Eagle3Drafter(resolve_config(config, target))
    torch.manual_seed(1)
    for name, parameter in drafter.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    if size is not None:
        drafter.restrict(torch.randperm(260)[:size].sort().values)
    return drafter.eval()


def export(
    drafter: Eagle3Drafter,
    target: Target,
    out: Path,
    profile: str = "serving",
    layout: str = "speculators",
) -> Path:
    write_export(layout, "eagle3", drafter, target, out, profile, 32, lambda *_: "a card\n")
    return out


def layer(**changes: Any) -> Callable[[Path], None]:
    """Change keys of the layer's config."""
    return lambda folder: edit(folder, **{BACKBONE: config_of(folder)[BACKBONE] | changes})


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


# ---------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("qk_norm", [True, False])
def test_config_says_what_the_description_says(
    target: Target, tmp_path: Path, qk_norm: bool
) -> None:
    folder = export(make_eagle3(target, qk_norm=qk_norm), target, tmp_path / "out")
    config = config_of(folder)
    backbone, own = config.pop(BACKBONE), config.pop("deepspec")
    assert config == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 260,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": 32,
        "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "speculators_config": library_part("eagle3", target),
    }
    assert own["target_layer_ids"] == [1, 2, 3]
    assert own["num_target_layers"] == 6
    kind = Qwen3Config if qk_norm else LlamaConfig
    read = kind(**backbone)
    assert (backbone["model_type"], read.tie_word_embeddings) == (kind.model_type, False)
    assert (read.hidden_size, read.num_hidden_layers, read.vocab_size) == (32, 1, 260)
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (4, 2, 8)
    assert (read.intermediate_size, read.hidden_act, read.attention_bias) == (48, "silu", False)
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("size", [None, 100])
def test_names_and_shapes(target: Target, tmp_path: Path, profile: str, size: int | None) -> None:
    drafter = make_eagle3(target, size)
    found = load_file(export(drafter, target, tmp_path / "out", profile) / "model.safetensors")
    expected = {
        "fc.weight": [32, 96],
        "norm.weight": [32],
        "layers.0.input_layernorm.weight": [32],
        "layers.0.hidden_norm.weight": [32],
        "layers.0.post_attention_layernorm.weight": [32],
        "layers.0.self_attn.q_proj.weight": [32, 64],
        "layers.0.self_attn.k_proj.weight": [16, 64],
        "layers.0.self_attn.v_proj.weight": [16, 64],
        "layers.0.self_attn.o_proj.weight": [32, 32],
        **{f"layers.0.{name}": [8] for name in NORMED},
        "layers.0.mlp.gate_proj.weight": [48, 32],
        "layers.0.mlp.up_proj.weight": [48, 32],
        "layers.0.mlp.down_proj.weight": [32, 48],
    }
    if profile == "full":
        expected |= {"embed_tokens.weight": [260, 32], "lm_head.weight": [260, 32]}
    if size is not None:
        expected |= {"lm_head.weight": [100, 32], "d2t": [100], "t2d": [260]}
        ids = found["d2t"] + torch.arange(100)
        assert ids.equal(drafter.vocabulary)
        assert found["t2d"].nonzero().squeeze(1).equal(ids)
        assert found["lm_head.weight"].equal(target.embedding.bfloat16()[ids])
    assert {name: list(tensor.shape) for name, tensor in found.items()} == expected


# --------------------------------------------------------------- what the layer's config computes


THEIRS = {
    "llama": (LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding),
    "qwen3": (Qwen3Config, Qwen3DecoderLayer, Qwen3RotaryEmbedding),
}


def theirs(folder: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A step by Transformers' own layer with the exported weights: (embeddings, features) [T, D]
    of pairs at 0 .. T - 1 -> the newest one's output before and after the last norm [D]."""
    config, found = config_of(folder)[BACKBONE], load_file(folder / "model.safetensors")
    kind, layer_kind, rotary_kind = THEIRS[config["model_type"]]
    own = kind(**config, attn_implementation="eager")
    decoder, rotary = layer_kind(own, 0).float(), rotary_kind(own)
    for name in ("q_proj", "k_proj", "v_proj"):
        width = getattr(decoder.self_attn, name).out_features
        setattr(decoder.self_attn, name, nn.Linear(2 * own.hidden_size, width, bias=False))
    prefix = "layers.0."
    weights = {n.removeprefix(prefix): t.float() for n, t in found.items() if prefix in n}
    hidden_norm = copy.deepcopy(decoder.input_layernorm)
    hidden_norm.load_state_dict({"weight": weights.pop("hidden_norm.weight")})
    decoder.load_state_dict(weights)
    last = copy.deepcopy(hidden_norm)
    last.load_state_dict({"weight": found["norm.weight"].float()})

    def step(embedded: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.cat((decoder.input_layernorm(embedded), hidden_norm(features)), dim=-1)
        length = len(pairs)
        angles = rotary(pairs[None], torch.arange(length)[None])
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        attended, _ = decoder.self_attn(pairs[None], angles, mask)
        states = features + attended[0]
        states = states + decoder.mlp(decoder.post_attention_layernorm(states))
        return states[-1], last(states[-1])

    return step


@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_engines_layers_draft_the_same(target: Target, tmp_path: Path, qk_norm: bool) -> None:
    """Greedy drafts after a text of 9 tokens, by pairs as engines shift them."""
    folder = export(make_eagle3(target, qk_norm=qk_norm), target, tmp_path / "out")
    features, batch = observed(target, open_export(folder).load(target))
    text, anchor = batch.tokens[:9], 5
    step = theirs(folder)
    fc = load_file(folder / "model.safetensors")["fc.weight"].float()
    fused = features.context[:9] @ fc.T
    tokens, pairs, drafts = [*text[1:], torch.tensor(anchor)], [*fused], []
    for _ in range(4):
        output, normed = step(target.embedding[torch.stack(tokens)], torch.stack(pairs))
        drafts.append(target.head(normed[None])[0].argmax())
        tokens.append(drafts[-1])
        pairs.append(output)

    proposer = CausalProposer(open_export(folder).load(target), target.embedding, target.head)
    proposer.start(1)
    starts, counts = torch.zeros(1, dtype=torch.int64), torch.tensor([9])
    context, final = features.context[None, :9], features.final[None, :9]
    proposer.observe(Observation(text[None], context, final, starts, counts, 9))
    proposal = proposer.propose(torch.tensor([anchor]), torch.tensor([9]), 10, greedy)
    assert proposal.tokens[0].tolist() == torch.stack(drafts).tolist()


# -------------------------------------------------------------------------------------- and back


def foreign(folder: Path) -> Path:
    """As the library itself saves one: its class's name, no key of ours, no defaults."""
    config = config_of(folder)
    kind = THEIRS[config[BACKBONE]["model_type"]][0]
    backbone = kind(**config[BACKBONE]).to_diff_dict() | {"model_type": kind.model_type}
    absent = dict.fromkeys(("deepspec", "dtype", "target_hidden_size", "fc_norm", "norm_output"))
    edit(folder, architectures=["Eagle3DraftModel"], **absent, **{BACKBONE: backbone})
    return folder


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("profile", "size", "qk_norm"),
    [("serving", None, True), ("full", None, False), ("serving", 100, False), ("full", 100, True)],
)
def test_round_trip_equals_the_rounded_original(
    target: Target, tmp_path: Path, profile: str, size: int | None, qk_norm: bool, whose: str
) -> None:
    original = make_eagle3(target, size, qk_norm)
    folder = export(original, target, tmp_path / "out", profile)
    opened = open_export(folder if whose == "ours" else foreign(folder))
    assert (opened.kind, opened.target) == ("eagle3", Path(target.name).name)
    loaded = opened.load(target)
    assert loaded.config == original.config
    assert_same_logits(loaded, in_bf16(original), target)
    if size is not None:
        assert loaded.vocabulary.equal(original.vocabulary)
    assert check_export(folder, target).faults == []


# ---------------------------------------------------------------------------------------- checked


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another algorithm": (
        lambda f: edit(f, speculators_model_type="dspark"),
        "speculators_model_type is 'dspark', not 'eagle3'",
    ),
    "not said": (
        lambda f: edit(f, norm_before_residual=None),
        "norm_before_residual is missing: engines disagree",
    ),
    "ids not plus one": (
        lambda f: edit(f, eagle_aux_hidden_state_layer_ids=[1, 2, 3]),
        r"layer_ids is \[1, 2, 3\], expected \[2, 3, 4\]",
    ),
    "the last layer": (
        lambda f: edit(f, eagle_aux_hidden_state_layer_ids=[2, 3, 6]),
        r"\[1, 2, 5\] of 6 have \[5\], the last layer's output",
    ),
    "no ids": (
        lambda f: edit(f, eagle_aux_hidden_state_layer_ids=None),
        "eagle_aux_hidden_state_layer_ids is missing or no list of ids",
    ),
    "no layer": (lambda f: edit(f, **{BACKBONE: None}), f"{BACKBONE} is missing"),
    "another layer": (
        layer(model_type="gemma"),
        "model_type is 'gemma', but only 'llama' and 'qwen3' is read",
    ),
    "no drafts": (
        lambda f: edit(f, speculators_config={"verifier": {"name_or_path": "x"}}),
        "speculative_tokens is missing",
    ),
    "normed in name only": (
        tensors(lambda t: [t.pop(f"layers.0.{name}") for name in NORMED]),
        r"layers\.0\.self_attn\.q_norm\.weight is missing",
    ),
    "not normed in name": (layer(model_type="llama"), "q_norm.weight is not called for"),
    "sizes": (layer(intermediate_size=40), r"gate_proj\.weight is \[48, 32\], expected \[40, 32\]"),
    "unknown": (
        tensors(lambda t: t.update(extra=torch.zeros(2).bfloat16())),
        "extra is not called for",
    ),
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "no table": (tensors(lambda t: t.pop("d2t")), "d2t is missing"),
    "ids outside": (tensors(lambda t: t["d2t"].add_(200)), "d2t leads to the ids"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_every_break_is_found(target: Target, tmp_path: Path, what: str) -> None:
    folder = export(make_eagle3(target, 100), target, tmp_path / "out")
    found = check_export(folder, target)
    assert (found.layout, found.faults, found.doubts) == ("speculators", [], [])
    breaking, message = BREAKS[what]
    breaking(folder)
    found = check_export(folder)
    assert any(re.search(message, fault) for fault in found.faults), found.faults
    assert not any(entry.loads for entry in found.support)


def uncounted(folder: Path) -> None:
    kept = config_of(folder)[BACKBONE]
    del kept["num_hidden_layers"], kept["layer_types"]
    edit(folder, **{BACKBONE: kept})


UNREAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "residual": (lambda f: edit(f, norm_before_residual=True), "norm_before_residual is True"),
    "output": (lambda f: edit(f, norm_output=True), "norm_output is True"),
    "two layers": (
        layer(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "num_hidden_layers is 2",
    ),
    "uncounted layers": (uncounted, "num_hidden_layers is None"),
    "bias": (layer(attention_bias=True), "attention_bias is True"),
    "window": (layer(layer_types=["sliding_attention"]), "layer_types is "),
    "another size": (lambda f: edit(f, target_hidden_size=64), "target_hidden_size is 64"),
}


@pytest.mark.parametrize("what", UNREAD)
def test_what_engines_compute_and_this_library_does_not(
    target: Target, tmp_path: Path, what: str
) -> None:
    folder = export(make_eagle3(target), target, tmp_path / "out")
    change, message = UNREAD[what]
    change(folder)
    found = check_export(folder, target)
    answers = {entry.engine: entry for entry in found.support}
    assert (found.faults, answers["vLLM"].loads) == ([], True)
    assert not answers["this library"].loads
    assert message in answers["this library"].why
    with pytest.raises(CheckpointError, match=message) as caught:
        open_export(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [True, False])
def test_no_value_of_any_key_is_too_strange(target: Target, tmp_path: Path, qk_norm: bool) -> None:
    drafter = make_eagle3(target, qk_norm=qk_norm)
    assert_nothing_is_too_strange(export(drafter, target, tmp_path / "out"))


def test_a_head_of_its_own_is_for_engines(target: Target, tmp_path: Path) -> None:
    folder = export(make_eagle3(target), target, tmp_path / "out", "full")
    assert_a_head_of_its_own_is_for_engines(folder, target)


# --------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("ids", "qk_norm", "engines"),
    [
        ([1, 2, 3], True, {"vLLM"}),
        ([1, 3], True, {"vLLM"}),
        ([1, 2, 3], False, {"vLLM"}),
        ([1, 3], False, set()),
        ([1, 3, 4], False, {"vLLM", "llama.cpp"}),
        ([1, 3, 4], True, {"vLLM"}),
    ],
)
def test_engines(ids: list[int], qk_norm: bool, engines: set[str], target: Target) -> None:
    """Of a target of 8 layers: llama.cpp captures hidden states 2, 4 and 5."""
    shape = replace(
        make_eagle3(target, qk_norm=qk_norm).config,
        num_target_layers=8,
        target_layer_ids=tuple(ids),
    )
    drafter, own = Eagle3Drafter(shape), LAYOUTS["speculators"]
    config = own.config(shape, target, "serving", 32)
    traits = own.traits(config, headers_of(own.tensors(drafter, target, "serving")))
    assert traits.eagle3 == Eagle3Traits(qk_norm, tuple(i + 1 for i in ids), 8, None)
    support = loads_in(traits)
    assert {entry.engine for entry in support if entry.loads} == engines | {"this library"}
    run = as_dict(RunConfig(recipe="x", out="x", target=TargetConfig(path="x")))
    card = model_card("drafter", shape, config, traits, run, 400, None)
    assert "An EAGLE-3 drafter" in card
    assert ('"method":"eagle3"' in card) == ("vLLM" in engines)
    assert ("--spec-type draft-eagle3" in card) == ("llama.cpp" in engines)
    assert "Markov" not in card.split("## Serving")[0]
    assert "\n\n\n" not in card
    if ids == [1, 2, 3] and not qk_norm:
        why = next(entry.why for entry in support if entry.engine == "llama.cpp")
        assert "[1,3,4] alone: train with target.layer_ids=[1,3,4]" in why


def test_a_target_tells_how_many_layers_it_has(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    folder = export(make_eagle3(target, qk_norm=False), target, tmp_path / "out")
    config = config_of(folder)
    del config["deepspec"]
    (folder / "config.json").write_text(json.dumps(config))

    def why(of: Target | None) -> str:
        return next(e.why for e in check_export(folder, of).support if e.engine == "llama.cpp")

    assert "nothing tells whether these: give target.path" in why(None)
    whole = load_target(TargetConfig(str(target_folder), dtype="float32", num_layer_ids=3), "cpu")
    assert "captures the target's layers [1,2,2] alone" in why(whole)
