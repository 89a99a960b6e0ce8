"""A killed run goes on where it was, and only ever with the same settings."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deepspec.config.schema import DataConfig, RegenerateConfig, TargetConfig
from deepspec.data.conversations import SkipCounts
from deepspec.errors import DataError
from deepspec.regeneration import RegenerationCounts, TargetAnswerer, load_answers, regenerate
from deepspec.targets import Target, load_target
from tests.regeneration.conftest import questions, talk

CONFIG = RegenerateConfig(
    temperature=1.0, top_p=1.0, top_k=8, max_new_tokens=40, batch_size=2, samples_per_prompt=2
)
DATA = DataConfig(path=["-"])
CONVERSATIONS = questions(20)


def run(target: Target, out: Path, **changes: object) -> RegenerationCounts:
    config = replace(CONFIG, **changes)
    return regenerate(CONVERSATIONS, TargetAnswerer(target, DATA), config, out, show=False)


def ids(text: str) -> list[str]:
    return [json.loads(line)["id"] for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(writer: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "a.jsonl"
    counts = run(writer, out)
    assert counts.file.rows == len(ids(out.read_text())) == 40
    return out


def test_killed_by_the_system(
    writer: Target, writer_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL in mid-run, in another process; the second start gives the rows of an undisturbed
    run, and leaves those that are there as they are."""
    out = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "tests.regeneration.test_resume", str(writer_folder), str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lines = out.read_bytes().splitlines(keepends=True)
    before = b"".join(line for line in lines if line.endswith(b"\n"))
    assert 4 <= before.count(b"\n") < 40

    counts = run(writer, out)
    assert counts.resumed == before.count(b"\n")
    after = out.read_bytes()
    assert after.startswith(before)
    assert sorted(after.splitlines()) == sorted(whole.read_bytes().splitlines())


def test_a_half_written_line_is_cut(writer: Target, whole: Path, tmp_path: Path) -> None:
    """Five rows and a half: five are counted as there, thirty-five are asked for."""
    out = tmp_path / "a.jsonl"
    rows = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:5]) + rows[5][:-1])
    (tmp_path / "a.json").write_text(whole.with_suffix(".json").read_text())
    counts = run(writer, out)
    assert (counts.resumed, counts.samples, counts.file.rows) == (5, 40, 40)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    again = run(writer, out)
    assert (again.resumed, again.tokens, again.file.truncated) == (40, 0, counts.file.truncated)


def copy_of(whole: Path, folder: Path) -> Path:
    for name in ("a.jsonl", "a.json"):
        (folder / name).write_bytes((whole.parent / name).read_bytes())
    return folder / "a.jsonl"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"temperature": 0.5}, "temperature is 1.0 there and 0.5 here"),
        ({"seed": 7, "top_p": 0.9}, "top_p is 1.0 there and 0.9 here; seed is 0 there and 7 here"),
        ({"samples_per_prompt": 1}, "samples_per_prompt is 2 there and 1 here"),
    ],
)
def test_other_sampling_is_refused(
    writer: Target, whole: Path, tmp_path: Path, changes: dict[str, float], found: str
) -> None:
    out = copy_of(whole, tmp_path)
    with pytest.raises(DataError) as error:
        run(writer, out, **changes)
    assert found in str(error.value)
    assert "give another out" in str(error.value)
    assert out.read_bytes() == whole.read_bytes()


def test_another_target_or_rendering_is_refused(
    writer: Target, target: Target, whole: Path, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path)
    with pytest.raises(DataError, match=r"weights is '[0-9a-f]+' there and '[0-9a-f]+' here"):
        run(target, out)
    strict = TargetAnswerer(writer, replace(DATA, system_prompt="Be strict."))
    with pytest.raises(DataError, match=r"system_prompt is None there and 'Be strict\.' here"):
        regenerate(CONVERSATIONS, strict, CONFIG, out, show=False)
    options = {"style": "low"}
    later = TargetAnswerer(writer, replace(DATA, date="2026-07-26", template_options=options))
    found = r"date is '2026-01-01' there and '2026-07-26' here; template_options is \{\} there and"
    with pytest.raises(DataError, match=found):
        regenerate(CONVERSATIONS, later, CONFIG, out, show=False)


