"""The files and folders that commands write: which are ours, new names where none was given, and
one writer at a time.

A file is ours if it holds the keys of its kind, so that folders of earlier versions count too.

A lock is a hidden empty file, which the operating system unlocks when its process dies, however it
dies. Beside it a note names the holder; it is apart because older versions of filelock empty the
lock file of another process when they try to lock it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from glob import escape
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from deepspec.atomic import write_text
from deepspec.errors import ConfigError, InUseError
from deepspec.json_files import parse_json
from deepspec.processes import rank
from deepspec.progress import say
from deepspec.yaml_files import read_yaml

SHOWN = 3
FOLDER, RESULTS = ".lock", ".results.lock"
ANSWER_KEYS = frozenset(("format", "temperature", "max_new_tokens"))


@dataclass(frozen=True)
class Output:
    """What a command writes into a folder: the file `mark`, which is ours if it holds `keys`, and
    `others`, which are ours if that one is. Names are glob patterns."""

    mark: str
    keys: frozenset[str]
    others: tuple[str, ...] = ()

    def is_in(self, folder: Path) -> bool:
        """Whether this library wrote it into `folder`."""
        return any(self.wrote(file) for file in folder.glob(self.mark))

    def wrote(self, file: Path) -> bool:
        """Whether `file` has the keys of its mark."""
        return self.keys <= _keys(file)

    def covers(self, name: str) -> bool:
        """Whether a file of that name belongs to it."""
        return any(fnmatchcase(name, pattern) for pattern in (self.mark, *self.others))


def answers_output(stem: str) -> Output:
    """The files beside the answers `stem`.jsonl; `AnswerFile` checks the answers themselves."""
    name = escape(stem)
    return Output(f"{name}.json", ANSWER_KEYS, (f"{name}.failed.jsonl",))


_RUN = ("metrics.jsonl", "metrics.damaged.jsonl", "skipped.json", "checkpoints")
RUN = Output("config.yaml", frozenset(("recipe", "target", "drafter")), _RUN)
CHECKPOINTS = Output(
    "checkpoints/step-*/checkpoint.json", frozenset(("format", "step", "config")), _RUN
)
REPRODUCTION = Output(RUN.mark, RUN.keys, ("reproduction.html", "*.csv"))
REPORT = Output(
    "report.json",
    frozenset(("format", "drafter", "results")),
    ("report.md", "report.html", "traces.jsonl"),
)
CALIBRATION = Output(
    "calibration.json",
    frozenset(("format", "fits")),
    ("calibration.md", "calibration.html", "traces.jsonl"),
)
LOAD = Output("load.json", frozenset(("format", "records")), ("load.csv", "traces.jsonl"))
SIMULATION = Output("simulate*.json", LOAD.keys, ("simulate*.csv",))
THROUGHPUT = Output("throughput*.json", frozenset(("format", "points")))
STORE = Output("store.json", frozenset(("format", "identity", "layer_ids")))
ANSWERS = Output("*.json", ANSWER_KEYS)
KNOWN = (RUN, CHECKPOINTS, REPORT, CALIBRATION, LOAD, SIMULATION, THROUGHPUT, STORE, ANSWERS)


def claim(folder: Path, *outputs: Output) -> None:
    """Raises ConfigError where `outputs` cannot go into out=`folder`: it is neither new nor empty
    nor ours, or holds another program's file under a name that `outputs` use."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} cannot be written: it is a file, not a folder")
    found = _contents(folder)
    if found and not any(known.is_in(folder) for known in KNOWN):
        raise _not_ours(folder, found)
    require_own(folder, *outputs)


def require_own(folder: Path, *outputs: Output) -> None:
    """Raises ConfigError where a file in `folder` that `outputs` would replace is not ours."""
    ours = [output for output in (*KNOWN, *outputs) if output.is_in(folder)]
    found = [name for name in _contents(folder) if any(each.covers(name) for each in outputs)]
    if foreign := [name for name in found if not any(each.covers(name) for each in ours)]:
        raise _not_ours(folder, foreign)


