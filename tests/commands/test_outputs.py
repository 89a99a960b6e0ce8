"""What commands write: whole or not at all, never over the files of others, found again later."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deepspec.atomic import naming, write_text
from deepspec.cli import in_words, main
from deepspec.config.loading import load_config
from deepspec.decoding import NoDrafts
from deepspec.evaluation.evaluate import Evaluation
from deepspec.evaluation.report import Table
from deepspec.records import DecodeTrace
from deepspec.reproduction.finding import Finding
from deepspec.scheduling.calibration_file import Calibration
from deepspec.serving.contest import Contender, save_rounds
from deepspec.serving.record import write_records
from deepspec.serving.traffic import Level
from deepspec.training.metrics import MetricsLog, read_metrics
from deepspec.training.run_folder import RunFolder
from tests.recipes.small import small, words, write_prompts

TRACE = DecodeTrace("p0", 0, 4, 3, 3, 1, 2, (0.5,), 0.1)
FINDING = Finding("depth", "", "", "", (), Table([], []), [{"layers": 1, "accepted": 2.0}], ())


Refused = Callable[..., str]


@pytest.fixture(scope="module")
def settings(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prompts = write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")
    return ["recipe=tiny", *words(small(target_folder, prompts))]


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps without a report, for all tests to read and none to change."""
    out = tmp_path_factory.mktemp("trained") / "run"
    main(["train", f"out={out}", *settings, "evaluation.enabled=false"])
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to write in."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "new.jsonl"
    rows = ({"id": f"h{i}", "turns": [f"Tell of {i}."]} for i in range(6))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """`refused("train", key=value)`: the one error message, with exit code 2."""

    def call(*command: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(command))
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; nothing is left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------- whole or not at all


def save_config(folder: Path, seed: int) -> Path:
    run = RunFolder(folder)
    run.save_config(replace(load_config("tiny"), seed=seed))
    return run.config


def save_skipped(folder: Path, seed: int) -> Path:
    run = RunFolder(folder)
    run.save_skipped({"training samples": {f"reason {seed}": 1}})
    return run.skipped


def save_calibration(folder: Path, seed: int) -> Path:
    return Calibration((), f"weights {seed}").save(folder)


def save_page(folder: Path, seed: int) -> Path:
    path = folder / "report.html"
    write_text(path, f"<p>{seed}" * 10)
    return path


def save_records(folder: Path, seed: int) -> Path:
    write_records([], {"seed": seed}, folder, "load")
    (folder / "load.csv").unlink()
    return folder / "load.json"


