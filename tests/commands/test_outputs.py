"""What commands write: whole or not at all, never over the files of others, found again later."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deepspec.config.loading import load_config
from deepspec.decoding import NoDrafts
from deepspec.evaluation.evaluate import Evaluation
from deepspec.evaluation.report import Table
from deepspec.records import DecodeTrace
from deepspec.reproduction.finding import Finding
from deepspec.serving.contest import Contender, save_rounds
from deepspec.serving.traffic import Level
from deepspec.training.run_folder import RunFolder

TRACE = DecodeTrace("p0", 0, 4, 3, 3, 1, 2, (0.5,), 0.1)
FINDING = Finding("depth", "", "", "", (), Table([], []), [{"layers": 1, "accepted": 2.0}], ())


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


@pytest.mark.parametrize("save", [save_config, save_traces, save_loads, save_finding])
def test_a_file_is_whole_or_as_it_was(save: Callable[[Path, int], Path], tmp_path: Path) -> None:
    """As after a kill: what had been written before is still there, and nothing else is."""
    path = save(tmp_path, 0)
    before = path.read_bytes()
    assert len(before) > 20
    with little_room(20), pytest.raises(OSError, match="File too large") as caught:
        save(tmp_path, 1)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save(tmp_path, 1)
    assert path.read_bytes() != before
