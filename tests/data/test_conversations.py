"""Reading conversations: three shapes, mapped fields, counted skips, named mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspec.config.schema import DataConfig, FieldsConfig
from deepspec.data.conversations import SkipCounts, load_conversations
from deepspec.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*paths: str, **options: object):
    skips = SkipCounts()
    return list(load_conversations(DataConfig(path=list(paths), **options), skips)), skips


def test_three_shapes_give_the_same_messages(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [
            {"id": 1, "messages": [{"role": "user", "content": "hi"}]},
            {"conversations": [{"from": "human", "value": "hi"}]},
            {"turns": ["hi"]},
        ],
    )
    conversations, skips = load(path)
    assert [c.messages for c in conversations] == [({"role": "user", "content": "hi"},)] * 3
    assert [c.id for c in conversations] == ["1", "a-2", "a-3"]
    assert not skips


def test_every_skipped_row_is_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        {"turns": ["fine"]},
        {"text": "no messages"},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "?"}]},
        {"messages": [{"role": "system", "content": "s"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
        {"turns": ["half an emoji \ud83d"]},
        {"turns": ["fine"], "id": "\ud83d"},
        {"turns": ["fine"], "domain": "\ud83d"},
    ]
    conversations, skips = load(write(tmp_path / "a.jsonl", rows))
    assert [conversation.id for conversation in conversations] == ["a-1"]
    assert len(conversations) + skips.total() == len(rows)
    assert set(skips) == {
        "no messages field",
        "empty conversation",
        "unreadable turn",
        "no user turn",
        "empty answer",
        "half a surrogate pair",
    }


def test_fields_are_mapped_in_config(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"dialog": [{"who": "user", "said": "hi"}], "key": "k"}])
    fields = FieldsConfig(messages=["dialog"], role=["who"], content=["said"], id=["key"])
    conversations, _ = load(path, fields=fields)
    assert conversations[0].id == "k"
    assert conversations[0].messages[0]["content"] == "hi"


def test_folder_glob_and_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"turns": [name]}] * 3)
    assert len(load(str(tmp_path))[0]) == 6
    assert len(load(str(tmp_path / "*.jsonl"))[0]) == 6
    assert len(load(str(tmp_path), limit=4)[0]) == 4


def test_malformed_row_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"turns": ["x"]}\n{"turns": [\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        load(str(path))


def test_no_good_row_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 x no messages field"):
        load(write(tmp_path / "a.jsonl", [{"a": 1}, {"b": 2}]))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"turns": ["x"]}])
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        load(str(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1319), ("math500", 500), ("mbpp", 257)])
def test_real_benchmark_prompts(name: str, count: int) -> None:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"real prompts are not at hand: {path.name}")
    conversations, skips = load(str(path))
    assert len(conversations) == count
    assert not skips
