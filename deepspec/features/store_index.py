"""What a store of features has beside the features: its header, and the index of each shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from deepspec.errors import DataError
from deepspec.features.encoding import DTYPES, state_bytes, token_bytes
from deepspec.json_files import as_kind, read_as, read_json
from deepspec.records import Sample

FORMAT = 2  # since store.json and the indices have checksums
UNPROTECTED = 1
HEADER = "store.json"
TOKEN_BYTES = 4 + 1  # of input_ids and loss_mask
AGAIN = "make it again by the same deepspec extract command, which keeps all other shards"

Count = Annotated[int, Field(ge=0, lt=2**40)]  # sums of them stay exact in any arithmetic


@dataclass(frozen=True)
class StoreHeader:
    """What a store is of. `samples` of them when it is complete, `data` their digest.

    `all_finals`: whether final states are there of all tokens, as in stores that do not say, or of
    those alone that a supervised one follows. `conversations`: a digest of the conversation of
    each sample; None in stores of format 1.
    """

    target: str
    identity: dict[str, str]
    layer_ids: Annotated[list[Annotated[int, Field(ge=-1, lt=2**16)]], Field(min_length=1)]
    hidden_size: Annotated[int, Field(ge=1, lt=2**24)]
    dtype: str
    samples: Count
    data: str
    all_finals: bool = True
    conversations: str | None = None

    @property
    def checksum(self) -> str:
        """Of all fields."""
        return _checksum(vars(self))

    def checksum_of(self, shard: str, index: Index) -> str:
        """Of the `index` of `shard` in this store; what `target` is called does not matter."""
        rows = [vars(row) for row in index.samples]
        return _checksum([shard, index.sha256, rows, {**vars(self), "target": ""}])

    @property
    def bytes_a_token(self) -> int:
        """Of a shard, id and mask included; at most, where not `all_finals`."""
        return token_bytes(self.dtype, len(self.layer_ids), self.hidden_size) + TOKEN_BYTES

    def finals(self, sample: Sample) -> int:
        """Final states of `sample` that the store keeps."""
        return len(sample) if self.all_finals else int(sample.followed.sum())

    def bytes_of(self, samples: Iterable[Sample]) -> int:
        """What `samples` take in shards."""
        spared = state_bytes(self.dtype, self.hidden_size)
        return sum(
            len(sample) * self.bytes_a_token - (len(sample) - self.finals(sample)) * spared
            for sample in samples
        )


@dataclass(frozen=True)
class Row:
    """What an index has of a sample. Older ones do not have the last two."""

    id: str
    length: Annotated[int, Field(ge=1, lt=2**40)]
    digest: str
    finals: Count | None = None
    conversation_id: str | None = None

    @property
    def kept(self) -> int:
        """Its final states."""
        return self.length if self.finals is None else self.finals


@dataclass(frozen=True)
class Index:
    """The content of a shard-*.json."""

    sha256: str
    samples: list[Row]
    checksum: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a sample lies: its `tokens`, and its `finals` among the final states of the shard."""

    shard: str
    tokens: slice
    finals: slice
    digest: str
    conversation_id: str | None


class BadShardError(DataError):
    """A file of `shard` is not what was written, or not there."""

    def __init__(self, what: str, shard: str) -> None:
        super().__init__(f"{what}; {AGAIN}")
        self.what, self.shard = what, shard


def read_header(path: Path) -> StoreHeader:
    """`store.json` of the folder `path`. Raises DataError."""
    file = path / HEADER
    if not file.is_file():
        raise DataError(
            f"{path} is no store of features ({HEADER} is missing); make one by deepspec extract "
            f"recipe=R out={path}"
        )
    again = "delete it, and run the same deepspec extract again: it keeps the shards that fit"
    raw = read_json(file, DataError, again)
    version, checksum = raw.pop("format", None), raw.pop("checksum", None)
    if version not in (UNPROTECTED, FORMAT):
        raise DataError(
            f"{file} has format {version!r:.40}, this version reads {UNPROTECTED} and {FORMAT}; "
            "extract again"
        )
    try:
        header = as_kind(StoreHeader, raw)
        if version == FORMAT and header.checksum != checksum:
            raise ValueError("its checksum is not the recorded one")
        if (header.conversations is None) != (version == UNPROTECTED):
            raise ValueError("its format does not fit its fields")
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); {again}") from None
    if header.dtype not in DTYPES:
        raise DataError(f"{file} has dtype {header.dtype!r}, expected one of {', '.join(DTYPES)}")
    return header


def digest(sample: Sample) -> str:
    """Of its tokens and mask."""
    own = hashlib.blake2b(sample.input_ids.numpy().tobytes(), digest_size=8)
    own.update(sample.loss_mask.numpy().tobytes())
    return own.hexdigest()


def digest_all(samples: Iterable[Sample]) -> str:
    """Of ids, tokens and masks of all samples, whatever their order."""
    return digest_of((sample.sample_id, digest(sample)) for sample in samples)


def digest_of(pairs: Iterable[tuple[str, str | None]]) -> str:
    """Of a sample's id and something about it for all samples, whatever their order."""
    lines = sorted(name if value is None else f"{name}\0{value}" for name, value in pairs)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(file: Path, header: StoreHeader) -> Index:
    """Raises BadShardError, or FileNotFoundError."""
    try:
        index = read_as(Index, file, DataError, "")
    except DataError as error:
        raise BadShardError(str(error).removesuffix("; "), file.stem) from None
    wrong = None
    recorded = index.checksum or header.conversations is not None
    if recorded and index.checksum != header.checksum_of(file.stem, index):
        wrong = "its checksum is not that of this content in this store"
    elif len({row.id for row in index.samples}) < len(index.samples):
        wrong = "two samples of one id"
    elif any(row.kept > row.length for row in index.samples):
        wrong = "more final states than tokens"
    if wrong:
        raise BadShardError(f"{file} is damaged ({wrong})", file.stem)
    return index


def places_in(shard: str, index: Index) -> Iterator[tuple[str, Place]]:
    """Where each sample lies in the tensors: one after the other."""
    tokens = [0, *accumulate(row.length for row in index.samples)]
    finals = [0, *accumulate(row.kept for row in index.samples)]
    for place, row in enumerate(index.samples):
        ends = slice(*tokens[place : place + 2]), slice(*finals[place : place + 2])
        yield row.id, Place(shard, *ends, row.digest, row.conversation_id)
