"""A draft vocabulary and the speculators layout from the command line, from training to serving."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from deepspec.cli import main
from deepspec.commands.beginnings import first_drafter
from deepspec.config.loading import config_from
from deepspec.config.schema import TargetConfig
from deepspec.data.batching import hold_out
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import SkipCounts, load_conversations
from deepspec.evaluation.results import read_report
from deepspec.export import open_export
from deepspec.targets import Target, load_ends, load_target
from deepspec.training.checkpoint import best_checkpoint, load_drafter
from tests.conftest import make_model, make_tokenizer
from tests.recipes.small import small, words, write_prompts

SIZE = 60


@pytest.fixture(scope="module")
def settings(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prompts = write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")
    return ["recipe=tiny", *words(small(target_folder, prompts))]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of training, an evaluation and an export."""
    out = tmp_path_factory.mktemp("run") / "run"
    reduced = [f"drafter.draft_vocab_size={SIZE}", "export.format=speculators"]
    main(["train", *settings, *reduced, f"out={out}"])
    return out


@pytest.fixture
def target(target_folder: Path) -> Target:
    return load_target(TargetConfig(str(target_folder), dtype="float32", num_layer_ids=2), "cpu")


def test_the_most_frequent_tokens_are_drafted_and_said(run: Path, target: Target) -> None:
    config = config_from(yaml.safe_load((run / "config.yaml").read_text()))
    encoder = ChatEncoder(target.tokenizer, config.data.max_length)
    data = config_from({"recipe": "x", "target": {"path": "x"}, "data": {"path": ["x"]}}).data
    data.path = [str(run / "answers.jsonl")]
    samples = encode_all(load_conversations(data, SkipCounts()), encoder, SkipCounts())
    counted: Counter[int] = Counter()
    samples, held_out = hold_out(samples, config.training.validation_samples, config.seed)
    assert (len(samples), len(held_out)) == (7, 1)
    checkpoint = best_checkpoint(run / "checkpoints")
    for sample in samples:
        counted.update(sample.input_ids[sample.loss_mask].tolist())
    ids = set(load_drafter(checkpoint).vocabulary.tolist())
    assert len(ids) == SIZE
    assert 2 in ids  # ends an answer
    covered = sum(counted[token] for token in ids) / sum(counted.values())
    said = checkpoint.shape["draft_vocab_coverage"]
    assert said == pytest.approx(covered)
    assert read_report(run / "report.json").drafter["shape"]["draft_vocab_coverage"] == said
    assert f"draft vocab size: {SIZE}" in (run / "report.md").read_text()
    assert f"- draft vocab coverage: {said:g}" in (run / "report.md").read_text()
    card = (run / "export" / "README.md").read_text()
    assert f"{SIZE} of 260 tokens, {100 * said:.1f} % of those in the training answers" in card


def test_the_export_is_the_drafter_and_is_served(
    run: Path, target: Target, target_folder: Path, tmp_path: Path
) -> None:
    exported = open_export(run / "export").load(target)
    trained = load_drafter(best_checkpoint(run / "checkpoints"))
    for name, tensor in trained.state_dict().items():
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert exported.state_dict()[name].equal(expected), name
    main(["check", f"export={run / 'export'}", f"target.path={target_folder}"])
    main(["check", f"run={run}"])
    report = read_report(run / "report.json")
    assert all(result.baseline.unexplained == 0 for result in report.results if result.baseline)
    own = [f"target.path={target_folder}", "target.dtype=float32", "engine.device=cpu"]
    few = ["evaluation.limit=1", "evaluation.temperatures=[0]", "decoding.max_new_tokens=8"]
    benchmark = yaml.safe_load((run / "config.yaml").read_text())["evaluation"]["benchmarks"]
    few.append(f"evaluation.benchmarks={benchmark}".replace("'", ""))
    main(["evaluate", f"checkpoint={run / 'export'}", *own, *few, f"out={tmp_path / 'again'}"])
    again = read_report(tmp_path / "again" / "report.json")
    assert again.drafter["shape"]["draft_vocab_size"] == SIZE
    assert all(result.baseline.unexplained == 0 for result in again.results if result.baseline)


