"""Damaged and hostile JSON: each of them one ValueError or one typed error, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from deepspec.errors import DataError
from deepspec.json_files import MAX_DEPTH, as_kind, parse_json, read_as, read_json

BAD = {
    "high bit": b'{"a": "\xe1"}',
    "half": b'{"a": 1',
    "empty": b"",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "just too deep": b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@dataclass(frozen=True)
class Row:
    """What a file is held against."""

    id: str
    length: Annotated[int, Field(ge=1, le=100)]
    places: tuple[float, ...] = ()


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_json_is_a_value_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(BAD[name])
    file = tmp_path / "file.json"
    file.write_bytes(BAD[name])
    with pytest.raises(DataError, match=r"file\.json is damaged or unreadable \(.+\); way out"):
        read_json(file, DataError, "way out")


def test_depth_is_counted_not_brackets() -> None:
    wide = [[{"text": "[[[["}]] * MAX_DEPTH
    assert parse_json(str(wide).replace("'", '"')) == wide
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_fields_are_held_to_their_types(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"id": "a", "length": 3, "places": [1]}]')
    assert read_as(list[Row], file, DataError, "") == [Row("a", 3, (1.0,))]
    for raw, words in {
        '[{"length": 3}]': "0.id: Field required",
        '[{"id": "a", "length": 1.0}]': "0.length: .*integer, found 1.0",
        '[{"id": "a", "length": true}]': "0.length: .*integer, found True",
        '[{"id": "a", "length": 1000000000000}]': "0.length: .*100, found 1000000000000",
        '{"id": 1}': "valid array|valid list",
        '[{"id": 1, "length": 0, "places": ["x", "y"]}]': "; and 1 more",
    }.items():
        file.write_text(raw)
        with pytest.raises(DataError, match=words):
            read_as(list[Row], file, DataError, "")
        with pytest.raises(ValueError, match=words):
            as_kind(list[Row], parse_json(raw))


def test_what_is_not_there_is_told_apart(tmp_path: Path) -> None:
    for file in (tmp_path / "none.json", tmp_path / "a file" / "none.json"):
        (tmp_path / "a file").write_text("")
        with pytest.raises(FileNotFoundError):
            read_json(file, DataError, "")
    with pytest.raises(DataError, match="directory"):
        read_json(tmp_path, DataError, "")
