"""Files that are whole or not there, the name of the file in errors, and the hash of a file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into an OSError raised inside that names no file: those of write() do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty sibling of `final` to write into; on success it is synced and takes its place.

    What stood at `final` is kept until then, and put back when the last step fails. Raises OSError.
    """
    final = final.resolve()  # `.` has no name, and a link stays a link
    partial = final.with_name(f".{final.name}.partial")
    previous = final.with_name(f".{final.name}.previous")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone; servers run as others
            _sync(file)
        _sync(partial)
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
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
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield a sibling of `final` to write; on success it is synced and takes its place.

    Raises OSError.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        with naming(final):
            yield partial
            partial.chmod(0o644)  # as in `atomic_folder`
            _sync(partial)
            partial.rename(final)
            _sync(final.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Write `text` into `final` in UTF-8, whole or not at all. Raises OSError."""
    with atomic_file(final) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(file: Path) -> str:
    """The hash that a checkpoint or export records of its files, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
