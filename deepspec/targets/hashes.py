"""Hashes of all bytes of a target's weights, computed once per file and remembered.

They are what tells a target from one whose weights differ in a single number. A hash is of one
tensor: how a checkpoint is cut into files, and in which order, is no part of it. It is SHA-256,
which processors compute in hardware (SHA-NI, ARMv8): twice as fast here as BLAKE2b, the next best
in Python's own library.

Hashes of a file are remembered in a small JSON in `cache_folder()`, one per file of weights, so
that processes which hash different files never write the same one. Its name is made of the file's
path, size, mtime, ctime and inode: another of these is another file. What the cache cannot see is
a file changed in place by something that sets the ctime too, that is, by the disk, by a change of
the clock, or on a network file system that makes up its ctime. The hub's cache names a file by its
sha256, but a download is not held against it later, and it depends on how the checkpoint is cut;
so those files are hashed as any others.

What it costs: the bytes are read once more, right after the model was loaded and so mostly from
the page cache, in threads, while training begins; the first checkpoint waits for the result. On an
Intel Xeon with SHA-NI, beside other work, 8.6 GB took 9.5 s of a core (0.9 GB/s; `python
benchmarks/target_hash.py --gib 8`), and a second start 0.01 s. By that, 700 GB take 780 s of a
core: 100 s on 8 cores. What the page cache lacks has to be read: 350 s from a disk of 2 GB/s.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from deepspec.atomic import write_text
from deepspec.errors import TargetError
from deepspec.json_files import read_as
from deepspec.processes import local_rank
from deepspec.progress import say_once

T = TypeVar("T")
CACHE = "DEEPSPEC_CACHE"  # another folder than the user's cache
CHUNK = 4 * 2**20
MOST_THREADS = 8  # more do not make a disk faster
LARGE = 2**30  # hashing it takes about a second
# A file that changed this short ago may change again without another time: file systems count in
# steps of up to two seconds.
RECENT = 2.0
DTYPES = {  # as safetensors calls them
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Span:
    """A tensor in a file: `size` bytes from `start` on."""

    dtype: str
    shape: Sequence[int]
    start: int
    size: int


Spans = tuple[Path, dict[str, Span]]


@dataclass(frozen=True)
class _Entry:
    """What is remembered of the `file` of weights: a hash of each tensor."""

    file: str
    tensors: dict[str, str]
    checksum: str


class HashedFiles:
    """Files of weights; a subclass knows where tensors lie (`spans`)."""

    _hashing: Future[dict[str, str]] | None = None

    def spans(self, names: Collection[str] | None = None) -> Iterator[Spans]:
        """Each file, and where the tensors in it lie; only files with some of `names`, where they
        are given. Raises TargetError."""
        raise NotImplementedError

    def begin_hashing(self) -> None:
        """Hash all tensors in the background."""
        if self._hashing is None:
            self._hashing = _in_background(self._hash_all)

    def hash_of_all(self) -> str:
        """The hash of names, number types, shapes and values of all tensors, once it is known."""
        self.begin_hashing()
        assert self._hashing is not None
        return combined(self._hashing.result())

    def hash_of(self, names: Sequence[str]) -> str:
        """The hash of the tensors `names`, whatever they are called; other files are not needed."""
        if self._hashing is not None:
            found = self._hashing.result()
        else:
            found = {}
            for file, spans in self.spans(names):
                found |= hashes_in(file, {name: spans[name] for name in names if name in spans})
        if lacking := [name for name in names if name not in found]:
            raise TargetError(
                f"{lacking[0]} is not in the file where the target's index has it; fetch both again"
            )
        return combined_ends(*(found[name] for name in names))

    def _hash_all(self) -> dict[str, str]:
        parts, processes = list(self.spans()), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        first = local_rank() % processes * len(parts) // processes
        parts = parts[first:] + parts[:first]  # processes of this machine begin at different files
        cores = max(1, (os.cpu_count() or 1) // 2 // processes)  # the others load and train
        threads = min(MOST_THREADS, cores, max(1, len(parts)))
        works = [
            _in_background(partial(_hash_files, parts[thread::threads]))
            for thread in range(threads)
        ]
        found: dict[str, str] = {}
        for work in works:
            found |= work.result()
        return found


def combined_ends(embedding: str, head: str) -> str:
    """One hash of those of embedding and LM head, whatever they are called."""
    return _digest([embedding, head])[:32]


def combined(hashes: Mapping[str, str]) -> str:
    """One hash of those of tensors by name."""
    return _digest(sorted(hashes.items()))[:32]


def hash_of_tensor(tensor: Tensor) -> str:
    """The hash of a tensor in memory: as that of its file, where it was loaded as it was saved."""

    def chunks() -> Iterator[Any]:
        for part in tensor.detach().reshape(-1).split(CHUNK // tensor.itemsize):
            yield part.cpu().contiguous().view(torch.uint8).numpy()

    return _hash(DTYPES.get(tensor.dtype, str(tensor.dtype)), tensor.shape, chunks())


def hashes_in(file: Path, spans: Mapping[str, Span]) -> dict[str, str]:
    """The hash of each tensor of `file` in `spans`, remembered or computed.

    One process computes them, others wait for it. Raises TargetError.
    """
    file = file.resolve()
    try:
        key = _key(file)
        entry = cache_folder() / f"{_digest(key)}.json"
        if (known := _recall(entry)).keys() >= spans.keys():
            return {name: known[name] for name in spans}
        with _alone(entry):
            known = _recall(entry)  # of the process that this one has waited for
            missing = {name: span for name, span in spans.items() if name not in known}
            if sum(span.size for span in missing.values()) > LARGE:
                say_once(
                    f"the target's weights are hashed once, beside the work; {entry.parent} keeps "
                    "the result"
                )
            known |= read_hashes(file, missing)
            after = _key(file)
            if after[:3] != key[:3]:  # path, size, mtime; a new link changes the ctime too
                raise TargetError(f"{file} was changed while it was read; start again")
            if missing and after == key and time.time() - key[3] / 1e9 > RECENT:
                _remember(entry, file, known)
    except OSError as error:
        raise TargetError(f"{file} could not be read: {error}; fetch it again") from None
    return {name: known[name] for name in spans}


def read_hashes(file: Path, spans: Mapping[str, Span]) -> dict[str, str]:
    """The hash of each tensor of `file` in `spans`, computed from its bytes. Raises OSError."""
    found = {}
    with file.open("rb", buffering=0) as stream:
        for name, span in sorted(spans.items(), key=lambda pair: pair[1].start):
            stream.seek(span.start)
            found[name] = _hash(span.dtype, span.shape, _chunks(stream, span.size))
    return found


def cache_folder() -> Path:
    """Where hashes are remembered; it may be deleted at any time."""
    if given := os.environ.get(CACHE):
        return Path(given, "weights")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "deepspec", "weights")


def _hash_files(parts: Sequence[Spans]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file, spans in parts:
        found |= hashes_in(file, spans)
    return found


def _chunks(stream: Any, size: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, size)))
    while size:
        part = buffer[: min(len(buffer), size)]
        filled = 0
        while filled < len(part):
            count = stream.readinto(part[filled:])
            if not count:
                raise OSError("it is shorter than its header says")
            filled += count
        yield part
        size -= len(part)


def _hash(dtype: str, shape: Sequence[int], chunks: Iterable[Any]) -> str:
    """Float32 that holds numbers of bfloat16 alone counts as bfloat16, whatever loaded it so."""
    whole = hashlib.sha256()
    narrow = hashlib.sha256() if dtype == "F32" else None
    for chunk in chunks:
        whole.update(chunk)
        if narrow is not None:
            halves = np.frombuffer(chunk, "<u2").reshape(-1, 2)
            if halves[:, 0].any():
                narrow = None
            else:
                narrow.update(halves[:, 1].tobytes())
    if narrow is not None:
        dtype, whole = "BF16", narrow
    return _digest([dtype, [int(size) for size in shape], whole.hexdigest()])[:32]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _key(file: Path) -> tuple[str, int, int, int, int]:
    found = file.stat()
    return str(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _recall(entry: Path) -> dict[str, str]:
    """What is remembered in `entry`; nothing where it is damaged."""
    try:
        found = read_as(_Entry, entry, TargetError, "")
    except (FileNotFoundError, TargetError):
        return {}
    whole = found.checksum == _digest([entry.stem, sorted(found.tensors.items())])
    return dict(found.tensors) if whole else {}


def _remember(entry: Path, file: Path, tensors: dict[str, str]) -> None:
    checksum = _digest([entry.stem, sorted(tensors.items())])
    try:
        write_text(entry, json.dumps(asdict(_Entry(str(file), tensors, checksum))) + "\n")
    except OSError as error:
        say_once(
            f"{entry.parent} cannot be written ({error.strerror}): the target's weights are hashed "
            f"at every start; set {CACHE} to a folder that can be"
        )


@contextmanager
def _alone(entry: Path) -> Iterator[None]:
    """Inside, no other process or thread hashes the same file; one that dies lets go."""
    file = entry.with_suffix(".lock")
    lock = FileLock(file)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # no such folder, or no locks there: each process hashes
        yield
        return
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # those that wait for it find the entry, or hash themselves
        lock.release()


def _in_background(work: Callable[[], T]) -> Future[T]:
    """`work` in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, daemon=True, name="hashing").start()
    return future
