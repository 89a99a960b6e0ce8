"""The flat layout on disk, and back.

Known to be right by: names, shapes and config keys written out here from the layout's description
(D 32, L 3, 4 heads of 8, 2 key/value heads, MLP 48, rank 6, V 260); the file read by safetensors
alone, with the heads' equations in plain torch; transformers reading config.json; and a round trip
that must equal, bit for bit, the same drafter with its weights rounded to bf16.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3Config

from deepspec.checks.export import check_export
from deepspec.config.schema import TargetConfig
from deepspec.drafters.dspark import DSparkDrafter
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export import files, is_export, open_export, write_export
from deepspec.export.flat import flat_config
from deepspec.targets import Target, load_target
from tests.conftest import make_model, make_tokenizer
from tests.export.conftest import KINDS, make_drafter
from tests.export.exports import (
    assert_same_numbers,
    edit,
    in_bf16,
    logits_of,
    observed,
    rewrite,
)
from tests.targets.tiny import make_target

BACKBONE = {
    "fc.weight": [32, 96],
    "hidden_norm.weight": [32],
    "norm.weight": [32],
    "layers.0.self_attn.q_proj.weight": [32, 32],
    "layers.0.self_attn.k_proj.weight": [16, 32],
    "layers.0.self_attn.v_proj.weight": [16, 32],
    "layers.0.self_attn.o_proj.weight": [32, 32],
    "layers.0.self_attn.q_norm.weight": [8],
    "layers.0.self_attn.k_norm.weight": [8],
    "layers.0.mlp.gate_proj.weight": [48, 32],
    "layers.0.mlp.up_proj.weight": [48, 32],
    "layers.0.mlp.down_proj.weight": [32, 48],
    "layers.0.input_layernorm.weight": [32],
    "layers.0.post_attention_layernorm.weight": [32],
    "layers.1.self_attn.q_proj.weight": [32, 32],
    "layers.1.self_attn.k_proj.weight": [16, 32],
    "layers.1.self_attn.v_proj.weight": [16, 32],
    "layers.1.self_attn.o_proj.weight": [32, 32],
    "layers.1.self_attn.q_norm.weight": [8],
    "layers.1.self_attn.k_norm.weight": [8],
    "layers.1.mlp.gate_proj.weight": [48, 32],
    "layers.1.mlp.up_proj.weight": [48, 32],
    "layers.1.mlp.down_proj.weight": [32, 48],
    "layers.1.input_layernorm.weight": [32],
    "layers.1.post_attention_layernorm.weight": [32],
}
MARKOV = {"markov_head.markov_w1.weight": [260, 6], "markov_head.markov_w2.weight": [260, 6]}
HEADS = {
    "vanilla": MARKOV,
    "gated": MARKOV | {"markov_head.gate_proj.weight": [6, 38], "markov_head.gate_proj.bias": [6]},
    "rnn": MARKOV
    | {"markov_head.joint_proj.weight": [18, 44], "markov_head.joint_proj.bias": [18]},
    "rank0": {},
}
CONFIDENCE = {"confidence_head.proj.weight": [1, 38], "confidence_head.proj.bias": [1]}
CONFIDENCE_ALONE = {"confidence_head.proj.weight": [1, 32], "confidence_head.proj.bias": [1]}
SHARED = {"embed_tokens.weight": [260, 32], "lm_head.weight": [260, 32]}


def export(drafter: DSparkDrafter, target: Target, out: Path, profile: str = "serving") -> Path:
    write_flat(drafter, target, out, profile, "a card\n")
    return out


def write_flat(drafter: DSparkDrafter, target: Target, out: Path, profile: str, card: str) -> None:
    write_export("flat", "dspark", drafter, target, out, profile, 32, lambda *_: card)


def load_flat(folder: Path, target: Target | None = None) -> DSparkDrafter:
    return open_export(folder).load(target)


# ---------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("confidence", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_dtype(
    target: Target, tmp_path: Path, kind: str, confidence: bool, profile: str
) -> None:
    folder = export(make_drafter(target, kind, confidence), target, tmp_path / "out", profile)
    expected = BACKBONE | HEADS[kind]
    if confidence:
        expected |= CONFIDENCE_ALONE if kind == "rank0" else CONFIDENCE
    if profile == "full":
        expected |= SHARED
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in found}
        assert file.metadata() == {"format": "pt"}
    assert found == expected
    assert types == {"BF16"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (folder / "README.md").read_text() == "a card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_config_has_every_key_at_top_level(target: Target, tmp_path: Path) -> None:
    folder = export(make_drafter(target, "gated"), target, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    extra = config.pop("deepspec")
    assert config == {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "num_target_layers": 6,
        "num_hidden_layers": 2,
        "block_size": 4,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "full_attention"],
        "mask_token_id": 3,
        "target_layer_ids": [1, 2, 3],
        "num_anchors": 32,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 6,
        "markov_head_type": "gated",
        "sample_from_anchor": True,
        "is_causal": False,
        "dtype": "bfloat16",
        # the backbone: a Qwen3 layer with the target's sizes
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 260,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.2,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    assert extra["identity"] == target.identity
    assert extra["profile"] == "serving"
    assert extra["target_tied"] is True
    assert extra["confidence_detached"] is False
    assert "/" not in extra["target"], "a published file names no private path"


def test_transformers_reads_the_config(
    target: Target, drafter: DSparkDrafter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = export(drafter, target, tmp_path / "out")
    transformers.utils.logging.enable_propagation()  # else caplog hears nothing of it
    try:
        with caplog.at_level(logging.INFO, logger="transformers"):
            config = Qwen3Config.from_pretrained(folder)
            assert caplog.records, "transformers says at least which file it reads"
            assert isinstance(AutoConfig.from_pretrained(folder), Qwen3Config)
    finally:
        transformers.utils.logging.disable_propagation()
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (32, 2, 8)
    assert config.dtype == torch.bfloat16
    assert config.sample_from_anchor is True
    assert config.is_causal is False
    assert config.target_layer_ids == [1, 2, 3]


def test_a_target_of_another_family_gets_a_qwen3_drafter(llama: Target, tmp_path: Path) -> None:
    """The config is the drafter's backbone, whatever the target's class; its head is untied."""
    drafter = make_drafter(llama, "vanilla")
    folder = export(drafter, llama, tmp_path / "out", "full")
    config = Qwen3Config.from_pretrained(folder)
    assert (config.model_type, config.head_dim, config.eos_token_id) == ("qwen3", 8, [0, 2])
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert config.deepspec["target_tied"] is False
    tensors = load_file(folder / "model.safetensors")
    assert tensors["layers.0.self_attn.q_norm.weight"].shape == (8,)
    assert torch.equal(tensors["lm_head.weight"], llama.model.lm_head.weight.bfloat16())
    assert not torch.equal(tensors["lm_head.weight"], tensors["embed_tokens.weight"])
    assert load_flat(folder, llama).config == drafter.config


def test_rope_of_the_backbone_is_written_as_it_is_used(
    target: Target, drafter: DSparkDrafter
) -> None:
    """A default rotation turns the whole head, whatever else the target's config says."""
    plain = {"rope_type": "default", "rope_theta": 5e6}
    partial = replace(drafter.config, rope_parameters=plain | {"partial_rotary_factor": 0.25})
    assert flat_config(partial, target, "serving", 1)["rope_parameters"] == plain
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    stretched = flat_config(replace(drafter.config, rope_parameters=yarn), target, "serving", 1)
    assert stretched["rope_parameters"] == yarn
    assert stretched["rope_theta"] == 1e6


