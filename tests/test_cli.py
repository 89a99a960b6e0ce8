"""The command line itself: help, flags, exit codes. Real processes where start-up is the point."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest
import yaml

from deepspec import __version__
from deepspec.cli import COMMANDS, main
from deepspec.config.keys import KEYS
from deepspec.config.loading import config_from, list_recipes, load_config
from deepspec.config.resources import resource

SHOW_HEAVY = """
import sys
from deepspec.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code
print(sorted({{"torch", "transformers", "datasets", "matplotlib"}} & set(sys.modules)))
"""
WORK = """
import sys
from pathlib import Path
from deepspec.progress import Progress, say
say("begun")
with Progress("work", 2, "steps") as progress:
    progress.advance(2)
print("results")
Path(sys.argv[1]).write_text("done")
"""


def deepspec(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepspec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_help_is_quick() -> None:
    before = getrusage(RUSAGE_CHILDREN)
    result = deepspec("--help")
    after = getrusage(RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert all(re.search(rf"(?m)^ +{command}\b", result.stdout) for command in COMMANDS)
    assert "deepspec train recipe=tiny" in result.stdout
    # CPU seconds: what the machine does besides is not ours
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_help_and_cfg_import_nothing_heavy() -> None:
    commands = [["--help"], *([command, "--help"] for command in COMMANDS)]
    commands += [["recipes"], ["train", "recipe=tiny", "--cfg"]]
    code = SHOW_HEAVY.format(commands=commands)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_installed_command_and_module_are_the_same() -> None:
    script = Path(sys.executable).with_name("deepspec")
    installed = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert installed.stdout == deepspec("--version").stdout == f"deepspec {__version__}\n"


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "usage: deepspec" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_hold(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    module = import_module(f"deepspec.commands.{command.replace('-', '_')}")
    assert module.EXAMPLES in shown
    assert module.__doc__.splitlines()[0] in shown
    for example in module.EXAMPLES.replace("\\\n", "").splitlines():
        words = example.split()
        words = words[words.index("deepspec") + 1 :]  # behind variables, or torchrun -m
        assert words.pop(0) == command
        for key in (word.partition("=")[0] for word in words if not word.startswith("--")):
            assert key in KEYS if "." in key else key in module.SETTINGS or key in KEYS, example


# ------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    "arguments",
    [
        "recipe=tiny seed=3 drafter.num_layers=1 --cfg",
        "--cfg drafter.num_layers=1 seed=3 recipe=tiny",
        "seed=3 --cfg recipe=tiny drafter.num_layers=1",
        "seed=3 --traceback recipe=tiny --cfg drafter.num_layers=1",
    ],
)
def test_order_of_words_does_not_matter(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *arguments.split()])
    printed = config_from(yaml.safe_load(capsys.readouterr().out))
    assert printed == load_config("tiny", ["seed=3", "drafter.num_layers=1"])


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_cfg_prints_yaml_that_loads_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", f"recipe={name}", "data.system_prompt=caf\u00e9: # yes, 'no'", "--cfg"])
    printed = capsys.readouterr().out
    assert "${" not in printed
    assert config_from(yaml.safe_load(printed)) == load_config(
        name, ["data.system_prompt=caf\u00e9: # yes, 'no'"]
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train recipe=tiny --out=x", "unknown flag --out=x; did you mean out=x?"),
        ("train recipe=tiny -v", "unknown flag -v"),
        ("--cfg train recipe=tiny", "unknown flag --cfg; flags stand behind the command"),
        ("trian recipe=tiny", "invalid choice: 'trian'"),
        ("train", "error: recipe= is missing; for example recipe=tiny"),
        ("train tiny", "error: 'tiny' is not key=value; did you mean recipe=tiny?"),
        ("train recipe=tiny data.path=[a, b]", "error: 'b]' is not key=value; put quotes around"),
        ("evaluate runs/tiny", "did you mean run=runs/tiny?"),
        ("train recipe=tiny recipe=qwen3", "error: recipe= is given twice: tiny and qwen3"),
        ("regenerate recipe=tiny", "error: out= is missing"),
        ("evaluate", "error: give one of run=DIR and checkpoint=DIR"),
        ("evaluate run=a checkpoint=b", "error: give one of run=DIR and checkpoint=DIR"),
        ("export checkpoint=a", "error: out= is missing"),
        ("recipes tiny", "error: deepspec recipes takes no settings; found tiny"),
        ("doctor now", "error: deepspec doctor takes no settings; found now"),
    ],
)
def test_mistakes(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *arguments.split())


def test_traceback_is_shown_when_asked_for() -> None:
    quiet = deepspec("train", "recipe=tinny")
    assert (quiet.returncode, quiet.stdout) == (2, "")
    assert quiet.stderr == "error: recipe=tinny is unknown; did you mean tiny?\n"
    assert "Traceback" in deepspec("train", "recipe=tinny", "--traceback").stderr


# ----------------------------------------------------------------------------------- the streams


def unread(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with `command`, whose standard output and error nobody reads."""
    read, write = os.pipe()
    os.close(read)
    # as in a shell: python writes when it ends, not line by line
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    try:
        return subprocess.run(
            [sys.executable, *command], stdout=write, stderr=write, text=True, env=environment
        )
    finally:
        os.close(write)