def make_folder(folder: Path) -> None:
    """Make out=`folder`. Raises ConfigError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _no_place(folder, error) from None


@contextmanager
def output_folder(
    out: str | None, default: str, *outputs: Output, patiently: bool = False
) -> Iterator[Path]:
    """The folder of out=, claimed, made and held; where it is not given, a new one: `default`, or
    the first of `default`-2, `default`-3, ... that is not there, so that no result replaces
    another.

    A new one that is still empty in the end is removed. `patiently`: see `hold`.
    """
    if out is not None:
        folder = Path(out).expanduser()
        claim(folder, *outputs)
        make_folder(folder)
        with hold(folder, RESULTS, patiently=patiently):
            yield folder
        return
    folder = _first_new(Path(default), lambda path: path.mkdir(parents=True))
    try:
        with hold(folder, RESULTS):
            yield folder
    finally:
        if not _contents(folder):
            (folder / RESULTS).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            folder.rmdir()


@contextmanager
def output_file(out: str | None, default: str, output: Output) -> Iterator[Path]:
    """The file of out=, as `output_folder` for a single file that has the keys of `output`."""
    if out is not None:
        file = Path(out).expanduser()
        if file.is_dir() or (file.exists() and file.stat().st_size and not output.wrote(file)):
            raise ConfigError(
                f"out={file} is there, was not written by deepspec, and is not overwritten; choose "
                "another name, or move it away"
            )
        make_folder(file.parent)
        with hold(file):
            yield file
        return
    make_folder(Path(default).parent)
    file = _first_new(Path(default), lambda path: path.touch(exist_ok=False))
    try:
        with hold(file):
            yield file
    finally:
        if not file.stat().st_size:
            file.unlink()
            lock_of(file).unlink(missing_ok=True)


@contextmanager
def hold(place: Path, lock: str | None = None, *, patiently: bool = False) -> Iterator[None]:
    """Keep `place` against other commands; of a job's processes, the first does so for all.

    `lock`: a file name in the folder `place`. FOLDER is for a command that fills the folder,
    RESULTS for one that puts results into it, which may be a running training's. None: the lock
    lies beside `place`, a file or a folder that is replaced as a whole. `patiently`: wait for
    another process instead of raising InUseError.
    """
    if rank() != 0:
        yield
        return
    real = Path(os.path.realpath(place.expanduser()))  # one lock, however the path is written
    file = real / lock if lock else lock_of(real)
    note = file.with_name(f"{file.name}.json")
    with ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(file, note, place, patiently))
            held.callback(note.unlink, missing_ok=True)
            with suppress(OSError):  # a full disk keeps only the name of the holder from others
                write_text(note, json.dumps(_ourselves()) + "\n")
        except (OSError, NotImplementedError) as error:
            # the write itself will fail where nothing can be written
            why = getattr(error, "strerror", None) or error
            say(f"{place} is not kept against other commands: {file} cannot be locked ({why})")
        yield


@contextmanager
def _locked(file: Path, note: Path, place: Path, patiently: bool) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not patiently:
            raise InUseError(
                f"{place} is in use by another deepspec process{_holder(note)}; wait for it, stop "
                "it, or set out= to another place"
            ) from None
        say(f"waiting for another deepspec process{_holder(note)} to finish with {place}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _ourselves() -> dict[str, str | int]:
    program = Path(sys.argv[0]).name
    # the rest of the command line may hold secrets
    command = sys.argv[1:2] if program in ("deepspec", "__main__.py") else [program]
    return {
        "command": " ".join(command),
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _holder(note: Path) -> str:
    """Return the words of `note`, or nothing where there is none to read."""
    try:
        found = parse_json(note.read_bytes())
        return (
            f" ({found['command']}, process {found['process']} on {found['host']}, since "
            f"{found['since']})"
        )
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def lock_of(place: Path) -> Path:
    """The lock beside `place`."""
    return place.parent / f".{place.name}.lock"


def unused(path: Path) -> Path:
    """`path`, or the first of NAME-2, NAME-3, ... beside it that is not there."""
    return next(each for each in _numbered(path) if not each.exists())


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _first_new(path: Path, make: Callable[[Path], None]) -> Path:
    """Make the first of the numbered names that is free: no two commands share one."""
    for place in _numbered(path):
        try:
            make(place)
        except FileExistsError:
            continue
        except OSError as error:
            raise _no_place(place, error) from None
        return place
    raise AssertionError("numbers do not end")


def _contents(folder: Path) -> list[str]:
    """Names of what could be lost: neither hidden nor empty."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.name != "lost+found" and not _is_empty(entry)
    )


def _is_empty(entry: Path) -> bool:
    if entry.is_dir():
        return not any(entry.iterdir())
    return entry.is_file() and not entry.stat().st_size


def _keys(file: Path) -> set[str]:
    """The keys of the mapping in a JSON or YAML file; empty where it holds none."""
    try:
        found = read_yaml(file) if file.suffix == ".yaml" else parse_json(file.read_bytes())
    except (OSError, ValueError):
        return set()
    return {key for key in found if isinstance(key, str)} if isinstance(found, dict) else set()


def _no_place(place: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"out={place} cannot be written: {error.strerror}; set out= to another place"
    )


def _not_ours(folder: Path, names: list[str]) -> ConfigError:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ConfigError(
        f"out={folder} holds {', '.join(names[:SHOWN])}{more}, not written by deepspec, and is not "
        "overwritten; choose another folder, or move these files away"
    )
