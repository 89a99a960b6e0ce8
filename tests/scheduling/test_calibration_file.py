"""calibration.json: what is saved is read back, and belongs to the weights beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepspec.errors import CheckpointError, ConfigError
from deepspec.scheduling.calibration import Rounds, Scaling
from deepspec.scheduling.calibration_file import (
    NAME,
    Calibration,
    Fit,
    Half,
    read_calibration,
    weights_digest,
)
from deepspec.scheduling.reliability import measure
from tests.scheduling.rounds import draw_traces

MADE = ("platt", ("chat.jsonl",), "abc", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A drafter's folder, as far as a calibration looks at it."""
    for name in ("drafter", "optimizer"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    return tmp_path


def calibration_for(folder: Path) -> Calibration:
    rounds = Rounds.of(draw_traces(50, [1.0, 2.0], seed=0))
    half = Half(10, len(rounds), measure(rounds), measure(rounds, Scaling((2.0, 0.5), (0.0, 0.1))))
    halves = {"fit": half, "held_out": half}
    fits = (
        Fit(0.0, 0.9, 4, Scaling((1.5, 2.0), (0.0, 0.1)), halves, *MADE),
        Fit(0.7, 0.9, 4, Scaling((0.5, 1.0), (0.0, 0.0)), halves, *MADE),
    )
    return Calibration(fits, weights_digest(folder))


def test_saved_is_read_back(folder: Path) -> None:
    calibration = calibration_for(folder)
    assert calibration.save(folder) == folder / NAME
    assert read_calibration(folder) == calibration


def test_scaling_of_a_way_of_decoding(folder: Path) -> None:
    calibration = calibration_for(folder)
    assert calibration.scaling(0.7, 0.9, 4).temperatures == (0.5, 1.0)
    assert calibration.scaling(0.0, 1.0, 0).shifts == (0.0, 0.1)  # greedy has no top_p and top_k
    for other in ((1.0, 0.9, 4), (0.7, 1.0, 4), (0.7, 0.9, 0)):
        with pytest.raises(ConfigError, match=r"only for 0 \(0.9, 4\), 0.7 \(0.9, 4\).*calibrat"):
            calibration.scaling(*other)


def test_no_calibration(folder: Path) -> None:
    assert read_calibration(folder) is None
    (folder / "config.json").write_text("{}")
    assert read_calibration(folder) is None


def test_an_export_carries_the_scaling(folder: Path) -> None:
    calibration = calibration_for(folder)
    config = {"deepspec": {"version": "1", "calibration": calibration.embedded()}}
    (folder / "config.json").write_text(json.dumps(config))
    found = read_calibration(folder)
    assert found is not None
    assert found.scaling(0.7, 0.9, 4) == calibration.scaling(0.7, 0.9, 4)
    assert found.fits[0].method == "platt"
    assert not found.fits[0].halves


def test_fits_for_other_ways_of_decoding_are_kept(folder: Path) -> None:
    """While the weights are theirs; greedy decoding is one way, whatever top_p says."""
    earlier = calibration_for(folder)
    greedy = Fit(0.0, 1.0, 0, Scaling((3.0, 3.0), (0.0, 0.0)))
    new = Calibration((greedy,), weights_digest(folder))
    assert new.beside(folder) == new
    earlier.save(folder)
    assert new.beside(folder).fits == (earlier.fits[1], greedy)
    (folder / "drafter.safetensors").write_bytes(b"retrained")
    assert new.beside(folder) == new
    (folder / NAME).write_text("[1")
    assert new.beside(folder) == new


def test_the_first_format_is_read(folder: Path) -> None:
    """It said how fits were made once, for all of them."""
    calibration = calibration_for(folder)
    path = calibration.save(folder)
    raw = json.loads(path.read_text())
    for fit in raw["fits"]:
        made = {key: fit.pop(key) for key in ("method", "benchmarks", "prompts", "checked")}
    path.write_text(json.dumps({**raw, **made, "format": 1}))
    assert read_calibration(folder) == calibration


def test_other_weights_are_refused(folder: Path) -> None:
    calibration_for(folder).save(folder)
    (folder / "optimizer.safetensors").write_bytes(b"went on")
    assert read_calibration(folder) is not None
    (folder / "drafter.safetensors").write_bytes(b"retrained")
    with pytest.raises(CheckpointError, match=r"calibration.json was fitted to other weights"):
        read_calibration(folder)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw.update(format=7), "another version"),
        (lambda raw: raw.pop("fits"), "damaged.*array, found None"),
        (lambda raw: raw["fits"][0].pop("scaling"), "damaged.*scaling"),
        (lambda raw: raw["fits"][0]["scaling"].update(shifts=["x"]), "damaged.*'x'"),
        (lambda raw: raw["fits"][0].pop("top_k"), "damaged.*top_k"),
        (lambda raw: raw.update(fits=3), "damaged"),
        (lambda raw: raw["fits"][1]["halves"]["fit"].pop("after"), "damaged.*after"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Any], Any], expected: str) -> None:
    path = calibration_for(folder).save(folder)
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=expected):
        read_calibration(folder)
    path.write_text("[1")
    with pytest.raises(CheckpointError, match="unreadable"):
        read_calibration(folder)
