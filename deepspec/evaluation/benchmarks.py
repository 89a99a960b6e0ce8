"""Prompts to measure on: the paper's nine benchmarks by name, or any JSONL file of prompts.

Data sets, splits and wording are those of the public DeepSpec evaluation, so that accepted lengths
can be held against table 1. Two things differ: `limit` takes the first rows rather than a random
draw, and nothing here scores an answer, so no reference solutions are read. Measured is the reply
to a conversation's first user turn; later turns (MT-Bench has two) would need an answer between.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from deepspec.config.schema import FieldsConfig
from deepspec.data.conversations import (
    Conversation,
    SkipCounts,
    parse_row,
    with_distinct_ids,
)
from deepspec.data.files import read_rows
from deepspec.errors import ConfigError, DataError, first_line

Row = dict[str, Any]

REASONING = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """A data set on the hub and how a row of it becomes a prompt.

    `files` names JSON lines inside the repository, for data sets that `datasets` cannot open by
    name; they are streamed, so only the rows asked for are fetched.
    """

    hub: str
    subset: str | None
    split: str
    prompt: Callable[[Row], str]
    files: tuple[str, ...] = ()


def gsm8k_prompt(row: Row) -> str:
    """Columns: question, answer."""
    return row["question"] + REASONING


def math_prompt(row: Row) -> str:
    """Columns: problem, answer, ... (MATH-500 and AIME alike)."""
    return row["problem"] + REASONING


def humaneval_prompt(row: Row) -> str:
    """Columns: prompt (signature and docstring), test, ..."""
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{row['prompt']}\n```"
    )


def plain_prompt(row: Row) -> str:
    """Columns: prompt, ... (sanitised MBPP and Arena-Hard)."""
    return row["prompt"]


def livecodebench_prompt(row: Row) -> str:
    """Columns: question_content, starter_code (empty where the program reads stdin), ..."""
    starter = row["starter_code"]
    ask = (
        "Use the following code structure:"
        if starter
        else "Write your code in the following format:"
    )
    return (
        "You are an expert Python programmer. You will be given a question (problem specification) "
        "and will generate a correct Python program that matches the specification and passes all "
        "tests. You will NOT return anything except for the program\n\n"
        f"### Question:\n{row['question_content']}\n\n"
        f"### Format: {ask}\n```python\n{starter or '# YOUR CODE HERE'}\n```\n\n"
        "### Answer: (use the provided format with backticks)"
    )


def mt_bench_prompt(row: Row) -> str:
    """Columns: prompt (a list of two user turns, of which the first is used), category, ..."""
    return row["prompt"][0]


def alpaca_prompt(row: Row) -> str:
    """Columns: instruction, input (often empty), output."""
    if not row["input"]:
        return row["instruction"]
    return f"{row['instruction']}\n\nInput:\n{row['input']}"


# livecodebench's repository holds a loading script, which `datasets` 4 and later refuse.
_LIVECODEBENCH = ("test.jsonl", *(f"test{part}.jsonl" for part in range(2, 7)))
_ARENA_HARD = ("data/arena-hard-v2.0/question.jsonl",)

BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", gsm8k_prompt),
    "math500": Benchmark("HuggingFaceH4/MATH-500", None, "test", math_prompt),
    "aime25": Benchmark("MathArena/aime_2025", None, "train", math_prompt),
    "humaneval": Benchmark("openai/openai_humaneval", None, "test", humaneval_prompt),
    "mbpp": Benchmark("google-research-datasets/mbpp", "sanitized", "test", plain_prompt),
    "livecodebench": Benchmark(
        "livecodebench/code_generation_lite", None, "train", livecodebench_prompt, _LIVECODEBENCH
    ),
    "mt_bench": Benchmark("HuggingFaceH4/mt_bench_prompts", None, "train", mt_bench_prompt),
    "alpaca": Benchmark("tatsu-lab/alpaca", None, "train", alpaca_prompt),
    "arena_hard": Benchmark("lmarena-ai/arena-hard-auto", None, "train", plain_prompt, _ARENA_HARD),
}


def check_benchmarks(names: Sequence[str]) -> None:
    """Raises ConfigError for none, and for a name that is neither a benchmark nor a file, with the
    nearest."""
    if not names:
        raise ConfigError(
            "evaluation.benchmarks=[]: nothing to decode; name files of prompts, or benchmarks"
        )
    for name in names:
        path = Path(name).expanduser()
        if name not in BENCHMARKS and not path.is_file():
            raise ConfigError(
                f"evaluation.benchmarks: {name} is neither a benchmark nor a .jsonl file of "
                f"prompts; {_nearest(path)}"
            )


def load_prompts(
    name_or_path: str, limit: int | None, fields: FieldsConfig
) -> tuple[str, list[Conversation], SkipCounts]:
    """(short name, prompts, rows skipped by reason) of a benchmark or a JSONL file of prompts.

    `name_or_path` is a key of `BENCHMARKS`, read from the hub, or a file whose rows hold messages,
    conversations or turns (see `deepspec.data.conversations`; `fields` says where) and whose short
    name is its stem. Every prompt ends with its first user turn; what follows it is dropped.
    `limit` takes the first so many usable rows, null all, so the choice never varies. No two
    prompts share an id. Raises ConfigError for a name that is neither, DataError when the hub
    cannot be read or the file has no usable prompt.
    """
    skips = SkipCounts()
    if name_or_path in BENCHMARKS:
        return name_or_path, _hub_prompts(name_or_path, limit), skips
    check_benchmarks([name_or_path])
    path = Path(name_or_path).expanduser()
    prompts = list(islice(with_distinct_ids(_file_prompts(path, fields, skips)), limit))
    if not prompts:
        found = ", ".join(f"{count} x {reason}" for reason, count in skips.items())
        raise DataError(
            f"evaluation.benchmarks: {path} has no usable prompt ({found or 'no rows'}); rows need "
            f"one of the fields {', '.join(fields.messages)} (see data.fields)"
        )
    return path.stem, prompts, skips


def _hub_prompts(name: str, limit: int | None) -> list[Conversation]:
    benchmark = BENCHMARKS[name]
    try:
        rows = [dict(row) for row in islice(_hub_rows(benchmark), limit)]
    except Exception as error:  # the hub client and the readers behind it raise many kinds
        raise DataError(
            f"benchmark {name}: {benchmark.hub} could not be read from the hub "
            f"({type(error).__name__}: {first_line(error)}); check the network and "
            'HF_HUB_OFFLINE, or put the path of a .jsonl file ({"turns": ["the prompt"]} a line) '
            f"into evaluation.benchmarks instead of {name}"
        ) from None
    try:
        prompts = [benchmark.prompt(row) for row in rows]
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"benchmark {name}: rows of {benchmark.hub} have the columns {', '.join(rows[0])}, "
            f"from which no prompt could be made ({type(error).__name__}: {error}); put the path "
            f"of a .jsonl file into evaluation.benchmarks instead of {name}"
        ) from None
    return [
        Conversation(f"{name}-{number}", ({"role": "user", "content": prompt},))
        for number, prompt in enumerate(prompts, start=1)
    ]


def _hub_rows(benchmark: Benchmark) -> Iterable[Any]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    if benchmark.files:
        files = [f"hf://datasets/{benchmark.hub}/{file}" for file in benchmark.files]
        return load_dataset("json", data_files=files, split=benchmark.split, streaming=True)
    return load_dataset(benchmark.hub, benchmark.subset, split=benchmark.split)


def _file_prompts(path: Path, fields: FieldsConfig, skips: SkipCounts) -> Iterable[Conversation]:
    for number, row in read_rows(path):
        reason, conversation = parse_row(row, fields, f"{path.stem}-{number}")
        prompt = conversation and first_turn(conversation)
        if prompt is None:
            skips[reason or "answer before the first question"] += 1
        else:
            yield prompt


def first_turn(conversation: Conversation) -> Conversation | None:
    """`conversation` cut behind its first user turn; None when an answer stands before that."""
    roles = [message["role"] for message in conversation.messages]
    end = roles.index("user") + 1
    if "assistant" in roles[:end]:
        return None
    return replace(conversation, messages=conversation.messages[:end], truncated=False)


def _nearest(path: Path) -> str:
    siblings = [str(file) for file in path.parent.glob("*.jsonl")]
    near = difflib.get_close_matches(str(path), [*BENCHMARKS, *siblings], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"benchmarks are {', '.join(BENCHMARKS)}"
