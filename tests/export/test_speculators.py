"""The layout of the speculators library on disk, and back; and what each layout refuses.

Known to be right by: names, shapes and keys written out here from the layout's description (D 32,
layers [1, 2, 3] of 6, rank 6, V 260); a backbone config that only transformers reads; and a round
trip that must equal, bit for bit, the same drafter with its weights rounded to bf16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.dspark import DSparkDrafter
from deepspec.errors import CheckpointError, ConfigError
from deepspec.export import LAYOUTS, is_export, layouts_for, open_export, write_export
from deepspec.targets import Target
from tests.export.conftest import make_drafter
from tests.export.exports import assert_same_numbers, edit, in_bf16, library_part, rewrite

BACKBONE = "transformer_layer_config"


def export(
    drafter: DSparkDrafter,
    target: Target,
    out: Path,
    profile: str = "serving",
    layout: str = "speculators",
) -> Path:
    write_export(layout, "dspark", drafter, target, out, profile, 32, lambda *_: "a card\n")
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def foreign(folder: Path) -> Path:
    """As the library itself saves one: its class's name, no key of ours, no defaults."""
    config = config_of(folder)
    backbone = Qwen3Config(**config[BACKBONE]).to_diff_dict()
    backbone |= {"is_causal": False, "model_type": "qwen3"}
    absent = dict.fromkeys(("deepspec", "num_anchors", "dtype"))
    own = {"architectures": ["DSparkDraftModel"], "speculators_version": "0.9.0"}
    edit(folder, **absent, **own, **{BACKBONE: backbone})
    return folder


# ---------------------------------------------------------------------------------------- on disk


def test_config_says_what_the_description_says(target: Target, tmp_path: Path) -> None:
    config = config_of(export(make_drafter(target, "vanilla"), target, tmp_path / "out"))
    backbone, own = config.pop(BACKBONE), config.pop("deepspec")
    assert config == {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "draft_vocab_size": 260,
        "block_size": 4,
        "aux_hidden_state_layer_ids": [2, 3, 4],
        "mask_token_id": 3,
        "sample_from_anchor": True,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "num_anchors": 32,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "speculators_config": library_part("dspark", target),
    }
    assert own["target_layer_ids"] == [1, 2, 3]
    assert own["num_target_layers"] == 6
    read = Qwen3Config(**backbone)
    assert (read.model_type, read.is_causal, read.tie_word_embeddings) == ("qwen3", False, False)
    assert (read.hidden_size, read.num_hidden_layers, read.vocab_size) == (32, 2, 260)
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (4, 2, 8)
    assert read.layer_types == ["full_attention"] * 2
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("size", [None, 100])
def test_tensors_are_the_flat_ones_and_the_tables(
    target: Target, tmp_path: Path, profile: str, size: int | None
) -> None:
    drafter = make_drafter(target, "vanilla", draft_vocab_size=size)
    found = load_file(export(drafter, target, tmp_path / "out", profile) / "model.safetensors")
    embedding = target.model.model.embed_tokens.weight.bfloat16()
    assert ("embed_tokens.weight" in found) == (profile == "full")
    if size is None:
        assert ("lm_head.weight" in found) == (profile == "full")
        assert not {"d2t", "t2d"} & set(found)
        return
    assert found["markov_head.markov_w1.weight"].shape == (260, 6)
    assert found["markov_head.markov_w2.weight"].shape == (100, 6)
    assert found["d2t"].dtype == torch.int64
    ids = torch.tensor([i + int(offset) for i, offset in enumerate(found["d2t"])])
    assert ids.equal(drafter.vocabulary)
    assert found["t2d"].dtype == torch.bool
    assert found["t2d"].nonzero().squeeze(1).equal(ids)
    assert found["lm_head.weight"].equal(embedding[ids])


# -------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("profile", ["serving", "full"])
@pytest.mark.parametrize("size", [None, 100])
def test_round_trip_equals_the_rounded_original(
    target: Target, tmp_path: Path, profile: str, size: int | None, whose: str
) -> None:
    original = make_drafter(target, "vanilla", draft_vocab_size=size)
    folder = export(original, target, tmp_path / "out", profile)
    opened = open_export(folder if whose == "ours" else foreign(folder))
    assert opened.target == Path(target.name).name
    assert opened.kind == "dspark"
    loaded = opened.load(target)
    assert loaded.config == original.config
    assert_same_numbers(loaded, in_bf16(original), target)


def test_how_many_layers_a_target_has_only_the_target_tells(target: Target, tmp_path: Path) -> None:
    folder = foreign(export(make_drafter(target, "vanilla"), target, tmp_path / "out"))
    assert open_export(folder).shape.num_target_layers == 0
    assert open_export(folder).load().config.num_target_layers == 0
    assert open_export(folder).load(target).config.num_target_layers == 6


