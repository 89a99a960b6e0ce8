"""Rows that are meant to break what reads them: file and line are named, in seconds and 2 GB."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepspec.config.schema import DataConfig, FieldsConfig
from deepspec.data import files
from deepspec.data.conversations import load_conversations, parse_row
from deepspec.data.files import read_rows
from deepspec.errors import DataError

FINE = b'{"turns": ["fine"]}\n'
DEEP = b'{"messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
DIGITS = b'{"id":' + b"9" * 5000 + b',"turns":["a"]}'
LINES = {
    "deep": (DEEP, "line 2: nested more than 200 levels deep"),
    "digits": (DIGITS, "line 2: Exceeds the limit (4300 digits) for integer string conversion"),
    "not UTF-8": (b'{"a": "\xe1"}', "line 2: not UTF-8"),
    "no JSON": (b"{", "line 2: not JSON"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_bad_lines_are_named(name: str, suffix: str, tmp_path: Path) -> None:
    line, words = LINES[name]
    file = tmp_path / f"rows{suffix}"
    text = FINE + line
    file.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    with pytest.raises(DataError, match=re.escape(f"{file}, {words}")) as error:
        list(read_rows(file))
    assert "sys." not in str(error.value)
    file.write_bytes(gzip.compress(line) if suffix.endswith(".gz") else line)
    with pytest.raises(DataError, match=re.escape(words.replace("2", "1", 1))):
        list(read_rows(file))


@pytest.mark.parametrize("text", [b"[" + DEEP + b"]", b"[" + DIGITS + b"]", b"[1", b"[\xe1]"])
def test_bad_arrays_are_named(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(text)
    with pytest.raises(DataError, match=re.escape(f"{file}: not a JSON array that can be read")):
        list(read_rows(file))


def test_other_formats_are_told_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\na,b\n")
    with pytest.raises(DataError, match=r"line 1: not JSON \(.*\); files are read as \.jsonl, "):
        list(read_rows(tmp_path / "rows.csv"))
    (tmp_path / "rows.ndjson").write_bytes(FINE)  # a name of its own keeps no JSON lines out
    assert len(list(read_rows(tmp_path / "rows.ndjson"))) == 1


def test_arrays_and_lines_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"turns": ["fine"]}] * 10))
    monkeypatch.setattr(files, "MAX_ARRAY", 100)
    with pytest.raises(DataError, match=r"rows\.json: .*more than 100 bytes; write JSON lines"):
        list(read_rows(file))
    monkeypatch.setattr(files, "MAX_LINE", len(FINE))
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(FINE * 3)
    assert len(list(read_rows(lines))) == 3  # just as long as is allowed
    lines.write_bytes(FINE + b" " + FINE)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: longer than \d+ bytes"):
        list(read_rows(lines))


def test_tables(tmp_path: Path) -> None:
    kind: Any = pyarrow.string()
    for _ in range(40):
        kind = pyarrow.list_(kind)
    nested = pyarrow.table({"messages": pyarrow.array([None, None], kind)})
    pyarrow.parquet.write_table(nested, tmp_path / "nested.parquet")
    assert [row for _, row in read_rows(tmp_path / "nested.parquet")] == [{}, {}]
    raw = pyarrow.array([b"fine", b"\xe1\xe1"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"id": raw}), tmp_path / "raw.parquet")
    with pytest.raises(DataError, match=r"raw\.parquet, after row \d: not a whole parquet file"):
        list(read_rows(tmp_path / "raw.parquet"))
    dates = pyarrow.array([2**62], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"at": dates}), tmp_path / "dates.parquet")
    with pytest.raises(DataError, match=r"dates\.parquet, after row 0: not a whole parquet file"):
        list(read_rows(tmp_path / "dates.parquet"))


# ------------------------------------------------------------------------------ texts inside rows

DEEP_TEXT = DEEP.decode()
ASKED = {"role": "user", "content": "a"}


def calling(arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]}


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": DEEP_TEXT}, "messages as text that is beyond the limits: nested"),
    "tools": ({"turns": ["a"], "tools": DEEP_TEXT}, "tools as text that is beyond the limits"),
    "one tool": ({"turns": ["a"], "tools": [DEEP_TEXT]}, "tools as text that is beyond"),
    "arguments": (calling(DEEP_TEXT), "arguments of a tool call as text that is beyond"),
    "digits": (calling(DIGITS.decode()), "arguments of a tool call as text that is beyond"),
    "surrogate": ({"turns": ["\ud800"]}, "half a surrogate pair"),
    "surrogate id": ({"turns": ["a"], "id": "\ud800"}, "half a surrogate pair"),
    "many turns": ({"turns": ["a"] * 10_000_000}, "more than 100000 turns"),
    "numbers": ({"messages": [1]}, "a turn that is no object but a number"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_rows_that_cannot_be_used_are_counted(name: str) -> None:
    row, words = UNUSABLE[name]
    reason, conversation = parse_row(row, FieldsConfig(), "a-1")
    assert conversation is None
    assert reason.startswith(words)


def test_nul_is_a_character_like_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"turns": ["a\\u0000b"]}')
    (row,) = load_conversations(DataConfig(path=[str(tmp_path / "a.jsonl")]), Counter())
    assert row.messages[0]["content"] == "a\0b"


# ------------------------------------------------------------------------------------------ bombs

CHILD = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30,) * 2)
from pathlib import Path
from deepspec.data.files import read_rows
from deepspec.errors import DataError
for name in sys.argv[1:]:
    signal.alarm(10)
    try:
        list(read_rows(Path(name)))
    except DataError as error:
        print(str(error).replace("\\n", " "))
"""


def test_bombs_stay_within_time_and_memory(tmp_path: Path) -> None:
    part = {sign: gzip.compress(sign * 2**24, 1) for sign in (b"\0", b" ", b"[")}
    bombs = {
        "zeros.jsonl.gz": part[b"\0"] * 640,  # 10 GB
        "zeros.json.gz": part[b"\0"] * 640,
        "deep.jsonl.gz": part[b"["] * 640,
        "turns.jsonl": b'{"messages": [' + b"{}," * 2_000_000 + b"{}]}",
    }
    for name, raw in bombs.items():
        (tmp_path / name).write_bytes(raw)
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, *(str(tmp_path / name) for name in bombs)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr[-500:]
    found = ended.stdout.splitlines()
    named = [f"{tmp_path / name}, line 1: longer than" for name in list(bombs)[:3]]
    assert len(found) == 3
    assert all(map(str.startswith, found, named))
