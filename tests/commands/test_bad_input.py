"""Mistakes as users make them: one message that says what to change, exit code 2, nothing lost.

Every command runs whole, from its words on; the expected fragments name what was broken on purpose.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepspec.cli import main
from deepspec.commands.sources import from_checkpoint
from deepspec.evaluation.results import read_report
from deepspec.targets.families import FAMILIES
from deepspec.training.checkpoint import (
    OPTIMIZER,
    WEIGHTS,
    list_checkpoints,
    load_drafter,
    read_checkpoint,
    read_tensors,
)
from deepspec.training.run_folder import RunFolder
from tests.conftest import make_model, make_tokenizer
from tests.recipes.small import STEPS, small, words, write_prompts
from tests.targets.tiny import CONFIGS, make_causal_lm

Refused = Callable[..., str]

# A file as large as the optimizer's state does not fit, everything smaller does.
WITH_LITTLE_ROOM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
from deepspec.cli import main
main(sys.argv[1:])
"""
HOLD_THE_FOLDER = """
import sys
from pathlib import Path
from deepspec.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def settings(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return small(target_folder, write_prompts(folder / "prompts.jsonl"))


@pytest.fixture(scope="module")
def trained(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, for all tests to read and none to change."""
    out = tmp_path_factory.mktemp("trained") / "run"
    main(["train", "recipe=tiny", f"out={out}", *words(settings)])
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """`refused("train", key=value)`: runs it with small settings, gives the one error message."""
    monkeypatch.chdir(tmp_path)  # `out` has defaults below it

    def call(command: str, *changes: str) -> str:
        base = ["recipe=tiny", "out=out", *words(settings)] if command == "train" else []
        with pytest.raises(SystemExit) as end:
            main([command, *base, *changes])
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0]  # one line, and nothing behind it
        return errors[0]

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; the lock is not content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def flip(path: Path) -> None:
    """Another byte in the middle, the length as before."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ------------------------------------------------------------------------------- words and keys


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("training.learning_rte=1", "did you mean training.learning_rate?"),
        ("lerning_rate=1", "did you mean training.learning_rate?"),
        ("training.batch_size=many", "training.batch_size=many must be a whole number"),
        ("training.epochs=0", "training.epochs=0.0 must be greater than 0"),
        ("engine=zero9", "engine=zero9 must be one of"),
        ("drafter.kind=eagle", "drafter.kind=eagle must be one of dspark, dflash"),
    ],
)
def test_words(change: str, expected: str, refused: Refused, tmp_path: Path) -> None:
    assert expected in refused("train", change)
    assert not (tmp_path / "out").exists()


def test_saved_configs_are_changed_by_valid_keys_only(refused: Refused, trained: Path) -> None:
    message = refused("evaluate", f"run={trained}", "decoding.batchsize=2")
    assert "did you mean decoding.batch_size?" in message
    assert "recipe=tiny" in refused("evaluate", f"run={trained}", "recipe=tiny")


# ---------------------------------------------------------------------------------- the target


def test_missing_target(refused: Refused, tmp_path: Path) -> None:
    message = refused("train", f"target.path={tmp_path / 'nothing'}")
    assert f"target.path={tmp_path / 'nothing'}: no config.json there" in message


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_broken_target(file: str, refused: Refused, target_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(target_folder, tmp_path / "copy"))
    truncate(copy / file)
    message = refused("train", f"target.path={copy}")
    if file == "model.safetensors":
        assert f"target.path={copy} could not be loaded" in message
        assert "files are complete" in message
    else:
        assert f"{copy / file} is damaged or unreadable" in message


@pytest.mark.parametrize(
    "command", ["train target.path={}", "check target={}", "check target={} data=a"]
)
@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_generation_config(
    command: str, text: str, refused: Refused, target_folder: Path, tmp_path: Path
) -> None:
    """Transformers takes a broken one as missing: the tokens that end an answer would be lost."""
    copy = Path(shutil.copytree(target_folder, tmp_path / "copy"))
    (copy / "generation_config.json").write_text(text)
    message = refused(*command.format(copy).split())
    assert f"{copy / 'generation_config.json'} is damaged or unreadable" in message


def test_tokenizer_without_a_chat_template(refused: Refused, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer(template=None).save_pretrained(tmp_path / "base")
    message = refused("train", f"target.path={tmp_path / 'base'}")
    assert f"the tokenizer of {tmp_path / 'base'} has no chat template" in message
    assert "chat_template.jinja" in message


def test_a_target_that_cannot_be_rolled_back_is_not_trained_for_in_vain(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, "qwen3_5_text")
    make_causal_lm(CONFIGS["qwen3_5_text"]()).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    message = refused("train", f"target.path={tmp_path / 'target'}", "target.num_layer_ids=1")
    assert "target family 'qwen3_5_text' keeps a recurrent or compressed state" in message
    assert "deepspec check target=PATH target.rollback=snapshot" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["target.attention=flex_attention"], "set target.attention=sdpa, or eager"),
        (["target.rollback=snapshot", "decoding.compile=true"], "set decoding.compile=false"),
        (
            ["decoding.scheduler=algorithm1", "decoding.throughput=missing.csv"],
            "decoding.throughput=missing.csv does not exist",
        ),
        (
            ["decoding.scheduler=threshold", "drafter.confidence_head=false"],
            "decoding.scheduler=threshold needs a drafter with a confidence head",
        ),
        (["decoding.scheduler=threshold", "drafter.kind=dflash"], "a confidence head"),
    ],
)
def test_decoding_that_cannot_be_is_refused_before_a_training(
    changes: list[str], expected: str, refused: Refused, trained: Path, tmp_path: Path
) -> None:
    """Answers made before: nothing decodes until the evaluation."""
    answers = [f"data.path={trained / 'answers.jsonl'}", "regenerate.enabled=false"]
    assert expected in refused("train", *answers, *changes)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("target.layer_ids=[3,1]", "target.layer_ids=[3, 1] must be distinct and ascending"),
        ("target.layer_ids=[1,9]", "between -1 (the embedding) and 4"),
        ("target.layer_ids=[-2,1]", "between -1 (the embedding) and 4"),
        ("target.layer_ids=[1,5]", "the last layer is never captured"),
        ("target.num_layer_ids=9", "target.num_layer_ids=9 does not fit a target of 6 layers"),
        ("drafter.mask_token_id=260", "choose an id from 0 to 259"),
        ("drafter.mask_token_id=-1", "choose an id from 0 to 259"),
        ("drafter.num_attention_heads=3", "not a multiple of drafter.num_key_value_heads=2"),
    ],
)
def test_what_does_not_fit_the_target(change: str, expected: str, refused: Refused) -> None:
    assert expected in refused("train", change, "regenerate.max_new_tokens=1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(refused: Refused) -> None:
    assert "engine.device=cuda" in refused("train", "engine.device=cuda")


# ------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"turns": ["a"]}\n\n{"turns": ["b"\n', "rows.jsonl, line 3: not JSON"),
        (b'{"turns": ["a"]}\n[1, 2]\n', "rows.jsonl, line 2: expected a JSON object"),
        (
            b'\xef\xbb\xbf[{"turns": ["a"]}]',
            "line 1: expected a JSON object, found [{'turns': ['a']}]; one",
        ),
        (
            b'{"text": "a"}\n{"turns": []}\n',
            "(1 x no messages field (first in rows-1), 1 x empty conversation (first in ",
        ),
        (b"", "(no rows)"),
        pytest.param(
            '{"turns": ["a"]}\n{"turns": ["caf\u00e9"]}\n'.encode("latin1"),
            "rows.jsonl, line 2: not UTF-8",
        ),
    ],
)
def test_rows(text: bytes, expected: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(text)
    message = refused("train", "data.path=rows.jsonl")
    assert expected in message
    if "(" in expected:
        assert "no usable conversation in data.path" in message
        assert "data.fields" in message


def test_missing_data_names_the_nearest_file(refused: Refused, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    message = refused("train", f"data.path={tmp_path / 'promts.jsonl'}")
    assert f"did you mean {tmp_path / 'prompts.jsonl'}?" in message


def test_prompts_that_are_all_too_long(refused: Refused) -> None:
    message = refused("train", "data.max_length=3")
    assert "not one of 8 samples got an answer" in message
    assert "data.max_length=3" in message


# ----------------------------------------------------------------------- checkpoints and exports


def test_checkpoint_of_another_target(
    refused: Refused, trained: Path, target_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_model(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    before = contents(trained)
    place = trained / "checkpoints" / "step-00000002"
    for command in (
        ["evaluate", f"run={trained}"],
        ["export", f"checkpoint={place}", "out=export"],
        ["train", f"training.resume={place}"],
    ):
        message = refused(*command, f"target.path={other}")
        assert "trained for another target" in message
        assert "weights differ" in message
        assert str(target_folder) in message
    assert contents(trained) == before
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_broken_checkpoint(
    file: str, damage: Callable[[Path], None], refused: Refused, run: Path
) -> None:
    place = run / "checkpoints" / "step-00000002"
    damage(place / file)
    before = contents(run)
    resume = ["train", f"out={run}", f"training.resume={place}"]
    commands = [resume] if file == OPTIMIZER else [resume, ["evaluate", f"checkpoint={place}"]]
    for command in commands:
        message = refused(*command)
        assert str(place / file) in message
        assert re.search("corrupt|missing", message)
    after = contents(run)
    assert {name for name in before if after.get(name) != before[name]} <= {"config.yaml"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is damaged or unreadable"),
        ('{"format": 9}', "has format 9, this version reads 1"),
        ('{"format": 1}', "is damaged (step: Field required; kind: Field required"),
        (
            '{"format": 1, "step": "2"}',
            "is damaged (step: Input should be a valid integer, found '2'",
        ),
        ("[]", "found []"),
    ],
)
def test_broken_description(text: str, expected: str, refused: Refused, run: Path) -> None:
    for place in list_checkpoints(run / "checkpoints"):
        (place / "checkpoint.json").write_text(text)
    message = refused("evaluate", f"run={run}")
    assert expected in message
    assert "checkpoint.json" in message


def test_a_saved_config_with_an_unknown_key_names_its_checkpoint(
    refused: Refused, run: Path
) -> None:
    for place in list_checkpoints(run / "checkpoints"):
        file = place / "checkpoint.json"
        file.write_text(file.read_text().replace('"num_layers"', '"layer_count"'))
    message = refused("evaluate", f"run={run}")
    assert "checkpoint.json does not fit this version" in message
    assert "drafter.layer_count" in message


def test_an_export_for_a_local_target_asks_where_it_is(refused: Refused, trained: Path) -> None:
    message = refused("evaluate", f"checkpoint={trained / 'export'}")
    assert "was made for a local target" in message
    assert "target.path=DIR or by recipe=R" in message


def test_the_recipe_that_it_asks_for_is_taken(
    trained: Path, target_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    target = f"target: {{path: {target_folder}, num_layer_ids: 2}}"
    recipe.write_text(f"defaults: [tiny, _self_]\n{target}\nengine: {{device: cpu}}\n")
    export = trained / "export"
    main(["export", f"checkpoint={export}", f"recipe={recipe}", f"out={tmp_path / 'again'}"])
    main(["check", f"run={tmp_path / 'again'}", f"recipe={recipe}"])
    main(["check", f"export={export}", f"recipe={recipe}"])


def test_checkpoint_that_reads_other_layers(refused: Refused, trained: Path) -> None:
    message = refused("evaluate", f"run={trained}", "target.layer_ids=[1,2,3]")
    assert "target.layer_ids" in message


def test_a_checkpoint_directly_below_the_root(trained: Path) -> None:
    """Where a container mounts it; there is no run around it."""
    checkpoint = read_checkpoint(trained / "checkpoints" / "step-00000002")
    source = from_checkpoint(replace(checkpoint, folder=Path("/checkpoint")))
    assert (source.step, source.run) == (2, None)


def test_broken_skipped_rows(refused: Refused, run: Path) -> None:
    (run / "skipped.json").write_text('{"prom')
    assert "skipped.json is damaged" in refused("evaluate", f"run={run}", "out=report")


def test_an_export_does_without_a_broken_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(run / "report.json")
    out = run.parent / "drafter"
    main(["export", f"checkpoint={run}", f"out={out}"])
    said = capsys.readouterr().err
    assert f"no measured acceptance: {run / 'report.json'} is damaged or unreadable" in said
    assert "Not measured yet." in (out / "README.md").read_text()


def test_an_export_of_an_export_tells_no_tales_of_its_training(
    trained: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """Which it does not know, but for the anchors that its config names."""
    own = [f"target.path={settings['target.path']}", "format=speculators"]
    main(["export", f"checkpoint={trained / 'export'}", f"out={tmp_path / 'second'}", *own])
    cards = [
        (place / "README.md").read_text() for place in (trained / "export", tmp_path / "second")
    ]
    assert ["## Training" in card for card in cards] == [True, False]
    assert "optimizer steps" not in cards[1]
    assert "\n\n\n" not in cards[1]
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["num_anchors"] == 4


def test_a_full_disk_leaves_reports_as_they_were(run: Path) -> None:
    """What was written last is there, whole; a half one would be in the way of other commands."""
    folder, report = RunFolder(run), read_report(run / "report.json")
    folder.save_skipped({"prompts": {"no user turn": 2}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        for save in (
            lambda: report.save(run / "report.json"),
            lambda: folder.save_skipped({"prompts": {"no user turn": 3}}),
        ):
            with pytest.raises(OSError, match="File too large"):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_report(run / "report.json") == report
    assert folder.read_skipped() == {"prompts": {"no user turn": 2}}


@pytest.mark.parametrize("damage", [truncate, flip])
def test_broken_export(
    damage: Callable[[Path], None], refused: Refused, run: Path, settings: dict[str, str]
) -> None:
    damage(run / "export" / "model.safetensors")
    own = ["recipe=tiny", *words(settings)]
    message = refused("evaluate", f"checkpoint={run / 'export'}", *own)
    assert f"{run / 'export' / 'model.safetensors'} is corrupt or incomplete" in message


def test_nothing_to_evaluate(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere does not exist" in refused("evaluate", "run=nowhere")
    message = refused("evaluate", f"run={tmp_path}")
    assert "neither a run, a checkpoint nor an export" in message
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refused("evaluate", f"run={tmp_path / 'file'}")


def test_an_export_takes_no_foreign_folder(refused: Refused, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    message = refused("export", f"checkpoint={trained}", "out=mine")
    assert "thesis.txt" in message
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# ------------------------------------------------------------------------------------- the run


def test_full_disk_keeps_the_previous_checkpoint(
    run: Path, settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    previous = run / "checkpoints" / "step-00000002"
    before = contents(previous)
    more = [f"training.max_steps={STEPS + 1}", f"training.resume={previous}"]
    command = ["train", "recipe=tiny", f"out={run}", *words(settings), *more]
    code = WITH_LITTLE_ROOM.format(room=(previous / OPTIMIZER).stat().st_size - 1)
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert f"could not save {run / 'checkpoints' / 'step-00000003'}" in result.stderr
    assert "Free disk space" in result.stderr

    assert list_checkpoints(run / "checkpoints")[-1] == previous
    assert contents(previous) == before
    assert not list((run / "checkpoints").glob(".*"))
    load_drafter(read_checkpoint(previous))
    main(command)  # with room again, the very same command goes on
    assert f"going on from {previous}" in capsys.readouterr().err
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-00000003"


def test_no_room_at_all(refused: Refused) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        message = refused("train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in message


def test_nan_loss(refused: Refused, trained: Path, tmp_path: Path) -> None:
    # the first update takes the weights to 1e30, so the second forward overflows
    message = refused(
        "train",
        f"data.path={trained / 'answers.jsonl'}",
        "regenerate.enabled=false",
        "training.learning_rate=1e30",
        "training.warmup_ratio=0",
        "training.max_steps=4",
    )
    found = re.search(r"at step (\d+); samples[^:]*: ([^.]*)", message)
    assert found, message
    step, samples = found.groups()
    assert step == "2"
    ids = samples.split(", ")
    rows = (trained / "answers.jsonl").read_text().splitlines()
    assert 1 <= len(ids) <= 4
    assert set(ids) <= {json.loads(row)["id"] for row in rows}
    for advice in ("training.learning_rate", "training.warmup_ratio", "training.precision=fp32"):
        assert advice in message
    kept = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert [entry.name for entry in kept] == ["step-00000001"]
    assert "the last checkpoint is step-00000001" in message
    tensors = read_tensors(read_checkpoint(kept[0]), WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_an_evaluation_that_fails_costs_no_export(
    refused: Refused, trained: Path, tmp_path: Path
) -> None:
    """Its prompt is too long, which is known when it is encoded."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"turns": ["word " * 20]}))
    answers = [f"data.path={trained / 'answers.jsonl'}", "regenerate.enabled=false"]
    message = refused("train", *answers, "evaluation.benchmarks=long.jsonl")
    assert "long.jsonl has no usable prompt" in message
    exported, expected = (folder / "export" for folder in (tmp_path / "out", trained))
    assert {path.name for path in exported.iterdir()} == {path.name for path in expected.iterdir()}


