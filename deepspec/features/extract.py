"""Making a store: the target over all samples, shard by shard.

Which samples make which shard is a function of the samples and `extract.shard_mib` alone, so any
number of processes share the work, and one that is started again makes what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspec.atomic import free_bytes
from deepspec.config.schema import ExtractConfig
from deepspec.errors import DataError
from deepspec.features.encoding import encode, resolve_dtype
from deepspec.features.store import Store
from deepspec.features.store_index import BadShardError, StoreHeader, digest_all, digest_of
from deepspec.progress import Progress, track
from deepspec.records import Sample
from deepspec.streams import tell
from deepspec.targets import Target

GIB = 2**30


@dataclass(frozen=True)
class Shard:
    """A shard that is to be made."""

    name: str
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        """Of all its samples."""
        return sum(len(sample) for sample in self.samples)


def header_of(
    target: Target, samples: Sequence[Sample], dtype: str, all_finals: bool = True
) -> StoreHeader:
    """What a store of `samples` says of itself; `dtype` as in `extract.dtype`, `all_finals` as in
    `DrafterKind`.

    Raises DataError where two samples have one id, by which they are found again.
    """
    twice = [name for name, count in Counter(s.sample_id for s in samples).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} sample ids are there more than once, such as {twice[0]}; name a field "
            "that tells rows apart by data.fields.id, or remove the doubles"
        )
    return StoreHeader(
        target=target.name,
        identity=target.identity,
        layer_ids=list(target.layer_ids),
        hidden_size=target.hidden_size,
        dtype=resolve_dtype(dtype, target.dtype),
        samples=len(samples),
        data=digest_all(samples),
        all_finals=all_finals,
        conversations=digest_of((s.sample_id, s.conversation_id) for s in samples),
    )


def discard_bad(store: Store, shards: Sequence[str], samples: Sequence[Sample]) -> None:
    """Reread `shards` whole, and delete those that are not what was written for `samples`:
    `missing_shards` then has them made again."""
    known = {sample.sample_id for sample in samples}
    for shard in track(shards, "check", len(shards), "shards") if shards else ():
        try:
            if others := store.verify(shard) - known:
                what = f"{store.path / shard}.json has samples of other data, such as {min(others)}"
                raise BadShardError(what, shard)
        except BadShardError as error:
            tell(f"{error.what}; it is made again")
            store.discard(shard)


def missing_shards(samples: Sequence[Sample], store: Store, config: ExtractConfig) -> list[Shard]:
    """All samples, by id, cut into shards of about `shard_mib`: those that `store` lacks any of.

    Their names tell what is in them: another `shard_mib` cuts otherwise.
    """
    budget = max(1, int(config.shard_mib * 2**20) // store.header.bytes_a_token)
    shards: list[list[Sample]] = [[]]
    tokens = 0
    for sample in sorted(samples, key=lambda sample: sample.sample_id):
        if shards[-1] and tokens + len(sample) > budget:
            shards.append([])
            tokens = 0
        shards[-1].append(sample)
        tokens += len(sample)
    return [
        Shard(f"shard-{index:05d}-{digest_all(own)[:8]}", own)
        for index, own in enumerate(shards)
        if not all(map(store.holds, own))
    ]


def check_room(path: Path, header: StoreHeader, need: int, config: ExtractConfig) -> None:
    """Raises DataError where `need` bytes do not fit the disk, or exceed `limit_gib` unasked."""
    free = free_bytes(path)
    smaller = "" if header.dtype == "float8" else "extract.dtype=float8, "
    if need > free:
        raise DataError(
            f"{path} needs {need / GIB:.2f} GiB more, {free / GIB:.2f} GiB are free: "
            f"{(need - free) / GIB:.2f} GiB are missing. Free them, give another disk, or set "
            f"{smaller}data.limit or data.max_length"
        )
    if need > config.limit_gib * GIB and not config.yes:
        raise DataError(
            f"{path} would take {need / GIB:.2f} GiB, more than extract.limit_gib="
            f"{config.limit_gib:g}; say extract.yes=true to go on, or set {smaller}data.limit or "
            "data.max_length"
        )


def extract(target: Target, shards: Sequence[Shard], store: Store, config: ExtractConfig) -> None:
    """Make `shards`, with progress; one is written while the next is computed."""
    total = sum(shard.tokens for shard in shards)
    written: Future[None] | None = None
    with Progress("extract", total, "tokens") as progress, ThreadPoolExecutor(1) as writer:
        for shard in shards:
            encoded = []
            for part in batches(shard.samples, config.batch_tokens):
                features = target.features(part, store.header.all_finals)
                encoded.append(encode(features, store.header.dtype, len(target.layer_ids)))
                progress.advance(sum(len(sample) for sample in part))
            packed = {
                name: torch.cat([tensors[name].cpu() for tensors in encoded]) for name in encoded[0]
            }
            if written is not None:
                written.result()  # no more than one waits; raises what went wrong
            written = writer.submit(store.write, shard.name, _by_length(shard.samples), packed)
        if written is not None:
            written.result()


def _by_length(samples: Sequence[Sample]) -> list[Sample]:
    """Alike lengths side by side: a forward pads little."""
    return sorted(samples, key=lambda sample: (-len(sample), sample.sample_id))


def batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """All `samples` by length, in forwards of at most `batch_tokens`, padding counted."""
    part: list[Sample] = []
    for sample in _by_length(samples):
        longest = len(part[0]) if part else len(sample)
        if part and longest * (len(part) + 1) > batch_tokens:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part
