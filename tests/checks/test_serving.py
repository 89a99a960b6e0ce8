"""The train-to-serve check: sound drafters pass, each way of decoding wrongly is caught.

Known to be right by: breaks made on purpose in the decoding path, those seen in the field among
them (checkpoint-formats.md, "Traps"), which must fail at a tolerance that sound ones keep by far.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.checks.serving import Comparison, compare_paths, differing_tensors
from deepspec.cli import main
from deepspec.config.schema import DrafterConfig
from deepspec.drafters.base import Observation
from deepspec.drafters.cache import RowKV
from deepspec.drafters.dspark import DSparkDrafter, DSparkProposer
from deepspec.drafters.dspark.model import ContextKeysValues
from deepspec.drafters.ngram import NgramConfig, NgramDrafter
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import ConfigError
from deepspec.targets import Target
from tests.deepseek_v4 import load_v4, make_native, save_v4
from tests.export.conftest import make_drafter
from tests.jobs import write_recipe

KIND = drafter_kind("dspark")


def prompts() -> list[list[int]]:
    """Of 9, 4 and 21 tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 260, (n,), generator=generator).tolist() for n in (9, 4, 21)]


def compare(target: Target, drafter: DSparkDrafter) -> Comparison:
    return compare_paths(target, drafter, KIND, prompts(), 14)


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_sound_drafters_of_other_kinds_pass(target: Target, name: str) -> None:
    kind = drafter_kind(name)
    torch.manual_seed(0)
    drafter = kind.build(kind.resolve(DrafterConfig(kind=name, num_layers=1, block_size=3), target))
    found = compare_paths(target, drafter.eval(), kind, prompts(), 14)
    assert found.fine
    assert set(found.differences) == {"hidden", "logits"}
    assert max(map(max, found.differences.values())) < 0.01 * found.tolerance


def test_a_sound_drafter_of_v4_passes(tmp_path: Path) -> None:
    target = load_v4(save_v4(tmp_path, index_n_heads=32))  # with few, its index has ties
    drafter = make_native(target)
    found = compare_paths(target, drafter, drafter_kind("dspark_v4"), prompts(), 14)
    assert set(found.differences) == {"hidden", "logits", "confidence"}
    assert max(map(max, found.differences.values())) < 0.01 * found.tolerance


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "rank0", "reduced"])
def test_sound_drafters_pass(target: Target, kind: str) -> None:
    size = 100 if kind == "reduced" else None
    found = compare(target, make_drafter(target, kind.replace("reduced", "vanilla"), True, size))
    assert found.fine
    assert set(found.differences) == {"hidden", "logits", "confidence"}
    assert all(len(values) == 4 for values in found.differences.values())
    assert max(map(max, found.differences.values())) < 0.01 * found.tolerance
    assert (found.apart, found.rows) == (0, 3)
    assert 3 * 3 < found.blocks <= 3 * 13  # rounds; no row leaves before it has 14 tokens


def test_without_confidence_there_is_none_to_compare(target: Target) -> None:
    found = compare(target, make_drafter(target, "vanilla", confidence=False))
    assert set(found.differences) == {"hidden", "logits"}


def test_a_target_in_bf16(target: Target) -> None:
    half = copy.copy(target)
    half.model = copy.deepcopy(target.model).bfloat16()
    whole = Target(half.model, target.tokenizer, [1, 2, 3], "half")
    found = compare(whole, make_drafter(whole, "vanilla"))
    assert found.fine, found
    assert max(found.differences["logits"]) > 1e-4, "rounding should show"


def test_what_is_not_trained_is_refused(target: Target) -> None:
    drafter, kind = NgramDrafter(NgramConfig(4, 3, 1)), drafter_kind("ngram")
    with pytest.raises(ConfigError, match="not trained"):
        compare_paths(target, drafter, kind, prompts(), 4)


# ------------------------------------------------------------------------------- broken on purpose


def rope_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    start = DSparkProposer.start

    def started(self: Any, rows: int) -> None:
        start(self, rows)
        self._offsets = torch.arange(self.block_size) + 1

    monkeypatch.setattr(DSparkProposer, "start", started)


def context_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ContextKeysValues.__call__
    monkeypatch.setattr(
        ContextKeysValues, "__call__", lambda self, context, places: call(self, context, places + 1)
    )


def only_the_anchors_row_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """34.9 instead of 48 % of drafts accepted, in the field."""
    observe = DSparkProposer.observe

    def observed(self: Any, seen: Observation) -> None:
        if int(seen.starts.max()) == 0:  # the prompt
            return observe(self, seen)
        end = int(seen.starts.max()) + 1
        first = (seen.tokens[:, :1], seen.context[:, :1], seen.final[:, :1])
        return observe(
            self, replace(seen, tokens=first[0], context=first[1], final=first[2], end=end)
        )

    monkeypatch.setattr(DSparkProposer, "observe", observed)