def test_other_prompts_under_an_id_are_refused(writer: Target, whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    conversations = [*CONVERSATIONS[:-1], talk("q019", "new")]
    with pytest.raises(DataError, match=r"sample q019#[01] with other prompts"):
        regenerate(conversations, TargetAnswerer(writer, DATA), CONFIG, out, show=False)


def test_a_lower_limit_uses_the_answers_that_are_wanted(
    writer: Target, whole: Path, tmp_path: Path
) -> None:
    """The others stay in the file, are counted, and are not read for the training; with the old
    limit all are used again, and nothing is answered twice."""
    out, prompts = copy_of(whole, tmp_path), tmp_path / "prompts.jsonl"
    rows = [{"id": each.id, "turns": [each.messages[0]["content"]]} for each in CONVERSATIONS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for limit, used in ((8, 16), (20, 40)):
        data = DataConfig(path=[str(prompts)], limit=limit)
        counts = regenerate(
            CONVERSATIONS[:limit], TargetAnswerer(writer, data), CONFIG, out, show=False
        )
        assert (counts.samples, counts.resumed, counts.tokens) == (used, used, 0)
        assert (counts.file.rows, counts.unused) == (40, 40 - used)
        assert (f"{40 - used} rows are not used" in str(counts)) == (used < 40)
        found = {row.id for row in load_answers(data, 2, out, SkipCounts())}
        assert found == {f"q{i:03d}#{n}" for i in range(limit) for n in range(2)}
    assert out.read_bytes() == whole.read_bytes()


def test_rows_that_stand_there_twice_count_once(
    writer: Target, whole: Path, tmp_path: Path
) -> None:
    """As two processes left them that wrote into one file: with the same answers and with others.
    Resuming gives the reason, and a training takes the first row of each id."""
    out, prompts = copy_of(whole, tmp_path), tmp_path / "prompts.jsonl"
    rows = [{"id": each.id, "turns": [each.messages[0]["content"]]} for each in CONVERSATIONS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = out.read_text().splitlines(keepends=True)
    changed = json.loads(lines[3])
    changed["messages"][-1] = {"role": "assistant", "content": "another answer"}
    with out.open("a") as stream:
        stream.write("".join(lines[:3]) + json.dumps(changed) + "\n")
    data = DataConfig(path=[str(prompts)])
    answerer = TargetAnswerer(writer, data)
    counts = regenerate(CONVERSATIONS, answerer, CONFIG, out, show=False)
    assert (counts.samples, counts.resumed, counts.unused, counts.tokens) == (40, 40, 0, 0)
    assert (counts.file.rows, counts.file.repeated) == (40, 4)
    assert "40 rows, 40 from before" in str(counts)
    assert "; 4 more rows have the id of a row before them and are not used;" in str(counts)
    skips = SkipCounts()
    taken = list(load_answers(data, 2, out, skips))
    assert taken == list(load_answers(data, 2, whole, SkipCounts()))
    assert skips == {
        "the same row again, with the same id and content (first in a-41)": 3,
        f"another answer with the id of a row before it (first in {changed['id']})": 1,
    }


def test_more_data_is_added(writer: Target, whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    more = [*CONVERSATIONS, talk("new", "What else?")]
    counts = regenerate(more, TargetAnswerer(writer, DATA), CONFIG, out, show=False)
    assert (counts.resumed, counts.samples, counts.file.rows) == (40, 42, 42)
    assert out.read_bytes().startswith(whole.read_bytes())
    assert set(ids(out.read_text())[40:]) == {"new#0", "new#1"}


def test_files_that_are_not_ours_are_left_alone(writer: Target, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text('{"id": "q000", "messages": []}\n')
    with pytest.raises(DataError, match=r"a\.json beside it.* is missing"):
        run(writer, out)
    with pytest.raises(DataError, match=r"must be named \*\.jsonl"):
        run(writer, tmp_path / "a.json")
    assert out.read_text() == '{"id": "q000", "messages": []}\n'


if __name__ == "__main__":
    folder, output = sys.argv[1:]
    config = TargetConfig(path=folder, dtype="float32", num_layer_ids=3)
    run(load_target(config, "cpu"), Path(output))
