"""What the validator leaves to a person: sound by itself, but looking like a known mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepspec.checks.export import check_export
from deepspec.drafters.dspark import DSparkDrafter
from deepspec.export import open_export
from deepspec.targets import Target
from tests.checks.test_export import export
from tests.export.exports import edit, rewrite
from tests.export.test_speculators import BACKBONE, config_of, foreign
from tests.targets.tiny import make_target


def test_layers_that_look_counted_from_one_are_a_doubt(target: Target, tmp_path: Path) -> None:
    folder = export(target, tmp_path / "out")
    edit(folder, target_layer_ids=[2, 3, 4])
    found = check_export(folder)
    assert found.fine
    assert re.search(r"\[2, 3, 4\] of 6 are the evenly spaced ones plus one", found.doubts[0])
    other = foreign(export(target, tmp_path / "other", "speculators"))
    edit(other, aux_hidden_state_layer_ids=[1, 2, 3])
    assert check_export(other).doubts == []  # nothing says how many layers there are
    assert "minus one" in check_export(other, target).doubts[0]


def test_a_table_without_its_targets_scale_is_a_doubt(tmp_path: Path) -> None:
    scaled = make_target("gemma3_text")
    folder = export(scaled, tmp_path / "out")
    assert not check_export(folder, scaled).doubts
    rewrite(folder, lambda tensors: tensors.pop("embed_tokens.weight"))
    assert not check_export(folder).doubts
    (doubt,) = check_export(folder, scaled).doubts
    assert "scales its embedding by 8" in doubt


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_a_rotation_that_an_engine_drops_is_a_doubt(
    layout: str, target: Target, tmp_path: Path
) -> None:
    """Exports made before drafters took the plain rotation: read and decoded as trained."""
    folder = export(target, tmp_path / "out", layout)
    assert not check_export(folder, target).doubts
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if layout == "flat":
        edit(folder, rope_parameters=rope)
    else:
        edit(folder, **{BACKBONE: {**config_of(folder)[BACKBONE], "rope_parameters": rope}})
    found = check_export(folder, target)
    (doubt,) = found.doubts
    assert "rotates by llama3, which llama.cpp's converter drops" in doubt
    answers = {entry.engine: entry.loads for entry in found.support}
    assert answers["llama.cpp"] is False
    assert answers["vLLM"] is True
    drafter = open_export(folder).load(target)
    assert isinstance(drafter, DSparkDrafter)
    config = LlamaConfig(head_dim=8, rope_parameters=dict(rope))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    cos, _ = drafter.rotary(torch.tensor([1]), torch.float32)
    torch.testing.assert_close(cos[0, :4], expected.cos())