def test_run_folder_in_use(refused: Refused, run: Path) -> None:
    before = contents(run)
    command = [sys.executable, "-c", HOLD_THE_FOLDER, str(run)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        message = refused("train", f"out={run}")
        other.communicate("")
    assert f"{run} is in use by another deepspec process" in message
    assert "out=" in message
    assert contents(run) == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_run_folder_that_cannot_be(place: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert f"out={place} cannot be written" in refused("train", f"out={place}")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_other_settings_do_not_go_on_by_themselves(refused: Refused, run: Path) -> None:
    message = refused("train", f"out={run}", "training.learning_rate=1e-5")
    assert "training.learning_rate=1e-05" in message
    assert "was trained with 0.002" in message
    for way_out in ("out=", "training.resume=never", "training.resume="):
        assert way_out in message
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [
        "step-00000001",
        "step-00000002",
    ]


def test_resume_from_what_is_no_checkpoint(refused: Refused) -> None:
    message = refused("train", "training.resume=yes")
    assert "training.resume=yes is neither auto, never, nor the folder of a checkpoint" in message


def test_a_refused_command_leaves_the_run_as_it_was(refused: Refused, run: Path) -> None:
    before = contents(run)
    refused("train", f"out={run}", "training.learning_rate=1e-5")
    assert contents(run) == before


@pytest.mark.parametrize("name", ["gsm9k", "nothing.jsonl"])
def test_unknown_benchmarks_are_refused_before_any_work(
    name: str, refused: Refused, tmp_path: Path
) -> None:
    message = refused("train", f"evaluation.benchmarks={name}")
    assert f"evaluation.benchmarks: {name} is neither a benchmark nor a .jsonl file" in message
    assert not (tmp_path / "out" / "checkpoints").exists()