@pytest.mark.parametrize(("command", "code"), [("recipes", 0), ("doctor", 141), ("evaluate", 2)])
def test_a_reader_that_left_is_no_error(command: str, code: int) -> None:
    """A list was read as far as wanted; results were not, and a mistake stays one."""
    assert unread("-m", "deepspec", command).returncode == code


def test_work_goes_on_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    assert unread("-c", WORK, str(tmp_path / "result")).returncode == 0
    assert (tmp_path / "result").read_text() == "done"


def test_a_broken_socket_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(settings: object, options: object) -> None:
        here, there = socket.socketpair()
        there.close()
        with here:
            here.send(b"hello")

    monkeypatch.setattr("deepspec.commands.recipes.run", talk)
    assert "error: [Errno 32] Broken pipe" in refused(capsys, "recipes")


@pytest.mark.parametrize(
    ("command", "expected"), [("train", "goes on where it stopped"), ("evaluate", "begins anew")]
)
def test_ctrl_c_says_what_the_command_will_do(
    command: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(settings: object, options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(f"deepspec.commands.{command}.run", stop)
    # a shell starts background jobs, such as this test's, with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            main([command])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert capsys.readouterr().err == f"interrupted; the same command {expected}\n"


def test_standard_output_without_the_sign_for_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config still loads back, and the name of a folder stops nothing."""
    home = tmp_path / "caf\u00e9"
    home.mkdir()
    for name in ("configs", "recipes", "data"):
        (home / name).symlink_to(resource(name))
    monkeypatch.setattr("deepspec.config.resources.PACKAGE", home / "deepspec")
    for command in (["recipes"], ["train", "recipe=tiny", "--cfg"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        main(command)
        printed = sys.stdout.buffer.getvalue().decode("ascii")
        if command == ["recipes"]:
            assert "caf\\xe9/recipes" in printed
        else:
            assert config_from(yaml.safe_load(printed)) == load_config("tiny")


# ------------------------------------------------------------------------- recipes and doctor


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    *lines, _, place = capsys.readouterr().out.splitlines()
    folder = Path(place.removeprefix("files: "))
    found = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    assert {"tiny", "tiny_dflash", "tiny_eagle3", "tiny_mtp", "qwen3"} <= set(found)
    assert [line.split(maxsplit=1) for line in lines] == [
        [name, found[name]["description"]] for name in sorted(found)
    ]


def test_doctor_says_what_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    main(["doctor"])
    shown = capsys.readouterr().out
    python = ".".join(map(str, sys.version_info[:3]))
    for what in (rf"python +{re.escape(python)}", r"torch +\d", r"data/tiny_target\S* +/"):
        assert re.search(rf"(?m)^ok +{what}", shown), shown
    assert "fault" not in shown


def test_doctor_fails_where_data_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("deepspec.config.resources.PACKAGE", tmp_path / "deepspec")
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 2
    assert re.search(r"(?m)^fault +recipes +missing +.*install deepspec", capsys.readouterr().out)
