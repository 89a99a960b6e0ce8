"""Templates are run within a time and a memory, whatever they do."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from deepspec.data import rendering
from deepspec.data.chat_template import OVERRUNS, ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.data.rendering import LimitError, Renderer
from deepspec.errors import TemplateError
from tests.conftest import MARKED

DOUBLED = (
    "{% set ns = namespace(v=START) %}{% for _ in range(99) %}{% set ns.v = STEP %}{% endfor %}"
)


def doubled(start: str, step: str) -> str:
    return DOUBLED.replace("START", start).replace("STEP", step)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TREE = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
ENDLESS = {
    "loops": LOOPS,
    "loops that print": LOOPS.replace("{% endfor %}", "x{% endfor %}", 1),
    "macros": TREE,
    "recursive loop": "{% for a in [[]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "power": "{{ 10 ** (10 ** 8) % 7 }}",
    "text joined": doubled("'x'", "ns.v ~ ns.v"),
    "text added": doubled("'x'", "ns.v + ns.v"),
    "text replaced": doubled("'xx'", "ns.v | replace('x', 'xx')"),
    "lists": doubled("[1]", "ns.v + ns.v"),
    "text times": "{{ 'x' * 10 ** 10 }}",
    "percent": "{{ '%1000000000d' % 1 }}{{ '%1000000000d' % 1 }}",
    "center": "{{ 'x'.center(10 ** 10) }}",
    "center filter": "{{ 'x' | center(10 ** 10) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list }}",
    "tojson": "{{ [1] | tojson(indent=10 ** 10) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "equal": doubled("[1]", "[ns.v, ns.v]")
    + "{% set other = ns.v %}"
    + doubled("[1]", "[ns.v, ns.v]")
    + "{{ ns.v == other }}",
    "shown": doubled("[1]", "[ns.v, ns.v]") + "{{ ns.v | string }}",
}
WRONG = {
    "division": "{{ 1 / 0 }}",
    "range": "{{ range(10 ** 30) | list }}",
    "type": "{{ 1 + 'x' }}",
    "include": "{% include 'other' %}",
    "import": "{% import 'other' as o %}{{ o.x() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% for %}",
    "digits": "{{ 10 ** 5000 }}",
    "nesting": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "surrogate": "{{ '\\ud800' }}{{ raise_exception('\\ud800') }}",
}
named = pytest.mark.parametrize
ASKED = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    monkeypatch.setattr(rendering, "BYTES", 2**27)


@pytest.fixture
def with_template(tokenizer: Any) -> Callable[[str], Any]:
    def make(template: str) -> Any:
        own = deepcopy(tokenizer)
        own.chat_template = template
        return own

    return make


def said(tokenizer: Any) -> tuple[BaseException | None, SkipCounts]:
    """(what loading raises, what is counted where one conversation is encoded)."""
    skips = SkipCounts()
    try:
        encoder = ChatEncoder(tokenizer, 64)
        encode_all([Conversation(id="a", messages=ASKED)], encoder, skips)
    except TemplateError as error:
        return error, skips
    return None, skips


@pytest.mark.usefixtures("strict")
@named("name", ENDLESS)
def test_work_without_end_is_refused(name: str, with_template: Callable[[str], Any]) -> None:
    begun = time.monotonic()
    error, skips = said(with_template(ENDLESS[name] + MARKED))
    assert time.monotonic() - begun < 10
    assert error or "refused by the chat template" in str(skips)
    if error:
        assert "chat template of" in str(error)
        assert "more time or memory" in str(error)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB


@pytest.mark.usefixtures("strict")
@named("name", WRONG)
def test_whatever_a_template_raises_is_counted(
    name: str, with_template: Callable[[str], Any]
) -> None:
    error, skips = said(with_template(WRONG[name] + MARKED))
    assert error or "refused by the chat template" in str(skips)


@pytest.mark.usefixtures("strict")
def test_rows_that_make_a_template_run_on_are_counted_and_the_others_kept(
    with_template: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    template = f"{{% if 'loop' in messages[0].content %}}{LOOPS}{{% endif %}}{MARKED}"
    encoder = ChatEncoder(with_template(template), 64)
    bad = [{**ASKED[0], "content": "loop"}, ASKED[1]]
    rows = [Conversation(id=str(n), messages=bad if n % 2 else ASKED) for n in range(4)]
    skips = SkipCounts()
    assert [each.sample_id for each in encode_all(rows, encoder, skips)] == ["0", "2"]
    assert sum(skips.values()) == 2
    assert "more than 0.2 s" in str(skips)
    with pytest.raises(TemplateError, match=f"more than {OVERRUNS} conversations"):
        encode_all([Conversation(id="b", messages=bad)] * (OVERRUNS + 1), encoder, skips)


def test_threads_share_a_renderer() -> None:
    renderer = Renderer(lambda number: str(number) * 1000)
    wrong: list[int] = []

    def ask(number: int) -> None:
        wrong.extend(number for _ in range(200) if renderer(number) != str(number) * 1000)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_a_process_that_ended_is_replaced_and_none_is_left() -> None:
    renderer = Renderer(lambda text: text if text != "end" else str(os.kill(os.getpid(), 9)))
    assert renderer("a") == "a"
    with pytest.raises(LimitError, match="ended its process"):
        renderer("end")
    assert renderer("\ud800") == "\ud800"
    pid = int(Renderer(lambda: str(os.getpid()))())  # collected at once
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_the_process_holds_nothing_of_its_parent_open(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w"):
        shown = Renderer(lambda: " ".join(os.readlink(f"/proc/self/fd/{n}") for n in range(3)))()
        held = Renderer(lambda: str([os.path.realpath(e) for e in Path("/proc/self/fd").iterdir()]))
        assert shown == "/dev/null /dev/null /dev/null"
        assert "lock" not in held()


def test_a_forked_process_makes_its_own() -> None:
    renderer = Renderer(lambda: f"{os.getpid()} {os.getppid()}")
    ours = renderer()
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writing, renderer().encode())
        renderer.close()
        os._exit(0)
    os.waitpid(pid, 0)
    theirs = os.read(reading, 100).decode()
    assert theirs.split()[1] == str(pid)
    assert renderer() == ours
