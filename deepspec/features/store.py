"""A store of samples and their features: safetensors shards, each of them whole or not there.

    store.json           format, identity of the target, layer ids, dtype, which samples
    shard-*.safetensors  samples end to end: input_ids [T] int32, loss_mask [T] bool, context
                         [T, L*D], final [F, D] and, in float8, their scales
    shard-*.json         written behind it: sample ids, lengths, final states of each (F in all),
                         digests, the tensors' sha256
    hybrid-*             the same two of `features=hybrid`

A killed process leaves finished shards and nothing else that is looked at. Variable lengths, no
padding. Several processes may write shards of their own names into one folder, where other files
(the answers that `deepspec extract` makes) may lie too. No name is used again for other samples:
who has read the one file must not find the other.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepspec.atomic import atomic_file, free_bytes, sha256, write_text
from deepspec.errors import DataError
from deepspec.features.encoding import DTYPES, decode, state_bytes, token_bytes
from deepspec.records import Sample, TargetFeatures

FORMAT = 1
HEADER = "store.json"
SHARDS = ("shard-*.json", "hybrid-*.json")  # other files may lie beside them
TOKEN_BYTES = 4 + 1  # of input_ids and loss_mask
OPEN_SHARDS = 64


@dataclass(frozen=True)
class StoreHeader:
    """What a store is of. `samples` of them when it is complete, `data` their digest.

    `all_finals`: whether final states are there of all tokens, as in stores that do not say, or of
    those alone that a supervised one follows.
    """

    target: str
    identity: dict[str, str]
    layer_ids: list[int]
    hidden_size: int
    dtype: str
    samples: int
    data: str
    all_finals: bool = True

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
class _Place:
    """Where a sample lies: its `tokens`, and its `finals` among the final states of the shard."""

    shard: str
    tokens: slice
    finals: slice
    digest: str
    conversation_id: str | None


class BadShardError(DataError):
    """The file of `shard` is not what was written, or not there."""

    def __init__(self, message: str, shard: str) -> None:
        super().__init__(message)
        self.shard = shard


class Store:
    """The folder at `path`. `verify`: check a shard's hash before its features are first read by
    this process; tokens are always held against their own digests."""

    def __init__(self, path: Path, header: StoreHeader, verify: bool = True) -> None:
        self.path, self.header = path, header
        self._verify = verify
        self._places: dict[str, _Place] = {}
        self._known: dict[str, str] = {}  # shards, and the sha256 that their places hold for
        self._checked: set[str] = set()
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(self._open)
        self._lock = threading.Lock()  # readers run ahead of the training in threads
        self.refresh()

    # ---------------------------------------------------------------------------- the folder

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Store:
        """An existing store. Raises DataError when there is none or it is not readable."""
        return cls(path, read_header(path), verify)

    @classmethod
    def create(cls, path: Path, header: StoreHeader, verify: bool = True) -> Store:
        """A new store, or the one there, to be continued; where that keeps all final states, so
        it does of what is added.

        Raises DataError when that is of other data, another target, or in another dtype.
        """
        if not (path / HEADER).is_file():
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"format": FORMAT, **asdict(header)}, indent=2)
            write_text(path / HEADER, text + "\n")
        found = read_header(path)
        header = replace(header, all_finals=header.all_finals or found.all_finals)
        names = [field.name for field in fields(header) if field.name != "target"]
        different = [name for name in names if getattr(found, name) != getattr(header, name)]
        if different:
            raise DataError(
                f"{path} is a store of something else: its {', '.join(different)} differ(s); "
                "give another folder, or delete it"
            )
        return cls(path, header, verify)

    def refresh(self) -> None:
        """Look for shards that were finished since."""
        for file in sorted(file for names in SHARDS for file in self.path.glob(names)):
            if file.stem not in self._known:
                with suppress(FileNotFoundError):  # another process has just discarded it
                    self._known[file.stem], places = _index(file)
                    self._places |= places

    def finished(self) -> list[str]:
        """Names of the shards that are whole."""
        return sorted(self._known)

    def __len__(self) -> int:
        return len(self._places)

    def holds(self, sample: Sample) -> bool:
        """Whether its features are here. Raises DataError where other tokens have its id."""
        place = self._places.get(sample.sample_id)
        if place is not None and place.digest != digest(sample):
            raise DataError(
                f"{self.path} has other tokens under the id {sample.sample_id}: the data changed "
                "since it was made; give another folder, or delete it"
            )
        return place is not None

    # ------------------------------------------------------------------------------- reading

    def read(self, samples: Sequence[Sample]) -> TargetFeatures:
        """Features of `samples`, packed, on the CPU. Raises BadShardError, or DataError for a shard
        that could not be opened although it is what was written."""
        parts = [self._slice(self._places[sample.sample_id]) for sample in samples]
        return decode({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def samples(self) -> Iterator[Sample]:
        """All samples, shard by shard. Raises DataError for tokens that are not as written."""
        held: dict[str, list[tuple[str, _Place]]] = defaultdict(list)
        for sample_id, place in self._places.items():
            held[place.shard].append((sample_id, place))
        for shard in self.finished():
            opened = self._file(shard)  # of which this reads the tokens, a thousandth
            ids, mask = opened.get_tensor("input_ids").long(), opened.get_tensor("loss_mask")
            for sample_id, place in held[shard]:
                own, supervised = ids[place.tokens], mask[place.tokens].bool()
                sample = Sample(own, supervised, sample_id, place.conversation_id)
                if digest(sample) != place.digest:
                    self.check(shard)
                    raise DataError(f"{self.path / shard}.json is damaged; delete it and extract")
                yield sample

    def require_complete(self) -> None:
        """Raises DataError where samples are missing."""
        if len(self) < self.header.samples:
            raise DataError(
                f"{self.path} has {len(self)} of {self.header.samples} samples; finish it by the "
                "same deepspec extract command"
            )

    def check(self, shard: str) -> None:
        """Reread one shard whole. Raises BadShardError when it is not what was written, or not what
        lay under its name when this process first saw it: places in it would be of other rows."""
        file = self.path / f"{shard}.safetensors"
        found = sha256(file) if file.is_file() else None
        if found != self._known[shard]:
            raise BadShardError(
                f"{file} is {'corrupt: its sha256 is not the recorded one' if found else 'missing'}"
                f"; delete {shard}.json and what is left of it, and make it again by the same "
                "deepspec extract command, which keeps all other shards",
                shard,
            )

    def discard(self, shard: str) -> None:
        """Forget a bad shard and delete it."""
        for suffix in (".json", ".safetensors"):
            (self.path / f"{shard}{suffix}").unlink(missing_ok=True)
        self._known.pop(shard)
        self._checked.discard(shard)
        self._opened.cache_clear()  # one that is made again gets its name
        self._places = {i: place for i, place in self._places.items() if place.shard != shard}

    def _slice(self, place: _Place) -> dict[str, Tensor]:
        opened, wanted = self._shard(place.shard), {}
        for name in opened.keys():  # noqa: SIM118
            if name not in ("input_ids", "loss_mask"):
                own = place.finals if name.startswith("final") else place.tokens
                wanted[name] = opened.get_slice(name)[own]
        return wanted

    def _shard(self, shard: str) -> Any:
        with self._lock:
            return self._opened(shard)

    def _open(self, shard: str) -> Any:
        if self._verify and shard not in self._checked:
            self.check(shard)
            self._checked.add(shard)
        return self._file(shard)

    def _file(self, shard: str) -> Any:
        try:
            return safe_open(self.path / f"{shard}.safetensors", "pt")
        except (SafetensorError, OSError) as error:
            self.check(shard)  # says more
            raise DataError(f"{self.path / shard}.safetensors is unreadable: {error}") from None

    # ------------------------------------------------------------------------------- writing

    def write(self, shard: str, samples: Sequence[Sample], encoded: dict[str, Tensor]) -> None:
        """Write a shard whole: `encoded` features of `samples`, end to end.

        Raises DataError for a full disk; finished shards stay as they are.
        """
        tensors = {
            "input_ids": torch.cat([sample.input_ids for sample in samples]).int(),
            "loss_mask": torch.cat([sample.loss_mask for sample in samples]),
            **{name: tensor.cpu().contiguous() for name, tensor in encoded.items()},
        }
        rows = [
            {
                "id": sample.sample_id,
                "length": len(sample),
                "finals": self.header.finals(sample),
                "digest": digest(sample),
                "conversation_id": sample.conversation_id,
            }
            for sample in samples
        ]
        assert len(encoded["final"]) == sum(self.header.finals(sample) for sample in samples)
        try:
            with atomic_file(self.path / f"{shard}.safetensors") as partial:
                save_file(tensors, partial)
                hashed = sha256(partial)
            text = json.dumps({"sha256": hashed, "samples": rows})
            write_text(self.path / f"{shard}.json", text + "\n")
        except (OSError, SafetensorError) as error:
            need = sum(tensor.nbytes for tensor in tensors.values())
            raise DataError(
                f"could not write {self.path / shard}.safetensors ({error}): a shard takes "
                f"{need / 2**20:.1f} MiB, {free_bytes(self.path) / 2**20:.1f} MiB are free. "
                "Finished shards are kept: free disk space and start the same command again"
            ) from error
        self.refresh()


def read_header(path: Path) -> StoreHeader:
    """`store.json` of the folder `path`. Raises DataError."""
    file = path / HEADER
    if not file.is_file():
        raise DataError(
            f"{path} is no store of features ({HEADER} is missing); make one by deepspec extract "
            f"recipe=R out={path}"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw.pop("format")
        header = StoreHeader(**raw) if version == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({error}); make the store again") from None
    if header is None:
        raise DataError(f"{file} has format {version}, this version reads {FORMAT}; extract again")
    if header.dtype not in DTYPES:
        raise DataError(f"{file} has dtype {header.dtype!r}, expected one of {', '.join(DTYPES)}")
    return header


def digest(sample: Sample) -> str:
    """Of its tokens and mask."""
    own = hashlib.blake2b(sample.input_ids.numpy().tobytes(), digest_size=8)
    own.update(sample.loss_mask.numpy().tobytes())
    return own.hexdigest()


def digest_all(samples: Iterable[Sample]) -> str:
    """Of all samples, whatever their order."""
    lines = sorted(f"{sample.sample_id}\0{digest(sample)}" for sample in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _index(file: Path) -> tuple[str, dict[str, _Place]]:
    """The sha256 of a shard, and what lies in it by sample id. Raises DataError."""
    places = {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        token = final = 0
        for row in content["samples"]:
            length = row["length"]
            kept = row.get("finals", length)  # older ones: all
            tokens, finals = slice(token, token + length), slice(final, final + kept)
            conversation = row.get("conversation_id")  # older ones do not say
            places[row["id"]] = _Place(file.stem, tokens, finals, row["digest"], conversation)
            token, final = tokens.stop, finals.stop
        return content["sha256"], places
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({error}); delete it and run the same deepspec extract again"
        ) from None
