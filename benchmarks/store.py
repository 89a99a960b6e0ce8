"""Stored features: bytes a token, rates beside the disk's own, and how long a training waits.

    deepspec extract recipe=tiny data.limit=600 extract.dtype=bfloat16 out=bf16
    deepspec extract recipe=tiny data.limit=600 extract.dtype=float8 out=fp8
    python benchmarks/store.py bf16 fp8

Rates are of random features in shapes of Qwen3-4B (`--layers 5 --hidden 2560`) in a folder beside
the first store. *disk* writes the same bytes from memory into plain files and syncs them, and reads
them back: what any program can do here. Turns alternate; figures are medians with the least and the
most. *cold* reads what the kernel was told to forget (POSIX_FADV_DONTNEED); a virtual disk's host
may still hold it. *decoded* is what training gets: bfloat16, packed. A store's MB are those in the
file: float8 makes twice as many in memory.

The second table is the stores named: bytes of all files over tokens, against what the format says,
and for each `features.prefetch` the share of a training step of recipe=tiny that waits for the
reader, the median over steps behind a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from stored import training_on

from deepspec.features.encoding import encode, token_bytes
from deepspec.features.extract import Shard
from deepspec.features.store import Store
from deepspec.features.store_index import StoreHeader
from deepspec.machine import describe_machine
from deepspec.records import Sample, TargetFeatures

DTYPES = ("bfloat16", "float8")
LENGTH = 512  # tokens of a sample of the rates
MB = 10**6


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--mib", type=int, default=128, help="of a bfloat16 shard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of training; 0 leaves it out")
    parser.add_argument("--prefetch", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, machine = Console(width=110), describe_machine()
    console.print(rates(options))
    console.print(stored(options))
    print(f"{machine['processor']}, {options.threads} threads, torch {machine['torch']}")


def rates(options: argparse.Namespace) -> Table:
    """MB a second of disk and store, in turns."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    layers, hidden = options.layers, options.hidden
    count = max(1, options.mib * 2**20 // (token_bytes("bfloat16", layers, hidden) * LENGTH))
    shard = Shard("shard-0", [make_sample(index) for index in range(count)])
    features = TargetFeatures(
        torch.randn(shard.tokens, layers * hidden).bfloat16(),
        torch.randn(shard.tokens, hidden).bfloat16(),
    )
    with tempfile.TemporaryDirectory(dir=options.stores[0].parent) as place:
        for _ in range(options.repeats):
            for dtype in DTYPES:
                turn(Path(place), dtype, shard, features, options, found)
    table = Table(
        "MB/s in the file", *DTYPES, title=f"L {layers}, D {hidden}, {LENGTH} tokens each"
    )
    for what in dict.fromkeys(name for name, _ in found):
        cells = (found.get((what, dtype)) for dtype in DTYPES)
        table.add_row(
            what, *(f"{median(c):.0f} ({min(c):.0f} to {max(c):.0f})" if c else "" for c in cells)
        )
    return table


def make_sample(index: int) -> Sample:
    """Tokens, all supervised."""
    return Sample(torch.arange(LENGTH), torch.ones(LENGTH, dtype=torch.bool), f"sample-{index}")


def turn(
    place: Path,
    dtype: str,
    shard: Shard,
    features: TargetFeatures,
    options: argparse.Namespace,
    found: dict[tuple[str, str], list[float]],
) -> None:
    """One turn of everything in `dtype`; what it leaves is deleted."""
    header = StoreHeader("", {}, list(range(options.layers)), options.hidden, dtype, 1, "")
    size = shard.tokens * header.bytes_a_token

    def timed(what: str, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        found[what, dtype].append(size / MB / (time.perf_counter() - begun))

    plain, content = place / "plain", bytes(size)
    timed("disk: write, synced", lambda: write(plain, content))
    forget(plain)
    timed("disk: read, cold", plain.read_bytes)
    timed("disk: read, cached", plain.read_bytes)
    store = Store.create(place / dtype, header)
    encoded = encode(features, dtype, options.layers)
    if dtype == "float8":
        timed("store: encode", lambda: encode(features, dtype, options.layers))
    timed("store: write, synced, hashed", lambda: store.write(shard.name, shard.samples, encoded))
    file = place / dtype / f"{shard.name}.safetensors"
    for verify in (True, False):
        del store  # the kernel keeps what is mapped
        gc.collect()
        forget(file)
        store = Store.open(place / dtype, verify)
        checked = ", checked" if verify else ""
        timed(f"store: read decoded, cold{checked}", partial(read, store, shard.samples))
    timed("store: read decoded, cached", partial(read, store, shard.samples))
    plain.unlink()
    shutil.rmtree(place / dtype)


def write(file: Path, content: bytes) -> None:
    """Until the disk has it."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def forget(file: Path) -> None:
    """Drop the file's pages from the kernel's cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(store: Store, samples: Sequence[Sample]) -> None:
    """One after the other, as micro-batches of 1."""
    for sample in samples:
        store.read([sample])


def stored(options: argparse.Namespace) -> Table:
    """Bytes a token and waits of the stores named."""
    prefetches = [f"waits, prefetch {count}" for count in options.prefetch if options.steps]
    table = Table("store", "dtype", "bytes a token", "of the format", "over the first", *prefetches)
    first = 0.0
    for path in options.stores:
        store = Store.open(path)
        tokens = sum(len(sample) for sample in store.samples())
        size = sum(file.stat().st_size for file in path.iterdir()) / tokens
        first = first or size
        waits = [f"{wait:.1%}" for wait in waited(path, options)]
        exact = f"{store.header.bytes_of(store.samples()) / tokens:.1f}"
        table.add_row(
            path.name, store.header.dtype, f"{size:.1f}", exact, f"{size / first:.4f}", *waits
        )
    for dtype in DTYPES:
        exact, whole = (token_bytes(name, 5, 2560) for name in (dtype, "bfloat16"))
        table.add_row("Qwen3-4B, computed", dtype, "", str(exact), f"{exact / whole:.4f}")
    return table


def waited(path: Path, options: argparse.Namespace) -> Iterator[float]:
    """For each prefetch, the median share of a step that waits."""
    for prefetch in options.prefetch if options.steps else ():
        with training_on(path, f"features.prefetch={prefetch}") as trainer:
            waits = [trainer.train_step()["feature_wait"] for _ in range(options.steps)]
        yield median(waits[options.steps // 4 :])


if __name__ == "__main__":
    main()