@pytest.mark.parametrize(("layout", "normed"), [("speculators", "true"), ("flat", "false")])
def test_eagle3_goes_the_same_way(
    settings: list[str],
    target: Target,
    target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    normed: str,
) -> None:
    """Its recipe exports it at the end; that is checked, and decoded with. With normed heads it is
    no flat one."""
    own, run = ["recipe=tiny_eagle3", *settings[1:]], tmp_path / "run"
    own += [f"export.format={layout}", f"drafter.qk_norm={normed}"]
    main(["train", *own, f"drafter.draft_vocab_size={SIZE}", f"out={run}"])
    exported = open_export(run / "export").load(target)
    trained = load_drafter(best_checkpoint(run / "checkpoints"))
    assert exported.config == trained.config
    assert exported.vocabulary.equal(trained.vocabulary)
    main(["check", f"export={run / 'export'}", f"target.path={target_folder}"])
    main(["check", f"run={run}"])
    decode = [*own, "drafter.kind=eagle3", f"out={tmp_path / 'again'}"]
    main(["evaluate", f"checkpoint={run / 'export'}", *decode])
    again = read_report(tmp_path / "again" / "report.json")
    assert (again.drafter["kind"], again.drafter["shape"]["draft_vocab_size"]) == ("eagle3", SIZE)
    assert all(result.baseline.unexplained == 0 for result in again.results if result.baseline)
    if normed == "false":
        return
    flat = ["export", f"checkpoint={run}", "format=flat", f"out={tmp_path / 'flat'}"]
    message = "no normed heads (train with drafter.qk_norm=false); set export.format=speculators"
    assert message in refused(capsys, *flat)


def test_the_ends_alone_give_the_same_vocabulary(run: Path, target: Target) -> None:
    """Features from elsewhere: the target's generation config is read, not the model's."""
    config = config_from(yaml.safe_load((run / "config.yaml").read_text()))
    config.target.layer_ids = list(target.layer_ids)
    ends = load_ends(config.target, "cpu")
    drafters = [first_drafter(config, one, [], None) for one in (target, ends)]
    assert drafters[0].vocabulary.equal(drafters[1].vocabulary)
    assert 2 in drafters[0].vocabulary


# -------------------------------------------------------------------------------------- refusals


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(command))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["drafter.draft_vocab_size=50"], "export.format=flat cannot hold.*set .*=speculators"),
        (
            ["drafter.markov_head=gated", "export.format=speculators"],
            "export.format=speculators cannot hold this drafter: .* not gated ones; set .*=flat",
        ),
        (["drafter=dflash", "export.format=speculators"], r"\(rank 0\); set export.format=flat"),
        (["drafter.kind=eagle3"], r"drafter.qk_norm=false\); set export.format=speculators"),
        (["drafter.draft_vocab_size=0"], "drafter.draft_vocab_size=0 must be at least 1"),
        (
            ["drafter.draft_vocab_size=261", "export.format=speculators"],
            "drafter.draft_vocab_size=261 is more than the target's vocabulary of 260",
        ),
        (["export.format=round"], "export.format=round must be one of flat, speculators"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    error = refused(capsys, "train", *settings, *changes, f"out={tmp_path / 'out'}")
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_export_in_a_layout_that_cannot_hold_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", f"checkpoint={run}", "format=flat", f"out={tmp_path / 'out'}"]
    error = refused(capsys, *command)
    assert "export.format=flat cannot hold this drafter: no engine reads a reduced" in error
    assert "set export.format=speculators" in error
    assert not (tmp_path / "out").exists()


def test_an_export_for_another_target(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    own = [f"target.path={tmp_path / 'other'}", "engine.device=cpu"]
    for command in ("evaluate checkpoint=", "check run="):
        error = refused(capsys, *f"{command}{run / 'export'}".split(), *own)
        assert "was made for another target than" in error
        assert "weights differ" in error


def test_a_foreign_export_asks_for_its_target(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run / "export", tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["deepspec"], config["speculators_config"]
    (copy / "config.json").write_text(json.dumps(config))
    error = refused(capsys, "evaluate", f"checkpoint={copy}")
    assert "does not say its target; say where it is by target.path=DIR" in error
