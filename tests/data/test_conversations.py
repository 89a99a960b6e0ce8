"""Reading conversations: the shapes that people have them in, counted skips, named mistakes."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepspec.config.schema import DataConfig, FieldsConfig
from deepspec.data.conversations import TWICE, Conversation, SkipCounts, load_conversations
from deepspec.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
USER = {"role": "user", "content": "Add 1 and 1"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*paths: str, **options: object):
    skips = SkipCounts()
    return list(load_conversations(DataConfig(path=list(paths), **options), skips)), skips


def one(tmp_path: Path, row: dict[str, Any], **options: object) -> Conversation:
    """The only conversation of a file with that row, which is read whole."""
    (conversation,), skips = load(write(tmp_path / "one.jsonl", [row]), **options)
    assert not skips
    return conversation


def answer_of(tmp_path: Path, turn: dict[str, Any]) -> dict[str, Any]:
    """The last turn, of role assistant, as it is read."""
    return one(tmp_path, {"messages": [USER, {"role": "assistant", **turn}]}).messages[-1]


def test_three_shapes_give_the_same_messages(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [
            {"id": 1, "messages": [{"role": "user", "content": "hi"}]},
            {"conversations": [{"from": "human", "value": "hi"}]},
            {"turns": ["hi"]},
            {"messages": json.dumps([{"role": "user", "content": "hi"}])},
            {"messages": [{"role": " USER", "content": [{"type": "text", "text": "hi"}]}]},
            {"messages": [{"role": "Human", "content": ["h", {"text": "i"}]}]},
        ],
    )
    conversations, skips = load(path)
    assert [c.messages for c in conversations] == [({"role": "user", "content": "hi"},)] * 6
    assert [c.id for c in conversations] == ["1", *(f"a-{number}" for number in range(2, 7))]
    assert not skips


def test_every_skipped_row_is_counted_by_reason(tmp_path: Path) -> None:
    def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
        return {"messages": [USER, {"role": role, "content": content, **more}]}

    image = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    rows = [
        {"turns": ["fine"]},
        {"text": "no messages"},
        {"messages": []},
        said("Critic", "?"),
        said("Critic", "?"),
        {"messages": [{"content": "?"}]},
        {"messages": [USER, "?"]},
        {"messages": "[{"},
        {"messages": [{"role": "system", "content": "s"}]},
        said("assistant", " "),
        said("user", image),
        said("user", None),
        said("user", 7),
        said("assistant", "", tool_calls=[{"function": {"name": "add", "arguments": "{"}}]),
        said("assistant", "", tool_calls=[{"function": {"arguments": "{}"}}]),
        {"turns": ["x"], "tools": "none"},
        {"turns": ["half an emoji \ud83d"]},
        {"turns": ["fine"], "id": "\ud83d"},
        {"turns": ["fine"], "domain": "\ud83d"},
    ]
    conversations, skips = load(write(tmp_path / "a.jsonl", rows))
    assert [conversation.id for conversation in conversations] == ["a-1"]
    assert len(conversations) + skips.total() == len(rows)
    assert skips == {
        "no messages field (first in a-2)": 1,
        "empty conversation (first in a-3)": 1,
        "role 'Critic', which data.fields.roles does not have (first in a-4)": 2,
        "a turn without any of role, from (first in a-6)": 1,
        "a turn that is no object but text (first in a-7)": 1,
        "messages as text that is not JSON (first in a-8)": 1,
        "no user turn (first in a-9)": 1,
        "empty answer (first in a-10)": 1,
        "content part of type 'image_url' (first in a-11)": 1,
        "a turn of role user without any of content, value (first in a-12)": 1,
        "content that is no text but a number (first in a-13)": 1,
        "arguments of a tool call as text that is not JSON (first in a-14)": 1,
        "a tool call without a name (first in a-15)": 1,
        "tools as text that is not JSON (first in a-16)": 1,
        "half a surrogate pair (first in a-17)": 3,
    }


def test_a_row_counts_once(tmp_path: Path) -> None:
    """The same id with other content is another row: files number theirs from 0. `limit` is of the
    rows that count."""
    turns = [("a", "one"), ("a", "one"), ("a", "two"), (None, "one"), (None, "one"), ("b", "one")]
    rows = [{"turns": [text]} | ({"id": name} if name else {}) for name, text in turns]
    path = write(tmp_path / "rows.jsonl", rows)
    found, skips = load(path, path)
    assert [(each.id, each.messages[0]["content"]) for each in found] == [
        ("a", "one"),
        ("a", "two"),
        ("rows-4", "one"),
        ("rows-5", "one"),
        ("b", "one"),
    ]
    assert skips == {f"{TWICE} (first in rows-2)": 7}
    assert load(path, limit=2)[0] == found[:2]


def test_reasons_do_not_grow_with_the_data(tmp_path: Path) -> None:
    """Names of people as roles: the first 50 are named, the others counted together."""
    rows = [{"messages": [USER, {"role": f"r{i}", "content": "?"}]} for i in range(99)]
    _, skips = load(write(tmp_path / "a.jsonl", [*rows, {"turns": ["fine"]}]))
    assert len(skips) == 51
    assert skips["other reasons (first in a-51)"] == 49


def test_fields_and_roles_are_mapped_in_config(tmp_path: Path) -> None:
    row = {"dialog": [{"who": "asker", "said": "hi"}], "key": "k", "kit": [TOOL]}
    fields = FieldsConfig(
        messages=["dialog"], role=["who"], content=["said"], id=["key"], tools=["kit"]
    )
    fields.roles["asker"] = "user"
    conversation = one(tmp_path, row, fields=fields)
    assert conversation.id == "k"
    assert conversation.messages == ({"role": "user", "content": "hi"},)
    assert conversation.tools == (TOOL,)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "add", "arguments": {"a": 1, "b": 1}},
        {"name": "add", "arguments": '{"a": 1, "b": 1}'},
        {"function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}},
        json.dumps({"name": "add", "parameters": {"a": 1, "b": 1}}),
    ],
)
def test_tool_calls_have_one_form(tmp_path: Path, call: Any) -> None:
    """Nested or flat, the arguments as an object or as text: templates get an object."""
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert answer_of(tmp_path, {"content": None, "tool_calls": [call]}) == expected
    assert answer_of(tmp_path, {"tool_calls": json.dumps([call])}) == expected
    assert answer_of(tmp_path, {"function_call": call}) == expected


def test_arguments_keep_their_nulls(tmp_path: Path) -> None:
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    assert answer_of(tmp_path, {"content": "", "tool_calls": [call]})["tool_calls"] == [call]
    no_arguments = answer_of(tmp_path, {"tool_calls": [{"name": "f", "arguments": ""}]})
    assert no_arguments["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_read(tmp_path: Path, name: str) -> None:
    whole = {"role": "assistant", "content": "2", "reasoning_content": "One and one."}
    assert answer_of(tmp_path, {"content": "2", name: "One and one."}) == whole
    only = answer_of(tmp_path, {"content": "", name: "One and one."})  # no empty answer
    assert only == {**whole, "content": ""}


def test_tool_turns_and_tools(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "Use tools."},
        USER,
        {"role": "assistant", "tool_calls": [{**CALL, "id": "c1"}]},
        {"role": "function", "name": "add", "tool_call_id": "c1", "content": {"sum": 2}},
        {"from": "observation", "value": "2"},
        {"role": "assistant", "content": "It is 2.", "token_ids": [5, 2], "supervised": False},
    ]
    function = TOOL["function"]
    for tools in ([TOOL], [function], json.dumps([TOOL]), [json.dumps(function)], function):
        conversation = one(tmp_path, {"tools": tools, "messages": turns})
        assert conversation.tools == (TOOL,)
    assert conversation.messages[2:] == (
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]},
        {"role": "tool", "content": '{"sum": 2}', "name": "add", "tool_call_id": "c1"},
        {"role": "tool", "content": "2"},
        turns[-1],
    )
    assert [m["role"] for m in conversation.messages[:2]] == ["developer", "user"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_turns_that_are_not_to_be_trained_on_are_context(
    tmp_path: Path, mark: dict[str, Any]
) -> None:
    assert answer_of(tmp_path, {"content": "2", **mark})["supervised"] is False
    assert "supervised" not in answer_of(tmp_path, {"content": "2", "weight": 1, "train": True})


def test_a_system_prompt_beside_the_turns_is_the_first_turn(tmp_path: Path) -> None:
    brief, own = ({"role": "system", "content": text} for text in ("Be brief.", "Be kind."))
    row = {"system": "Be brief.", "messages": [USER]}
    assert one(tmp_path, row).messages == (brief, USER)
    assert one(tmp_path, {**row, "messages": [own, USER]}).messages == (own, USER)
    assert one(tmp_path, {**row, "system": ""}).messages == (USER,)
    assert one(tmp_path, {**row, "system": None}).messages == (USER,)


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "Ask me."}, {"from": "human", "value": "2?"}]
    roles = [m["role"] for m in one(tmp_path, {"conversations": turns}).messages]
    assert roles == ["assistant", "user"]


def test_what_is_not_read_of_a_turn_is_said_once(tmp_path: Path) -> None:
    """Names, times and weights are nothing that is said; empty columns are there for other rows."""
    spoken = {**USER, "emotion": "joy", "id": 1, "weight": 0.0, "audio": None, "images": []}
    rows = [{"turns": ["fine"]}, {"messages": [spoken, spoken]}, {"messages": [spoken]}]
    conversations, skips = load(write(tmp_path / "a.jsonl", rows))
    assert conversations[1].messages == (USER, USER)
    assert skips == {"field 'emotion' of a turn (first in a-2)": 3}


ROWS = [
    {"id": "a", "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
    {"id": "b", "messages": [USER, {"role": "assistant", "content": "2", "reasoning": "1 + 1"}]},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_as(path: Path) -> Path:
    """`ROWS` in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = "".join(path.suffixes)
    table = pyarrow.Table.from_pylist(ROWS)
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif ending == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif ending == ".stream.arrow":
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as stream,
        ):
            stream.write_table(table)
    elif ending.endswith((".zst", ".bz2")):
        with pyarrow.output_stream(str(path)) as file:
            file.write(LINES)
    elif ending.endswith(".gz"):
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode() if "json." in ending else LINES))
    else:
        path.write_bytes(json.dumps(ROWS, indent=1).encode() if "array" in path.name else LINES)
    return path