def rows_that_stay_are_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        RowKV,
        "select",
        lambda self, rows: (
            setattr(self, "_keys", self._keys[: len(rows)]),
            setattr(self, "_values", self._values[: len(rows)]),
        ),
    )


def the_first_slot_alone_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = DSparkProposer._sample

    def sampled(self: Any, *arguments: Any) -> Any:
        calls = iter(range(99))

        def step(states: torch.Tensor, embedded: torch.Tensor, state: Any) -> Any:
            return embedded * (next(calls) == 0), state

        head = self.drafter.markov_head
        monkeypatch.setattr(head, "step", step)
        monkeypatch.setattr(head, "of_token", False)  # so that every slot takes a step
        try:
            return sample(self, *arguments)
        finally:
            monkeypatch.delattr(head, "step")
            monkeypatch.delattr(head, "of_token")

    monkeypatch.setattr(DSparkProposer, "_sample", sampled)


def confidence_without_the_previous_token(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence = DSparkDrafter.confidence

    def blind(self: Any, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        served = embedded.shape[0] <= 3  # a round has a block a row, the training forward all
        return confidence(self, hidden, torch.zeros_like(embedded) if served else embedded)

    monkeypatch.setattr(DSparkDrafter, "confidence", blind)


BREAKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "rope off by one": (rope_off_by_one, {"hidden", "logits", "confidence"}),
    "context off by one": (context_off_by_one, {"hidden", "logits", "confidence"}),
    "only the anchor": (only_the_anchors_row_is_written, {"hidden", "logits", "confidence"}),
    "rows mixed up": (rows_that_stay_are_mixed_up, {"hidden", "logits", "confidence"}),
    "one bias": (the_first_slot_alone_is_biased, {"logits"}),
    "blind confidence": (confidence_without_the_previous_token, {"confidence"}),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_decoding_path_is_caught(
    target: Target, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    drafter = make_drafter(target, "vanilla")
    broken, where = BREAKS[what]
    broken(monkeypatch)
    found = compare(target, drafter)
    assert not found.fine
    assert 0 < found.apart <= found.blocks
    wrong = {name for name, v in found.differences.items() if not max(v) <= found.tolerance}
    assert wrong == where
    if what == "one bias":
        assert found.differences["logits"][0] <= found.tolerance < found.differences["logits"][1]


def test_nan_is_a_difference() -> None:
    assert not Comparison({"hidden": [0.0, float("nan")]}, 1.0, 1, 1, 1).fine


def test_an_export_is_the_checkpoint_in_bf16(target: Target) -> None:
    drafter = make_drafter(target, "vanilla", draft_vocab_size=100)
    exported = copy.deepcopy(drafter)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.copy_(parameter.bfloat16().float())
    assert differing_tensors(drafter, exported) == {}
    with torch.no_grad():
        exported.fc.weight[0, 0] += 0.25
        exported.d2t[-1] += 1
    assert differing_tensors(drafter, exported) == {"fc.weight": 0.25, "d2t": 1.0}
    other = make_drafter(target, "vanilla")
    different = differing_tensors(drafter, other)
    assert different["d2t"] == different["markov_head.markov_w2.weight"] == float("inf")


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def trained(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, with its answers, checkpoints and export."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, target_folder)
    out = folder / "run"
    main(["train", f"recipe={recipe}", f"out={out}", "training.max_steps=6"])
    return out


def exit_code(*words: str) -> int:
    try:
        main(["check", *words])
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_the_command_on_a_run_a_checkpoint_and_an_export(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    monkeypatch.chdir(trained.parent)
    for place in (trained, Path("run"), newest):
        assert exit_code(f"run={place}") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "decodes as it was trained" in out
        assert "of 3 texts" in out
        assert "position hidden logits confidence" in out
        assert ("the checkpoint's weights, rounded to bf16" in out) == (place != newest)
    config = json.loads((newest / "checkpoint.json").read_text())["config"]
    own = [f"target.path={config['target']['path']}", "engine.device=cpu", "target.dtype=float32"]
    assert exit_code(f"run={trained / 'export'}", *own) == 0
    assert "decodes as it was trained" in " ".join(capsys.readouterr().out.split())

    rope_off_by_one(monkeypatch)
    assert exit_code(f"run={trained}") == 1
    assert "does NOT decode as it was trained" in " ".join(capsys.readouterr().out.split())


def test_an_export_of_another_checkpoint_is_caught(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    file = sorted((run / "checkpoints").iterdir())[0]
    shutil.rmtree(run / "export")
    main(["export", f"checkpoint={file}", f"out={run / 'export'}"])
    capsys.readouterr()
    assert exit_code(f"run={run}") == 1
    assert "is not the checkpoint's in bf16" in capsys.readouterr().out


def test_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(f"run={tmp_path}") == 2
    assert "neither a run, a checkpoint nor an export" in capsys.readouterr().err