# -------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_equals_the_rounded_original(
    target: Target, tmp_path: Path, kind: str, profile: str
) -> None:
    original = make_drafter(target, kind)
    rounded = in_bf16(original)
    features, batch = observed(target, original)
    exact, coarse = (
        logits_of(drafter, target, drafter(features, batch, target.embedding))
        for drafter in (original, rounded)
    )
    assert not torch.equal(exact, coarse), "the rounding should show"

    loaded = load_flat(export(original, target, tmp_path / "out", profile), target)
    assert loaded.config == original.config
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same_numbers(loaded, rounded, target)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_plain_formulas_on_the_bare_file_give_the_bias(
    target: Target, tmp_path: Path, kind: str
) -> None:
    """The equations of the sequential heads, with nothing but the file and the hidden states."""
    folder = export(make_drafter(target, kind), target, tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        weight = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    loaded = load_flat(folder, target)
    features, batch = observed(target, loaded)
    output = loaded(features, batch, target.embedding)
    bias = output.latent @ loaded.bias_weight.T
    w1, w2 = weight["markov_head.markov_w1.weight"], weight["markov_head.markov_w2.weight"]
    confidence = weight["confidence_head.proj.weight"][0], weight["confidence_head.proj.bias"]
    for block in range(len(batch.anchors)):
        state = torch.zeros(6)
        for slot in range(4):
            hidden = output.hidden[block, slot]
            embedded = latent = w1[batch.previous[block, slot]]
            if kind == "gated":
                wide = weight["markov_head.gate_proj.weight"] @ torch.cat((hidden, embedded))
                latent = (wide + weight["markov_head.gate_proj.bias"]).sigmoid() * embedded
            elif kind == "rnn":
                wide = torch.cat((state, embedded, hidden))
                joint = weight["markov_head.joint_proj.weight"] @ wide
                gate, candidate, out = (joint + weight["markov_head.joint_proj.bias"]).split(6)
                state = gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh()
                latent = out.tanh()
            torch.testing.assert_close(bias[block, slot], w2 @ latent)
            torch.testing.assert_close(
                output.confidence_logits[block, slot],
                (confidence[0] @ torch.cat((hidden, embedded)) + confidence[1])[0],
            )


def test_full_profile_carries_the_targets_embedding_and_head(
    target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    folder = export(drafter, target, tmp_path / "out", "full")
    tensors = load_file(folder / "model.safetensors")
    weight = target.model.model.embed_tokens.weight.bfloat16()
    assert torch.equal(tensors["embed_tokens.weight"], weight)
    assert torch.equal(tensors["lm_head.weight"], weight)  # the tiny target ties them
    rewrite(folder, lambda own: own["lm_head.weight"].mul_(2))
    load_flat(folder)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not that of"):
        load_flat(folder, target)


def test_shape_is_known_without_weights(
    target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    folder = export(drafter, target, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    assert open_export(folder).shape == drafter.config


def test_a_checkpoint_of_the_public_implementation_loads(target: Target, tmp_path: Path) -> None:
    """No `deepspec` key, rope the old way, keys of a head only where there is one."""
    drafter = make_drafter(target, "rank0", confidence=False)
    folder = export(drafter, target, tmp_path / "out", "full")
    absent = ("deepspec", "rope_parameters", "is_causal", "layer_types")
    edit(folder, **dict.fromkeys(absent), markov_head_type=None, confidence_head_with_markov=None)
    assert load_flat(folder, target).config == drafter.config
    edit(folder, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert open_export(folder).shape.rope_parameters == rope


# ---------------------------------------------------------------------------------- several files


def test_large_weights_are_cut_into_files(
    target: Target, drafter: DSparkDrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers cuts them; all are checked, and none stays when the next export is small."""
    whole = load_file(export(drafter, target, tmp_path / "whole", "full") / "model.safetensors")
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)
    out = export(drafter, target, tmp_path / "out", "full")
    parts = sorted(out.glob("*.safetensors"))
    assert len(parts) > 2
    assert all(file.stat().st_size < 30_000 for file in parts)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    read = {name: load_file(out / file)[name] for name, file in index.items()}
    assert read.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read.items())
    assert_same_numbers(load_flat(out, target), in_bf16(drafter), target)
    assert not check_export(out).faults

    raw = bytearray(parts[1].read_bytes())
    raw[-1] ^= 1
    parts[1].write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{parts[1].name} is corrupt.*its sha256"):
        load_flat(out, target)

    monkeypatch.undo()
    export(drafter, target, out, "full")
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_numbers(load_flat(out, target), in_bf16(drafter), target)


# -------------------------------------------------------------------------------------- refusals


def test_an_earlier_export_is_replaced_and_nothing_else(
    target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    out = export(drafter, target, tmp_path / "out")
    write_flat(drafter, target, out, "full", "second\n")
    assert (out / "README.md").read_text() == "second\n"
    assert "lm_head.weight" in load_file(out / "model.safetensors")

    (out / "draft.gguf").write_text("hours of work")
    with pytest.raises(CheckpointError, match=r"holds draft\.gguf.*not overwritten"):
        export(drafter, target, out)
    assert (out / "draft.gguf").read_text() == "hours of work"
    assert (out / "README.md").read_text() == "second\n"

    with pytest.raises(CheckpointError, match="not overwritten"):
        export(drafter, target, out / "README.md")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="not overwritten"):
        export(drafter, target, notes)
    assert (notes / "README.md").read_text() == "mine"
    (notes / "README.md").unlink()
    assert is_export(export(drafter, target, notes)), "an empty folder may be used"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "notes"}


def test_a_failed_write_leaves_the_earlier_export(
    target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    """A card that UTF-8 cannot write fails last, when the weights are already down."""
    out = export(drafter, target, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UnicodeEncodeError):
        write_flat(drafter, target, out, "full", "\ud800")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_written_is_a_clear_error(
    target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write the export"):
        export(drafter, target, tmp_path / "file" / "out")


def test_an_unknown_profile_names_the_two(
    target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"export\.profile=fat is not one of serving, full"):
        export(drafter, target, tmp_path / "out", "fat")


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def truncate_unhashed(folder: Path) -> None:
    rewrite(folder, lambda tensors: None)
    truncate(folder)


CORRUPTIONS = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "holds no export"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is damaged or unreadable"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "should be an object"),
    "another layout": (
        lambda f: edit(f, architectures=["DSparkSpeculator"]),
        r"transformer_layer_config is missing",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"safetensors is missing"),
    "truncated": (truncate, "corrupt or incomplete: (?!its)"),
    "one bit": (flip_a_bit, "corrupt or incomplete: its sha256"),
    "truncated, no hash": (truncate_unhashed, r"corrupt or incomplete: (?!its)"),
    "no anchor key": (
        lambda f: edit(f, sample_from_anchor=None),
        "sample_from_anchor is missing, expected true",
    ),
    "mask first": (
        lambda f: edit(f, sample_from_anchor=False),
        "sample_from_anchor is False, expected true",
    ),
    "keys missing": (
        lambda f: edit(f, markov_rank=None, block_size=None),
        "misses block_size, markov_rank",
    ),
    "wrong type": (lambda f: edit(f, block_size="four"), "block_size is 'four', expected int"),
    "unknown head": (lambda f: edit(f, markov_head_type="fir"), "no drafter .*KeyError: 'fir'"),
    "unknown rope": (
        lambda f: edit(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}),
        "no drafter that can be built.*spiral",
    ),
    "impossible size": (lambda f: edit(f, head_dim=-8), "head_dim is -8, expected at least 1"),
    "causal": (lambda f: edit(f, is_causal=True), "is_causal is True, but only False"),
    "window": (
        lambda f: edit(f, layer_types=["sliding_attention"] * 2),
        "layer_types has sliding_attention",
    ),
    "tensor missing": (
        lambda f: rewrite(f, lambda t: t.pop("norm.weight")),
        r"does not fit config\.json.*: norm\.weight is missing",
    ),
    "tensor too many": (
        lambda f: rewrite(f, lambda t: t.update(d2t=torch.zeros(5, dtype=torch.int64))),
        "d2t is not called for",
    ),
    "tensor of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"fc.weight": torch.zeros(32, 64)})),
        r"fc\.weight is \[32, 64\], expected \[32, 96\]",
    ),
    "rank 0 with a head": (
        lambda f: edit(f, markov_rank=0),
        r"markov_w1\.weight is not called for",
    ),
    "more layers than weights": (
        lambda f: edit(f, num_hidden_layers=3),
        r"layers\.2\..* is missing.* and 6 more",
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_every_corruption_is_a_clear_error(
    target: Target, drafter: DSparkDrafter, tmp_path: Path, what: str
) -> None:
    folder = export(drafter, target, tmp_path / "out")
    load_flat(folder, target)
    corrupt, message = CORRUPTIONS[what]
    corrupt(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_flat(folder, target)
    assert "\n" not in str(caught.value)


def load_other(tmp_path: Path, seed: int, layers: int, ids: Any) -> Target:
    make_model(layers=layers, seed=seed).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    config = TargetConfig(path=str(tmp_path / "other"), dtype="float32", layer_ids=ids)
    return load_target(config, "cpu")


def test_another_target_is_refused(target: Target, drafter: DSparkDrafter, tmp_path: Path) -> None:
    folder = export(drafter, target, tmp_path / "out")
    other = load_other(tmp_path, seed=1, layers=6, ids=[1, 2, 3])
    with pytest.raises(CheckpointError, match=r"the .*weights differ\(s\); set target\.path"):
        load_flat(folder, other)
    edit(folder, deepspec=None)
    load_flat(folder, other)  # of the same size, and nothing says whose it is
    deeper = load_other(tmp_path, seed=1, layers=7, ids=[1, 2, 3])
    with pytest.raises(CheckpointError, match=r"num_target_layers \(6, not 7\)"):
        load_flat(folder, deeper)


def test_a_target_that_captures_other_layers_is_refused(
    target_folder: Path, target: Target, drafter: DSparkDrafter, tmp_path: Path
) -> None:
    """As many features, of other layers: nothing but this check would notice."""
    folder = export(drafter, target, tmp_path / "out")
    config = TargetConfig(path=str(target_folder), dtype="float32", layer_ids=[0, 2, 4])
    with pytest.raises(CheckpointError, match=r"set target\.layer_ids"):
        load_flat(folder, load_target(config, "cpu"))


def test_is_export(target: Target, drafter: DSparkDrafter, tmp_path: Path) -> None:
    assert is_export(export(drafter, target, tmp_path / "out"))
    assert not is_export(tmp_path)
    assert not is_export(tmp_path / "nowhere")
    target.config.save_pretrained(tmp_path / "target")
    assert not is_export(tmp_path / "target")


def test_a_scaled_embedding_is_inside(tmp_path: Path) -> None:
    """Engines that share a Gemma's table with a Qwen3 drafter do not scale it."""
    gemma = make_target("gemma3_text")
    drafter = make_drafter(gemma, "vanilla")
    folder = export(drafter, gemma, tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        found = file.get_tensor("embed_tokens.weight")
    plain = gemma.model.get_input_embeddings().weight
    torch.testing.assert_close(found.float(), 8 * plain, rtol=2**-7, atol=0)
    load_flat(folder, gemma)
    own = json.loads((folder / "config.json").read_text())["deepspec"]
    assert (own["target_tied"], own["scaled_embedding"]) == (True, True)
    for of in (None, gemma):  # the head is tied, and the profile serving: neither is the reason
        support = {entry.engine: entry for entry in check_export(folder, of).support}
        assert support["vLLM"].loads
        assert support["SGLang"].loads
        assert not support["llama.cpp"].loads
        assert "the target scales its embedding" in support["llama.cpp"].why