FORMATS = (
    "a.jsonl a.jsonl.gz a.jsonl.zst a.jsonl.bz2 a.json array.json a.json.gz a.parquet a.arrow "
    "a.stream.arrow"
).split()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    """Nulls that tables fill in do not reach the messages."""
    path = write_as(tmp_path / name)
    conversations, skips = load(str(path))
    assert conversations == load(write(tmp_path / "plain.jsonl", ROWS))[0]
    assert "reasoning_content" not in conversations[0].messages[1]
    assert not skips


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_as(tmp_path / name)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    with pytest.raises(DataError, match=rf"{name.replace('.', '[.]')}"):
        load(str(path))


def test_rows_without_an_id_are_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"turns": ["x"]}\n{"turns": ["y"]}\n'))
    assert [conversation.id for conversation in load(str(path))[0]] == ["a-1", "a-2"]


def test_folder_glob_and_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"turns": [name]}] * 3)
    (tmp_path / "settings.json").write_text('{\n"what": "describes the others"\n}')
    assert len(load(str(tmp_path))[0]) == 6
    assert len(load(str(tmp_path / "*.jsonl"))[0]) == 6
    assert len(load(str(tmp_path), limit=4)[0]) == 4


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"), "train"),
        (("data/train_sft-00000-of-00001.parquet",), "train_sft"),
        (("train.jsonl", "more.jsonl"), "train"),
        (("train/data-00000-of-00001.stream.arrow",), "train"),
        (("dev.jsonl",), "validation"),
    ],
)
def test_folders_as_the_hub_lays_them_out(
    tmp_path: Path, files: tuple[str, ...], split: str
) -> None:
    for name in (*files, "data/test-00000-of-00001.parquet"):
        write_as(tmp_path / name)
    conversations, skips = load(str(tmp_path), split=split)
    others = f"files of other splits than data.split={split}"
    again = {name: count for name, count in skips.items() if name.startswith(TWICE)}
    assert skips == {others: 1, **again}
    assert len(conversations) == len(ROWS)
    assert sum(again.values()) == len(ROWS) * (len(files) - 1)  # the files are alike
    with pytest.raises(DataError, match=r"no file of data\.split=trian; .* test"):
        load(str(tmp_path / "data"), split="trian")


