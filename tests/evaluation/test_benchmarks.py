"""Prompts of the named benchmarks and of files.

Known to be right by: the public DeepSpec evaluation's own prompt files for GSM8K, MATH-500 and
MBPP (where at hand), and for the others its wording, written out here for one row in the shape of
the original data set. There is no network: that reading the hub fails fast and says what to do is
tested in a process with the hub switched off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deepspec.config.loading import config_from
from deepspec.config.schema import FieldsConfig
from deepspec.data.files import read_jsonl
from deepspec.errors import ConfigError, DataError
from deepspec.evaluation.benchmarks import BENCHMARKS, load_prompts
from deepspec.evaluation.evaluate import load_benchmark
from deepspec.targets import Target

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
EXPERT = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program\n\n### Question:\nAdd two numbers.\n\n"
)
ANSWER = "\n\n### Answer: (use the provided format with backticks)"

ROWS = [
    ("gsm8k", {"question": "How many?", "answer": "#### 3"}, "How many?" + BOXED),
    (
        "math500",
        {"problem": "Find $x$.", "solution": "", "answer": "1", "subject": "Algebra", "level": 2},
        "Find $x$." + BOXED,
    ),
    (
        "aime25",
        {"problem_idx": 1, "problem": "Find $n$.", "answer": 70, "problem_type": ["Algebra"]},
        "Find $n$." + BOXED,
    ),
    (
        "humaneval",
        {
            "task_id": "HumanEval/0",
            "prompt": 'def f():\n    """Zero."""\n',
            "canonical_solution": "    return 0\n",
            "test": "",
            "entry_point": "f",
        },
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        '```python\ndef f():\n    """Zero."""\n\n```',
    ),
    (
        "mbpp",
        {"source_file": "", "task_id": 2, "prompt": "Write a function.", "test_list": ["assert 1"]},
        "Write a function.",
    ),
    (
        "livecodebench",
        {"question_title": "Add", "question_content": "Add two numbers.", "starter_code": ""},
        EXPERT
        + "### Format: Write your code in the following format:\n"
        + "```python\n# YOUR CODE HERE\n```"
        + ANSWER,
    ),
    (
        "livecodebench",
        {"question_content": "Add two numbers.", "starter_code": "class Solution:\n    pass"},
        EXPERT
        + "### Format: Use the following code structure:\n"
        + "```python\nclass Solution:\n    pass\n```"
        + ANSWER,
    ),
    (
        "mt_bench",
        {"prompt": ["First.", "Then."], "prompt_id": 81, "category": "writing", "reference": []},
        "First.",
    ),
    ("alpaca", {"instruction": "Greet.", "input": "", "output": "Hi", "text": ""}, "Greet."),
    (
        "alpaca",
        {"instruction": "Sort.", "input": "2, 1", "output": "1, 2", "text": ""},
        "Sort.\n\nInput:\n2, 1",
    ),
    ("arena_hard", {"uid": "a", "category": "hard_prompt", "prompt": "Why?"}, "Why?"),
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, limit: int | None = None):
    return load_prompts(path, limit, FieldsConfig())


@pytest.mark.parametrize(("name", "row", "prompt"), ROWS)
def test_rows_become_the_usual_prompts(name: str, row: dict, prompt: str) -> None:
    assert BENCHMARKS[name].prompt(row) == prompt


def test_every_benchmark_has_a_row_here() -> None:
    assert set(BENCHMARKS) == {name for name, _, _ in ROWS}


@pytest.mark.parametrize(
    ("name", "column", "suffix", "count"),
    [
        ("gsm8k", "question", BOXED, 1319),
        ("math500", "problem", BOXED, 500),
        ("mbpp", "prompt", "", 257),
    ],
)
def test_wording_is_that_of_the_public_evaluation(
    name: str, column: str, suffix: str, count: int
) -> None:
    """A public prompt without the public suffix is the original column; formatting restores it."""
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"the public evaluation's prompts are not at hand: {path.name}")
    public = [row["turns"][0] for _, row in read_jsonl(path)]
    assert len(public) == count
    for prompt in public:
        assert prompt.endswith(suffix)
        assert BENCHMARKS[name].prompt({column: prompt.removesuffix(suffix)}) == prompt
    short, prompts, skips = load(str(path))
    assert (short, not skips) == (name, True)
    assert [prompt.messages for prompt in prompts] == [
        ({"role": "user", "content": text},) for text in public
    ]


def test_a_prompt_ends_with_its_first_user_turn(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "q"}
    again = {"role": "user", "content": "r"}
    answer = {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [system, user, answer, again, answer]},
        {"messages": [user, again], "id": "two"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"turns": ["q", "r"]},
        {"messages": [answer, user]},
        {"text": "no prompt"},
    ]
    name, prompts, skips = load(write(tmp_path / "mine.v2.jsonl", rows))
    assert name == "mine.v2"
    assert [prompt.messages for prompt in prompts] == [(system, user), (user,), (user,), (user,)]
    assert [p.id for p in prompts] == ["mine.v2-1", "two", "mine.v2-3", "mine.v2-4"]
    assert skips == {"answer before the first question": 1, "no messages field": 1}


def test_no_two_prompts_have_the_same_id(tmp_path: Path) -> None:
    """Else they would be one request, with one output for both."""
    ids = ["1", "1", "2", "1~2", "1"]
    rows = [{"turns": [str(place)], "id": name} for place, name in enumerate(ids)]
    _, prompts, _ = load(write(tmp_path / "p.jsonl", rows))
    assert [prompt.id for prompt in prompts] == ["1", "1~2", "2", "1~2~2", "1~3"]
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["0", "1", "2", "3", "4"]


def test_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    rows = [{"turns": ["0"]}, {"bad": 1}, *({"turns": [str(i)]} for i in range(1, 9))]
    path = write(tmp_path / "p.jsonl", rows)
    _, prompts, skips = load(path, limit=3)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["0", "1", "2"]
    assert skips.total() == 1
    assert load(path, limit=3)[1] == prompts
    assert len(load(path)[1]) == 9


def test_prompts_that_leave_no_room_for_an_answer(target: Target, tmp_path: Path) -> None:
    """Behind its 512 positions the target was never trained."""
    path = write(tmp_path / "p.jsonl", [{"turns": ["Hi."]}, {"turns": ["x" * 600]}])
    raw = {"recipe": "r", "target": {"path": "p"}, "data": {"path": [path]}}
    _, prompts, skips = load_benchmark(path, config_from(raw), target)
    assert len(prompts) == 1
    assert skips == {"prompt leaves no room for an answer in the target's context, 512": 1}


def test_a_file_without_prompts_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 x no messages field.*messages, conversations, turns"):
        load(write(tmp_path / "p.jsonl", [{"a": 1}, {"b": 2}]))


def test_unknown_names_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl file .*did you mean gsm8k\?"):
        load("gsm8")
    with pytest.raises(ConfigError, match=r"\.jsonl file .*benchmarks are gsm8k, "):
        load("zzzzzz")
    write(tmp_path / "prompts.jsonl", [])
    with pytest.raises(ConfigError, match=r"did you mean .*prompts\.jsonl\?"):
        load(str(tmp_path / "promts.jsonl"))


def test_rows_come_from_datasets_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for a repository: `load_dataset` opens both alike."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    rows = [{"question": f"{number}?", "answer": "#### 1"} for number in range(5)]
    write(tmp_path / "hub" / "test.jsonl", rows)
    local = replace(BENCHMARKS["gsm8k"], hub=str(tmp_path / "hub"), subset=None)
    monkeypatch.setitem(BENCHMARKS, "gsm8k", local)
    name, prompts, skips = load("gsm8k", limit=3)
    assert (name, not skips) == ("gsm8k", True)
    assert [prompt.id for prompt in prompts] == ["gsm8k-1", "gsm8k-2", "gsm8k-3"]
    assert [p.messages[0]["content"] for p in prompts] == ["0?" + BOXED, "1?" + BOXED, "2?" + BOXED]
    assert len(load("gsm8k")[1]) == 5

    monkeypatch.setitem(BENCHMARKS, "gsm8k", replace(local, prompt=BENCHMARKS["math500"].prompt))
    with pytest.raises(DataError, match=r"columns question, answer.*'problem'.*\.jsonl file"):
        load("gsm8k")


OFFLINE = """
import sys, time
import datasets
from deepspec.config.loading import config_from
from deepspec.config.schema import FieldsConfig
from deepspec.errors import DataError
from deepspec.evaluation.benchmarks import BENCHMARKS, load_prompts
started = time.monotonic()
for name in BENCHMARKS:
    try:
        load_prompts(name, 2, FieldsConfig())
    except DataError as error:
        print(error)
print(time.monotonic() - started)
"""


def test_without_the_hub_it_fails_fast_and_says_to_use_a_file(tmp_path: Path) -> None:
    """Switched off at import, so in a process of its own; the cache is empty."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True
    )
    *messages, seconds = done.stdout.splitlines()
    assert len(messages) == len(BENCHMARKS) == 9
    for name, message in zip(BENCHMARKS, messages, strict=True):
        assert message.startswith(f"benchmark {name}: {BENCHMARKS[name].hub} could not be read")
        assert "path of a .jsonl file" in message
        assert "evaluation.benchmarks" in message
    assert float(seconds) < 20
