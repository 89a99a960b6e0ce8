"""Where a plan has its target's shape from, and that it needs no network for shipped recipes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from deepspec.cli import main
from deepspec.config.loading import load_config
from deepspec.config.resources import resource
from deepspec.errors import TargetError
from deepspec.planning.target import plan_target
from deepspec.planning.workload import read_workload
from tests.conftest import make_tokenizer
from tests.hub import closed_port, run_with_hub, serve_hub

NAME = "Qwen/Qwen3-4B"
PLAN = ("plan", "recipe=qwen3", "target.layer_ids=[0]", "tokens=950")


def parameters(shown: str) -> str:
    found = re.search(r"(?m)^target +([\d,]+)", shown)
    assert found is not None, shown
    return found[1]


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers, and nothing is cached."""
    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_hub_and_its_cache_come_before_the_shipped_shape(tmp_path: Path) -> None:
    served, home = tmp_path / "served" / NAME, tmp_path / "home"
    shipped = json.loads((resource("recipes") / "targets" / NAME / "config.json").read_text())
    served.mkdir(parents=True)
    (served / "config.json").write_text(json.dumps(shipped | {"num_hidden_layers": 5}))
    make_tokenizer().save_pretrained(served)
    with serve_hub(tmp_path / "served") as address:
        online = run_with_hub(address, home, *PLAN)
    assert online.returncode == 0, online.stderr
    assert "shape:" not in online.stdout
    cached = run_with_hub(address, home, *PLAN)  # closed by now
    assert cached.returncode == 0, cached.stderr
    assert f"shape: from the hub's cache: {address} cannot be reached" in cached.stdout
    assert parameters(cached.stdout) == parameters(online.stdout) == "893,612,800"


def test_a_hub_that_refuses_the_target_leaves_the_shipped_shape(tmp_path: Path) -> None:
    """As one does for a target behind a licence, without a token."""
    with serve_hub(tmp_path / "nothing") as address:
        done = run_with_hub(address, tmp_path / "home", *PLAN)
    assert done.returncode == 0, done.stderr
    assert f"shape: shipped with the recipes: {address} answers (HTTP 200), but " in done.stdout
    assert parameters(done.stdout) == "4,022,468,096"


def test_an_unknown_name_fails_at_once(no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main(["plan", "recipe=qwen3", "target.path=someone/something"])
    assert time.monotonic() - begun < 10
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "target.path=someone/something is no folder here and not in the hub's cache" in line
    assert "cannot be reached" in line


def test_a_shipped_shape_is_of_the_main_revision(no_hub: None) -> None:
    config = load_config("qwen3", ["target.revision=v2"])
    with pytest.raises(TargetError, match="not in the hub's cache"):
        plan_target(config.target)


def test_a_shipped_shape_has_the_context_length_of_the_config(no_hub: None) -> None:
    target, origin = plan_target(load_config("qwen3", ["target.context_length=3000"]).target)
    assert origin is not None
    assert target.context_length == 3000


def test_tools_count_among_the_tokens_of_a_prompt(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds. " * 20}}]
    row = {"turns": ["What is the sum?"]}
    (tmp_path / "plain.jsonl").write_text(json.dumps(row))
    (tmp_path / "tools.jsonl").write_text(json.dumps({**row, "tools": tools}))
    tokenizer, found = make_tokenizer(), []
    tokenizer.chat_template = "{{ tools }}" + tokenizer.chat_template
    for name in ("plain", "tools"):
        config = load_config("tiny", [f"data.path={tmp_path / name}.jsonl", f"out={tmp_path}/run"])
        found += read_workload(config, tokenizer).lengths
    (plain, answer), (whole, same) = found
    assert answer == same
    assert whole - plain > 100


def test_without_a_tokenizer_lengths_are_assumed_and_samples_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a" * 10}, {"role": "assistant", "content": "b" * 20}]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(10)))
    words = [f"data.path={file}", f"out={tmp_path / 'run'}", "training.validation_samples=2"]
    prompts = load_config("tiny", [*words, "regenerate.samples_per_prompt=3"])
    found = read_workload(prompts, None, 200)
    assert (found.samples, found.complete) == (28, False)
    assert found.mean_tokens(prompts) == 200
    assert found.source.endswith("no tokenizer here: 200 each, as assumed")
    own = load_config("tiny", [*words, "regenerate.enabled=false"])
    found = read_workload(own, None)
    assert (found.samples, found.mean_tokens(own)) == (8, 512)
    assert found.source == "data; no tokenizer here: 512 each, as data.max_length allows"