def test_malformed_row_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"turns": ["x"]}\n{"turns": [\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        load(str(path))
    path = tmp_path / "bad.json"
    path.write_text('[{"turns": ["x"]}, 3]')
    with pytest.raises(DataError, match=r"bad\.json, element 2: expected an object, found 3"):
        load(str(path))


def test_no_good_row_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 x no messages field \(first in a-1\)"):
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


DEEP = "[" * 50_000 + "]" * 50_000  # more than Python's json module recurses


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.jsonl",
            '{"turns": ["fine"]}\n' + DEEP,
            "a.jsonl, line 2: nested more than 200 levels",
        ),
        ("a.json", DEEP, "a.json: not a JSON array that can be read (nested more than 200"),
    ],
)
def test_files_nested_too_deeply_are_named(
    name: str, text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(expected)):
        load(str(path))


@pytest.mark.parametrize("field", ["messages", "tools"])
def test_rows_nested_too_deeply_are_counted(field: str, tmp_path: Path) -> None:
    rows = [{"turns": ["fine"]}, {"turns": ["fine"], field: DEEP}]
    conversations, skips = load(write(tmp_path / "a.jsonl", rows))
    assert len(conversations) == 1
    reason = f"{field} as text that is beyond the limits: nested more than 200 levels deep"
    assert skips == {f"{reason} (first in a-2)": 1}
