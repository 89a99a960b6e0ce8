"""Names, prompts and messages of others on a terminal: they are read, and steer nothing."""

from __future__ import annotations

import io

import pytest
from rich.table import Table
from rich.text import Text

from deepspec.checks.finding import Finding
from deepspec.cli import main
from deepspec.commands.check import print_findings
from deepspec.errors import DataError
from deepspec.progress import Progress, say
from deepspec.streams import show, tell, visible
from deepspec.terminal import Terminal

HOSTILE = {
    "colour": ("a\x1b[31mb", r"a\x1b[31mb"),
    "fake line": ("id\nerror: all is lost", r"id\nerror: all is lost"),
    "overwritten": ("ok\rerror", r"ok\rerror"),
    "C1": ("a\x9b31mb", r"a\x9b31mb"),
    "other ends of lines": ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
    "turned round": ("a\u202egpj.exe\u2066", r"a\u202egpj.exe\u2066"),
    "zero and delete": ("a\x00b\x7f", r"a\x00b\x7f"),
}
READABLE = [
    "Grüße, 你好, שלום, مرحبا",
    "می\u200cخواهم",
    "क्\u200dष",
    "👩\u200d💻",
    r"C:\new",
    "[red]",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("out", [show, tell, say])
def test_one_line_stays_one(name: str, out: object, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = HOSTILE[name]
    out(text)  # type: ignore[operator]
    captured = capsys.readouterr()
    assert captured.out + captured.err == expected + "\n"


@pytest.mark.parametrize("text", READABLE)
def test_text_of_every_script_stays_readable(text: str) -> None:
    assert visible(text) == text
    assert drawn(text).strip() == text


def test_lines_are_kept_where_asked_for() -> None:
    assert visible("a\nb\r\n", lines=True) == "a\nb\\r\n"


def drawn(*cells: str | Text) -> str:
    stream = io.StringIO()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(*cells)
    Terminal(file=stream, width=200).print(table)
    return stream.getvalue()


def test_tables_have_no_markup_and_no_control_characters_but_their_own() -> None:
    text = drawn("[red]x[/] [/nonsense] :smile:", "a\x1b]0;title\x07b\u202ec", Text("d\x1b[2Je"))
    assert text.startswith("[red]x[/] [/nonsense] :smile:")
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    stream = io.StringIO()
    coloured = Terminal(file=stream, width=80, force_terminal=True, color_system="standard")
    coloured.print(Text("fails\x1b[2J", "red"))
    assert stream.getvalue() == "\x1b[31mfails\\x1b[2J\x1b[0m\n"  # colours of our own still work


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    print_findings("a\x1b[31mb", [Finding("[red]x\nerror: y", False, None, "z\x1b[2J")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"[red]x\nerror: y" in printed


def test_notes_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("load", 1, "steps") as progress:
        progress.advance(1, "\x1b[31mloss\nerror: x")
    assert r"\x1b[31mloss\nerror: x" in capsys.readouterr().err


def test_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise DataError("id 'a\x1b[31m\nerror: b'")

    monkeypatch.setattr("deepspec.commands.recipes.run", run)
    with pytest.raises(SystemExit):
        main(["recipes"])
    assert capsys.readouterr().err == "error: id 'a\\x1b[31m\\nerror: b'\n"