def test_a_flat_file_with_a_draft_vocabulary_is_read(target: Target, tmp_path: Path) -> None:
    """Nobody serves it, but the public implementation's description allows it."""
    original = make_drafter(target, "vanilla", draft_vocab_size=100)
    folder = export(original, target, tmp_path / "out")
    flat = LAYOUTS["flat"].config(original.config, target, "serving", 32)
    (folder / "config.json").write_text(json.dumps(flat))
    assert_same_numbers(open_export(folder).load(target), in_bf16(original), target)


def rows_of_another_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] *= 2


def descending(tensors: dict[str, Tensor]) -> None:
    ids = torch.arange(100) + tensors["d2t"]
    tensors["d2t"] = ids.flip(0) - torch.arange(100)


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no backbone": (lambda f: edit(f, **{BACKBONE: None}), f"{BACKBONE} is missing"),
    "no layers": (
        lambda f: edit(f, aux_hidden_state_layer_ids=None),
        "aux_hidden_state_layer_ids is missing or no list",
    ),
    "layers are no ids": (lambda f: edit(f, aux_hidden_state_layer_ids=["a"]), "no list of ids"),
    "another backbone": (
        lambda f: edit(f, **{BACKBONE: {"model_type": "llama"}}),
        "model_type is 'llama', but only 'qwen3'",
    ),
    "mask first": (
        lambda f: edit(f, sample_from_anchor=False),
        "sample_from_anchor is False, expected true",
    ),
    "said nowhere": (lambda f: edit(f, sample_from_anchor=None), "sample_from_anchor is missing"),
    "windows": (
        lambda f: edit(f, **{BACKBONE: {**config_of(f)[BACKBONE], "use_sliding_window": True}}),
        "use_sliding_window is True",
    ),
    "fewer tokens": (
        lambda f: edit(f, draft_vocab_size=90),
        re.escape("markov_w2.weight is [100, 6], expected [90, 6]"),
    ),
    "all tokens": (lambda f: edit(f, draft_vocab_size=260), "d2t is not called for"),
    "no table": (lambda f: rewrite(f, lambda t: t.pop("d2t")), "d2t is missing"),
    "ids outside": (
        lambda f: rewrite(f, lambda t: t["d2t"].add_(200)),
        "d2t leads to the ids .* of 260 tokens",
    ),
    "ids descend": (lambda f: rewrite(f, descending), "d2t leads to ids that do not ascend"),
    "tables differ": (
        lambda f: rewrite(f, lambda t: t["t2d"].logical_not_()),
        "t2d is true at other tokens",
    ),
    "another head": (
        lambda f: rewrite(f, rows_of_another_head),
        "lm_head.weight is not that of",
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_every_corruption_is_a_clear_error(target: Target, tmp_path: Path, what: str) -> None:
    drafter = make_drafter(target, "vanilla", draft_vocab_size=100)
    folder = export(drafter, target, tmp_path / "out")
    open_export(folder).load(target)
    corrupt, message = CORRUPTIONS[what]
    corrupt(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_export(folder).load(target)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layout", "kind", "size", "message"),
    [
        ("speculators", "gated", None, "know vanilla Markov heads, not gated ones; set .*=flat$"),
        ("speculators", "rnn", None, "not rnn ones; set .*=flat$"),
        ("speculators", "rank0", None, r"without a Markov head \(rank 0\); set .*=flat$"),
        ("flat", "vanilla", 100, "reduced draft vocabulary .* in it; set .*=speculators$"),
        ("flat", "gated", 100, "no layout can hold it$"),
        ("round", "vanilla", None, "export.format=round is not one of flat, speculators"),
    ],
)
def test_what_a_layout_cannot_hold_names_those_that_can(
    target: Target, tmp_path: Path, layout: str, kind: str, size: int | None, message: str
) -> None:
    drafter = make_drafter(target, kind, draft_vocab_size=size)
    with pytest.raises(ConfigError, match=message):
        export(drafter, target, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_settings_tell_before_there_is_a_drafter() -> None:
    assert layouts_for("dspark", DrafterConfig()) == ["flat", "speculators"]
    assert layouts_for("dspark", DrafterConfig(markov_head="gated")) == ["flat"]
    assert layouts_for("dspark", DrafterConfig(draft_vocab_size=9)) == ["speculators"]
    assert layouts_for("dflash", DrafterConfig(kind="dflash")) == ["flat"]
    assert layouts_for("eagle3", DrafterConfig(kind="eagle3")) == ["speculators"]
    not_normed = DrafterConfig(kind="eagle3", qk_norm=False, draft_vocab_size=9)
    assert layouts_for("eagle3", not_normed) == ["flat", "speculators"]
    assert layouts_for("mtp", DrafterConfig(kind="mtp")) == []


def test_an_export_of_one_layout_is_replaced_by_another(target: Target, tmp_path: Path) -> None:
    drafter = make_drafter(target, "vanilla")
    export(drafter, target, tmp_path / "out")
    folder = export(drafter, target, tmp_path / "out", layout="flat")
    assert is_export(folder)
    assert config_of(folder)["architectures"] == ["Qwen3DSparkModel"]
    edit(folder, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(CheckpointError, match=r"Qwen3ForCausalLM.*layouts flat, speculators"):
        open_export(folder)
