"""What the validator leaves to a person: sound by itself, but looking like a known mistake."""

from __future__ import annotations

import re
from pathlib import Path

from deepspec.checks.export import check_export
from deepspec.targets import Target
from tests.checks.test_export import export
from tests.export.exports import edit, rewrite
from tests.export.test_speculators import foreign
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
