"""SPS(B): the rule between, below and behind the points, and the files it is read from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deepspec.errors import ConfigError
from deepspec.scheduling.throughput import Point, Throughput, read_throughput

TABLE = Throughput((Point(2, 10.0, 0.1), Point(4, 5.0, 0.2), Point(8, 4.0, 0.0)), {"target": "t"})


def test_seconds_lie_on_lines() -> None:
    seconds = {1: 0.1, 2: 0.1, 3: 0.15, 4: 0.2, 6: 0.225, 8: 0.25, 12: 0.3, 16: 0.35}
    found = TABLE.steps_per_second(list(seconds))
    assert (1 / found).tolist() == pytest.approx(list(seconds.values()))
    assert float(TABLE.steps_per_second(4)) == pytest.approx(5.0)


def test_more_tokens_are_never_faster() -> None:
    noisy = Throughput((Point(1, 10.0), Point(2, 8.0), Point(4, 9.0), Point(8, 8.5)))
    steps = noisy.steps_per_second(np.arange(1, 40))
    assert (np.diff(steps) <= 0).all()
    assert steps[1:].tolist() == pytest.approx([8.0] * 38)


def test_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sps.json"
    TABLE.save(path)
    assert read_throughput(str(path)) == TABLE
    assert json.loads(path.read_text())["points"][1]["steps_per_second"] == 5.0


def test_csv_of_another_engine(tmp_path: Path) -> None:
    path = tmp_path / "engine.csv"
    path.write_text("\ufeffnote,tokens, steps_per_second\nx,8,4\ny,2,10.0\n", encoding="utf-8")
    table = read_throughput(str(path))
    assert table.points == (Point(2, 10.0), Point(8, 4.0))
    assert table.about == {"source": "engine.csv"}


def drafting(name: str, seconds: str) -> str:
    """A table of deepspec profile that says `seconds` of drafting."""
    first = f'{{"tokens": 1, "steps_per_second": 2, "{name}": {seconds}}}'
    points = f'[{first}, {{"tokens": 2, "steps_per_second": 1}}]'
    return f'{{"format": 1, "about": {{}}, "points": {points}}}'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("t.csv", "tokens,sps\n1,2\n", "no column steps_per_second.* has tokens, sps"),
        ("t.csv", "", "no column tokens and no column steps_per_second"),
        ("t.csv", "tokens,steps_per_second\n1,2\n2,fast\n", "line 3: .*'2' and 'fast'"),
        ("t.csv", "tokens,steps_per_second\n1,2\n2\n", "line 3: .*None"),
        ("t.csv", "tokens,steps_per_second\n1,2\n", r"at least two rows.*\[1\]"),
        ("t.csv", "tokens,steps_per_second\n1,2\n1,3\n", r"another number.*\[1, 1\]"),
        ("t.csv", "tokens,steps_per_second\n1,2\n2,0\n", "above 0 steps a second.* 2 and 0.0"),
        ("t.csv", "tokens,steps_per_second\n0,2\n2,1\n", "at least 1 token.* 0 and 2.0"),
        ("t.csv", "tokens,steps_per_second\n1,nan\n2,1\n", "above 0 steps a second"),
        ("t.csv", "tokens,steps_per_second,propose_seconds\n1,2,nan\n2,1,\n", "nan at 1 tokens"),
        (
            "t.csv",
            "tokens,steps_per_second,observe_seconds\n1,2,0\n2,1,-1\n",
            "observe.* -1.0 at 2",
        ),
        ("t.json", drafting("propose_seconds", "NaN"), "0 propose_seconds.* nan at 1"),
        ("t.json", drafting("observe_seconds", "Infinity"), "0 observe_seconds.* inf at 1"),
        ("t.json", "tokens,steps_per_second\n1,2\n", "no table of deepspec profile.*csv"),
        ("t.json", '{"format": 9}', "another version"),
        ("t.json", "[]", "no table of deepspec profile"),
        ("t.json", '{"format": 1, "points": [{"tokens": 1}], "about": {}}', "steps_per_second"),
        ("t.json", '{"format": 1, "points": 3, "about": {}}', "no table of deepspec profile"),
    ],
)
def test_no_table(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as error:
        read_throughput(str(path))
    assert f"decoding.throughput={path}" in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; deepspec profile"):
        read_throughput(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_throughput(str(tmp_path))
