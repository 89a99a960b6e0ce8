"""Files that are whole or not there, what errors of writing have to say, and the hash of a file."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path, need: int | None = None) -> Iterator[None]:
    """Put `path` into an OSError raised inside that names no file: those of write() do not.

    Of a full disk the error also gets how much is free, and the `need` in bytes where it is known.
    """
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(_partial(path))) and error.errno is not None:
            error.filename = str(path)
            if error.errno in FULL:
                error.strerror = f"{error.strerror}{room(path, need)}"
        raise


def room(path: Path, need: int | None = None) -> str:
    """` (N needed, N free)` of the disk at `path`."""
    needed = "" if need is None else f"{_size(need)} needed, "
    return f" ({needed}{_size(free_bytes(path))} free)"


def free_bytes(path: Path) -> int:
    """Free disk at `path` or its nearest parent that exists."""
    place = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    return shutil.disk_usage(place).free


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty sibling of `final` to write into; on success it is synced and takes its place.

    What stood at `final` is kept until then, and put back when the last step fails. Raises OSError.
    """
    final = final.resolve()  # `.` has no name, and a link stays a link
    partial = _partial(final)
    previous = final.with_name(f".{final.name}.previous")
    _clear(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _sync(file, readable=True)
        _sync(partial)
        if final.exists():
            _clear(previous)
            final.rename(previous)
        try:
            partial.rename(final)
        except BaseException:
            if previous.exists():
                previous.rename(final)
            raise
        _sync(final.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(final: Path, need: int | None = None) -> Iterator[Path]:
    """Yield an empty sibling of `final` to write; on success it is synced and takes its place.

    The sibling is a new file: what lies there under its name, such as a link to a file of others,
    is not written through. `need`: its bytes, where known. Raises OSError.
    """
    partial = _partial(final)
    with naming(final, need):
        _clear(partial)
        try:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
            yield partial
            _sync(partial, readable=True)
            partial.rename(final)
            _sync(final.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Write `text` into `final` in UTF-8, whole or not at all. Raises OSError."""
    content = text.encode()
    with atomic_file(final, len(content)) as partial:
        partial.write_bytes(content)


def sha256(file: Path) -> str:
    """The hash that a checkpoint or export records of its files, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _clear(path: Path) -> None:
    """Remove what a killed process left at `path`, or a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"


def _sync(path: Path, readable: bool = False) -> None:
    """Sync a file or folder, and make it readable to others: safetensors writes for the owner
    alone, and servers run as others."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_NOFOLLOW if readable else 0))
    try:
        if readable:
            os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
