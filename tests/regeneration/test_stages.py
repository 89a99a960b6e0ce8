"""From data as people have them to the samples of a training, through the stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspec.commands.stages import load_samples, make_answers
from deepspec.config.loading import load_config
from deepspec.config.schema import RunConfig
from deepspec.records import Sample
from deepspec.targets import Target
from tests.regeneration.conftest import CALL, TOOLS, shortened


def config_of(recipe: Path, data: Path, out: Path, *words: str) -> RunConfig:
    changes = ["regenerate.max_new_tokens=24", "regenerate.temperature=0", *words]
    return load_config(str(recipe), [f"data.path={data}", f"out={out}", *changes])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(config: RunConfig, target: Target) -> tuple[list[Sample], dict[str, int]]:
    data = load_samples(config, target, Path(config.out) / "answers.jsonl")
    return [*data.samples, *data.validation], data.skipped["training samples"]


def test_a_lower_limit_trains_on_what_is_wanted(
    recipe: Path, writer: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"q{i}", "turns": [f"What is {i}?"]} for i in range(6)]
    prompts, out = write(tmp_path / "prompts.jsonl", rows), tmp_path / "run"
    for limit, unused in ((6, 0), (4, 2), (6, 0)):
        config = config_of(recipe, prompts, out, f"data.limit={limit}")
        make_answers(config, writer, out / "answers.jsonl", lambda: None)
        samples, skipped = samples_of(config, writer)
        assert {sample.sample_id for sample in samples} == {f"q{i}" for i in range(limit)}
        said = "2 rows are not used here, because the data no longer have their prompts, but a"
        assert (said in capsys.readouterr().err) == bool(unused)
        assert not skipped


def test_samples_end_at_the_context_and_say_so(
    recipe: Path, writer: Target, writer_folder: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "Well " * 20}]
    data = write(tmp_path / "data.jsonl", [{"messages": turns}, {"turns": ["x"]}])
    config = config_of(recipe, data, tmp_path, "regenerate.enabled=false", "data.max_length=80")
    (sample,), skipped = samples_of(config, writer)
    assert len(sample) == 80
    cut = "the rest of a sample after "
    assert skipped == {cut + "data.max_length=80": 1, "no answer (first in data-2)": 1}
    short = shortened(writer_folder, tmp_path / "short", 64)
    (sample,), skipped = samples_of(config, short)
    assert len(sample) == 64
    assert skipped == {
        cut + "the end of the target's context, 64": 1,
        "no answer (first in data-2)": 1,
    }


def test_agentic_rows_reach_the_training(recipe: Path, writer: Target, tmp_path: Path) -> None:
    """Calls of the data and their results are read back as they were, beside the answers."""
    turns = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
    ]
    data = write(tmp_path / "data.jsonl", [{"id": "a", "tools": TOOLS, "messages": turns}])
    config = config_of(recipe, data, tmp_path)
    make_answers(config, writer, tmp_path / "answers.jsonl", lambda: None)
    (row,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
        "supervised": False,
    }
    (sample,), _ = samples_of(config, writer)
    answer, ids = row["messages"][-1]["token_ids"], sample.input_ids.tolist()
    places = [place for place in range(len(ids)) if ids[place : place + len(answer)] == answer]
    assert len(places) == 1
    assert sample.loss_mask[places[0] : places[0] + len(answer)].all()