def save_metrics(folder: Path, seed: int) -> Path:
    """At its start a training that goes on drops rows."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(9))) if not seed else None
    MetricsLog(path, 8 - seed)
    return path


def save_traces(folder: Path, seed: int) -> Path:
    path = folder / "traces.jsonl"
    Evaluation(traces=[("tiny", 0.0, seed, TRACE)]).save_traces(path)
    return path


def save_loads(folder: Path, seed: int) -> Path:
    path = folder / "load.jsonl"
    contender = Contender("fixed", f"drafter-{seed}", NoDrafts)  # type: ignore[arg-type]
    save_rounds([(contender, Level(1), [TRACE])], path)
    return path


def save_finding(folder: Path, seed: int) -> Path:
    return replace(FINDING, rows=[{**FINDING.rows[0], "seed": seed}] * 3).save(folder)


SAVED = [save_config, save_skipped, save_calibration, save_page, save_records, save_metrics]


@pytest.mark.parametrize("save", [*SAVED, save_traces, save_loads, save_finding])
def test_a_file_is_whole_or_as_it_was(save: Callable[[Path, int], Path], tmp_path: Path) -> None:
    """As after a kill: what had been written before is still there, and nothing else is. The
    message has the file, the room there is, and a way out."""
    path = save(tmp_path, 0)
    before = path.read_bytes()
    assert len(before) > 20
    with little_room(20), pytest.raises(OSError, match="File too large") as caught:
        save(tmp_path, 1)
    assert caught.value.filename == str(path)
    words = in_words(caught.value)
    assert words.startswith(f"{path}: File too large (")
    assert ("B needed, " in words) == (save in SAVED)
    assert "B free); raise the limit of the size of files (ulimit -f), or choose" in words
    assert "out=" in words
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save(tmp_path, 1)
    assert path.read_bytes() != before


# --------------------------------------------------------------------------- the files of others


@pytest.fixture
def commands(settings: list[str], trained: Path, held_out: Path, tmp_path: Path) -> dict:
    """By name, a command without its out=, and files of others that it could replace."""
    quick = [f"evaluation.benchmarks={held_out}"]
    folder = tmp_path / "load"
    return {
        "train": (settings, ["config.yaml", "metrics.jsonl", "report.md", "skipped.json"]),
        "extract": (settings, ["store.json", "answers.json"]),
        "evaluate": ([f"run={trained}"], ["report.html", "report.json", "traces.jsonl"]),
        "calibrate": ([f"run={trained}", *quick], ["calibration.json", "calibration.md"]),
        "load": ([f"run={trained}", *quick, "seconds=0.1"], ["load.csv", "throughput-dspark.json"]),
        "simulate": ([f"load={folder}", "throughput=synthetic"], ["simulate.csv"]),
        "reproduce": (settings, ["reproduction.html", "config.yaml", "table1.csv"]),
    }


@pytest.mark.parametrize(
    "command", ["train", "extract", "evaluate", "calibrate", "load", "reproduce"]
)
def test_a_folder_of_others_is_left_alone(
    command: str, commands: dict, refused: Refused, tmp_path: Path
) -> None:
    own, names = commands[command]
    for name in names:
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("mine")
        message = refused(command, *own, f"out={out}")
        assert f"out={out} holds {name}, not written by deepspec" in message
        assert "choose another folder, or move" in message
        assert contents(out) == {name: b"mine"}


def test_a_simulation_is_checked_too(commands: dict, refused: Refused, run: Path) -> None:
    main(["load", *commands["load"][0], "concurrency=1", "temperature=0", f"out={run / 'load'}"])
    words = [f"load={run / 'load'}", "seconds=1"]
    (run / "simulate.csv").write_text("mine")
    assert "holds simulate.csv, not written" in refused("simulate", *words, f"out={run}")
    assert (run / "simulate.csv").read_text() == "mine"
    main(["simulate", *words])
    first = contents(run / "load")
    main(["simulate", *words, "concurrency=4"])  # beside the first one
    both = contents(run / "load")
    assert both.keys() - first.keys() == {"simulate-2.csv", "simulate-2.json"}
    assert {name: both[name] for name in first} == first


def test_files_of_others_within_a_folder_of_ours(
    settings: list[str], refused: Refused, run: Path, tmp_path: Path
) -> None:
    """Notes may lie there; what a command would replace may not."""
    (run / "notes.txt").write_text("mine")
    (run / "report.md").write_text("mine")
    before = contents(run)
    assert "holds report.md, not written" in refused("evaluate", f"run={run}", f"out={run}")
    assert "holds report.md, not written" in refused("train", *settings, f"out={run}")
    assert contents(run) == before
    (run / "report.md").unlink()
    main(["train", *settings, f"out={run}"])  # goes on, and reports
    main(["evaluate", f"run={run}", f"out={run}"])
    assert "accepted length" in (run / "report.md").read_text()
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("lost", ["config.yaml", "checkpoints", ".lock"])
def test_what_earlier_versions_and_kills_left_is_ours(
    lost: str, settings: list[str], run: Path
) -> None:
    place = run / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    main(["train", *settings, "evaluation.enabled=false", f"out={run}"])
    assert (run / "checkpoints" / "step-00000002").is_dir()


def test_empty_files_and_folders_are_nobody_s(settings: list[str], tmp_path: Path) -> None:
    """Where a volume is mounted, and what a job's launcher made."""
    for name in ("lost+found", "checkpoints", "logs"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "answers.jsonl").touch()
    main(["train", *settings, "evaluation.enabled=false", f"out={tmp_path / 'out'}"])


