"""Each benchmark is measured from a schedule that has seen nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspec.config.loading import config_from
from deepspec.evaluation.evaluate import evaluate
from deepspec.scheduling.drafting import NEEDED
from deepspec.targets import Target
from tests.decoding.proposers import ConfidentProposer


@pytest.mark.parametrize("scheduler", ["algorithm1", "async"])
def test_no_benchmark_inherits_what_another_has_seen(
    target: Target, tmp_path: Path, scheduler: str
) -> None:
    """Drafting does not pay here, which takes some rounds to see, in every benchmark anew."""
    table = tmp_path / "sps.csv"
    table.write_text("tokens,steps_per_second,propose_seconds\n1,1000,0.001\n100,10,0.001\n")
    prompts = [{"id": f"p{i}", "turns": [f"Tell of {i}."]} for i in range(2)]
    files = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def rounds(*benchmarks: Path) -> dict[str, list[tuple[int, int, int]]]:
        names = [str(file) for file in benchmarks]
        raw = {
            "recipe": "test",
            "target": {"path": "unused"},
            "data": {"path": ["unused"]},
            "evaluation": {
                "benchmarks": names,
                "temperatures": [0.0],
                "baseline_prompts": 1,
                "ngram": False,
            },
            "decoding": {
                "scheduler": scheduler,
                "throughput": str(table),
                "max_new_tokens": 20,
                "stop_token_ids": [],
                "batch_size": 1,
            },
        }
        config = config_from(raw)
        found: dict[str, list[tuple[int, int, int]]] = {}
        proposer = ConfidentProposer(target.vocab_size)
        for name, _, _, trace in evaluate(config, target, proposer, show=False).traces:
            found.setdefault(name, []).append((trace.round, trace.proposed, trace.scheduled))
        return found

    both = rounds(*files)
    assert both["two"] == both["one"] == rounds(files[1])["two"]
    drafted = [proposed > 0 for _, proposed, _ in both["one"]]
    assert drafted.index(False) >= NEEDED
    assert not any(drafted[drafted.index(False) :])