def test_an_extraction_and_its_answers_go_on(settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "store"
    main(["extract", *settings, f"out={out}"])
    for file in (*out.glob("shard-*"), out / "store.json"):  # killed while it answered
        file.unlink()
    main(["extract", *settings, f"out={out}"])
    assert (out / "store.json").is_file()


@pytest.mark.parametrize("name", ["answers.json", "answers.failed.jsonl"])
def test_neighbours_of_answers(
    name: str, settings: list[str], refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "letter.txt").write_text("mine")
    out = tmp_path / "answers.jsonl"
    assert f"holds {name}, not written" in refused("regenerate", *settings, f"out={out}")
    assert contents(tmp_path) == {name: b"mine", "letter.txt": b"mine"}
    main(["regenerate", *settings, f"out={tmp_path / 'other.jsonl'}"])
    main(["regenerate", *settings, f"out={tmp_path / 'other.jsonl'}"])  # goes on


def test_a_table_is_not_written_over_another_file(
    settings: list[str], refused: Refused, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    quick = ["rows=1", "tokens=[1,2]", "context=8", "repeats=1"]
    for text in ("mine", '{"mine": 1}'):
        file.write_text(text)
        assert f"out={file} is there" in refused("profile", *settings, *quick, f"out={file}")
        assert file.read_text() == text
    file.unlink()
    for _ in range(2):  # its own it replaces
        main(["profile", *settings, *quick, f"out={file}"])


# ---------------------------------------------------------------------- places of their own


def test_results_without_out_replace_nothing(
    trained: Path,
    held_out: Path,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two evaluations of one recipe: of another drafter, or decoded in another way."""
    monkeypatch.chdir(tmp_path)
    prompts = f"evaluation.benchmarks={held_out}"
    quick = ["rows=1", "tokens=[1,2]", "context=8", "repeats=1"]
    for command, given, more in (
        ("evaluate", [f"run={trained}", prompts], "decoding.max_new_tokens=4"),
        (
            "calibrate",
            [f"run={trained}", prompts, "evaluation.limit=6"],
            "decoding.max_new_tokens=6",
        ),
        ("profile", [*settings, *quick], "context=9"),
    ):
        main([command, *given])
        first = contents(tmp_path)
        main([command, *(word for word in given if word.split("=")[0] != more.split("=")[0]), more])
        assert {name: text for name, text in contents(tmp_path).items() if name in first} == first
    expected = ["calibrate-tiny", "evaluate-tiny", "throughput-tiny"]
    places = [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]
    found = sorted(path.stem for path in places)
    assert found == sorted([*expected, *(f"{name}-2" for name in expected)])


def test_an_evaluation_that_fails_leaves_no_folder(
    trained: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("evaluate", f"run={trained}", "evaluation.benchmarks=nothing.jsonl")
    assert not list((tmp_path / "runs").iterdir())


# ----------------------------------------------------------------------------- found again later


@pytest.fixture
def project(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """A folder with a target, prompts and a run with paths relative to it, and its settings."""
    home = tmp_path / "home"
    shutil.copytree(target_folder, home / "models" / "plain")
    write_prompts(home / "prompts.jsonl")
    monkeypatch.chdir(home)
    relative = small(Path("models/plain"), Path("prompts.jsonl"))
    own = ["recipe=tiny", "out=run", "evaluation.enabled=false", *words(relative)]
    main(["train", *own])
    (tmp_path / "elsewhere").mkdir()
    return home, own


def forget_places(run: Path) -> None:
    """As versions that did not record them left it."""
    for file in run.glob("checkpoints/*/checkpoint.json"):
        raw = json.loads(file.read_text())
        raw.pop("places", None)
        file.write_text(json.dumps(raw))


def test_a_run_finds_its_target_and_data_from_another_folder(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = project
    monkeypatch.chdir(home.parent / "elsewhere")
    main(["export", f"checkpoint={home / 'run'}", "out=drafter"])
    main(["evaluate", f"run={home / 'run'}", "out=report"])  # its prompts have a path too
    report = json.loads(Path("report/report.json").read_text())
    assert report["config"]["target"]["path"] == str(home / "models" / "plain")
    monkeypatch.chdir(home)
    main(["evaluate", "run=run", "out=report"])
    report = json.loads(Path("report/report.json").read_text())
    assert (
        report["config"]["target"]["path"] == "models/plain"
    )  # as written, where that leads there


@pytest.mark.parametrize("recorded", [True, False])
def test_other_ways_to_write_a_path_go_on(
    recorded: bool,
    project: tuple[Path, list[str]],
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, own = project
    if not recorded:
        forget_places(home / "run")
    for prefix in ("./", f"{home}/", "../home/"):
        other = [word.replace("path=", f"path={prefix}") for word in own]
        capsys.readouterr()
        main(["train", *other])
        assert "going on from" in capsys.readouterr().err
    shutil.copy("prompts.jsonl", "others.jsonl")
    others = [word for word in own if not word.startswith("data.path=")]
    message = refused("train", *others, "data.path=others.jsonl")
    assert "data.path=['others.jsonl'], but run/checkpoints/step-00000002 was trained" in message


def test_a_project_that_was_moved_goes_on(
    project: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, own = project
    moved = home.rename(home.with_name("moved"))
    monkeypatch.chdir(moved)
    main(["train", *own])
    assert "going on from" in capsys.readouterr().err
    main(["export", "checkpoint=run", "out=drafter"])


def test_a_target_that_is_gone_is_not_sought_on_the_hub(
    project: tuple[Path, list[str]], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home, own = project
    elsewhere = home.parent / "elsewhere"
    monkeypatch.chdir(elsewhere)
    shutil.rmtree(home / "models")
    message = refused("evaluate", f"run={home / 'run'}")
    assert f"target.path={home / 'models' / 'plain'}: no config.json there (no such" in message
    forget_places(home / "run")
    for command in (["evaluate", f"run={home / 'run'}"], ["train", *own]):
        message = refused(*command)
        assert f"target.path=models/plain is no folder in {elsewhere}, and as a name" in message
    (elsewhere / "models" / "plain").mkdir(parents=True)
    message = refused("train", *own)
    assert "target.path=models/plain: no config.json there; give the folder" in message


# --------------------------------------------------------------- disks that are full or read-only


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk("size=4k")`: a memory file system of these options, which only root may mount."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)])
        if made.returncode:
            pytest.skip("needs the right to mount")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_names_the_file(
    settings: list[str], refused: Refused, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    """The note of the lock and the settings of the answers fit into a page each, and the answers
    do not."""
    place = disk("size=8k")
    message = refused("regenerate", *settings, f"out={place / 'a.jsonl'}")
    assert f"error: {place / 'a.jsonl'}: No space left on device (0.0 KiB free); free" in message
    assert "out=" in message


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        (errno.ENOSPC, "; free disk space, or"),
        (errno.EDQUOT, "; free some of your quota of disk space, or"),
        (errno.EFBIG, "; raise the limit of the size of files (ulimit -f), or"),
    ],
)
def test_a_way_out_of_every_full_disk(number: int, helps: str, tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, naming(tmp_path / "new" / "file", 3 * 2**20):
        raise OSError(number, os.strerror(number))
    words = in_words(caught.value)
    assert words.startswith(f"{tmp_path / 'new' / 'file'}: {os.strerror(number)} (3.0 MiB needed, ")
    assert helps in words


def test_rows_that_do_not_fit(
    settings: list[str], refused: Refused, run: Path, tmp_path: Path
) -> None:
    """Of appended files the rows before stay, and the same command goes on once there is room."""
    out = tmp_path / "a.jsonl"
    main(["regenerate", *settings, f"out={out}", "data.limit=2"])
    before = out.read_bytes()
    with little_room(len(before) + 9):
        message = refused("regenerate", *settings, f"out={out}")
    assert f"error: {out}: File too large (" in message
    assert out.read_bytes().startswith(before)
    main(["regenerate", *settings, f"out={out}"])
    assert len(out.read_text().splitlines()) == 8
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})
    with little_room(15), pytest.raises(OSError, match=r"File too large .* free") as caught:
        log.write({"step": 2})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_results_that_do_not_fit(
    run: Path, held_out: Path, refused: Refused, tmp_path: Path
) -> None:
    """The export, report and traces that were there stay as they were."""
    out = tmp_path / "measured"
    export = ["export", f"checkpoint={run}", f"out={tmp_path / 'drafter'}"]
    evaluate = ["evaluate", f"run={run}", f"evaluation.benchmarks={held_out}", f"out={out}"]
    for command, folder in ((export, tmp_path / "drafter"), (evaluate, out)):
        main(command)
        before = contents(folder)
        with little_room(5000):
            message = refused(*command)
        assert str(folder) in message
        assert " needed, " in message
        assert " free)" in message
        assert contents(folder) == before


def test_links_to_another_disk_stay_links(settings: list[str], tmp_path: Path) -> None:
    """Of the files that grow; the user made them."""
    out, big = tmp_path / "out", tmp_path / "big"
    for folder in (out, big):
        folder.mkdir()
    for name in ("answers.jsonl", "metrics.jsonl"):
        (big / name).touch()
        (out / name).symlink_to(big / name)
    for _ in range(2):
        main(["train", *settings, "evaluation.enabled=false", f"out={out}"])
    for name in ("answers.jsonl", "metrics.jsonl"):
        assert (out / name).is_symlink()
        assert (big / name).stat().st_size


@pytest.mark.parametrize(
    "command", ["train", "extract", "evaluate", "calibrate", "load", "reproduce"]
)
@pytest.mark.parametrize("name", [".", "new/below"])
def test_a_read_only_place_is_named_with_its_key(
    command: str, name: str, commands: dict, refused: Refused, disk: Callable[[str], Path]
) -> None:
    out = disk("ro,size=4k") / name
    message = refused(command, *commands[command][0], f"out={out}")
    assert f"out={out} cannot be written" in message
    assert "ead-only" in message


def test_read_only_files(
    settings: list[str], run: Path, refused: Refused, disk: Callable[[str], Path]
) -> None:
    place = disk("ro,size=4k")
    quick = ["rows=1", "tokens=[1,2]", "context=8", "repeats=1"]
    for command in (
        ["regenerate", *settings, f"out={place / 'a.jsonl'}"],
        ["profile", *settings, *quick, f"out={place / 'table.json'}"],
    ):
        assert f"out={place} cannot be written" in refused(*command)
    assert f"{place / 'drafter'}" in refused(
        "export", f"checkpoint={run}", f"out={place / 'drafter'}"
    )


# -------------------------------------------------------------------------------- broken metrics


DAMAGED = (b"\xff\xfe", b"\x00\x00", b'{"step": 2, "lo', b'{"loss": 2.0}', b"[1]", b"[" * 10**5)


def test_lines_that_are_no_metrics_stop_nothing(
    settings: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are moved aside, and the rows around them stay."""
    first, *others = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join((first, *DAMAGED, *others)) + b"\n")
    main(["train", *settings, "evaluation.enabled=false", f"out={run}"])
    said = capsys.readouterr().err
    numbers = "2, 3, 4, 5, 6 and 1 more: moved to metrics.damaged.jsonl"
    assert f"{run / 'metrics.jsonl'}: no row of metrics in lines {numbers}" in said
    assert (run / "metrics.damaged.jsonl").read_bytes().splitlines() == list(DAMAGED)
    (run / "metrics.jsonl").write_bytes(b"\n".join((first, *DAMAGED, *others)) + b"\n")
    assert [json.loads(row) for row in (first, *others)] == read_metrics(run / "metrics.jsonl")
    assert "2, 3, 4, 5, 6 and 1 more: left out" in capsys.readouterr().err


def test_a_half_written_last_row_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []
