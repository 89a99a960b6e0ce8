"""Where the training loop gets features: the target in this process, a store, both, or servers.

The loop asks `features(samples)` and does not know which it is. `expect` tells a source what will
be asked for, so that reading and fetching happen behind the step before.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from deepspec.errors import DataError
from deepspec.features.encoding import encode
from deepspec.features.store import Store
from deepspec.features.store_index import BadShardError, digest
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target


class FeatureSource:
    """What every source does; most need only `features`."""

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """Features of `samples`, packed end to end, on any device."""
        raise NotImplementedError

    def expect(self, samples: Sequence[Sample]) -> None:
        """`features(samples)` will be asked for soon."""

    def settle(self, wait: Callable[[], None]) -> None:
        """At a checkpoint and at the end of an epoch, in all processes (`wait` is for all)."""

    def close(self) -> str:
        """Training is over; a line about what came of it, or an empty one."""
        return ""


class Online(FeatureSource):
    """The target in the training process, between the drafter's steps; see `Target.features`."""

    def __init__(self, target: Target, all_finals: bool = True) -> None:
        self._target, self._all_finals = target, all_finals

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """What the target computes now."""
        return self._target.features(samples, self._all_finals)


class Ahead(FeatureSource):
    """A source whose `read` runs ahead of the training in threads, until `close`."""

    def __init__(
        self,
        read: Callable[[Sequence[Sample]], TargetFeatures],
        workers: int,
        close: Callable[[], str] = str,
    ) -> None:
        self._read, self._close = read, close
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="features")
        self._pending: dict[tuple[str, ...], Future[TargetFeatures]] = {}

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """Those that were read ahead; what was not expected waits for its turn."""
        self.expect(samples)
        return self._pending.pop(_key(samples)).result()

    def expect(self, samples: Sequence[Sample]) -> None:
        """Begin to read."""
        if _key(samples) not in self._pending:
            self._pending[_key(samples)] = self._pool.submit(self._read, samples)

    def close(self) -> str:
        """What was read ahead in vain is dropped, and not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return self._close()


class Overlapped(Ahead):
    """The target in the training process, computing ahead in one thread while the drafter learns.

    On a CUDA device its kernels go to a stream of their own and fill what the drafter's leave free.
    """

    def __init__(self, target: Target, all_finals: bool = True) -> None:
        super().__init__(self._compute, workers=1)  # one: the target's hooks are shared
        self._target, self._all_finals, self._stream = target, all_finals, None
        if target.device.type == "cuda":
            self._stream = torch.cuda.Stream(target.device)
            self._stream.wait_stream(torch.cuda.current_stream(target.device))  # its weights

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """Those that are ready, or as soon as they are."""
        features = super().features(samples)
        if self._stream is not None:  # their memory is not taken again before this stream read it
            reader = torch.cuda.current_stream(self._target.device)
            features.context.record_stream(reader)
            features.final.record_stream(reader)
        return features

    def close(self) -> str:
        """The target is free for others: a forward under way has ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        return super().close()

    def _compute(self, samples: Sequence[Sample]) -> TargetFeatures:
        if self._stream is None:
            return self._target.features(samples, self._all_finals)
        with torch.cuda.stream(self._stream):
            features = self._target.features(samples, self._all_finals)
        self._stream.synchronize()  # in this thread, where nobody waits for it
        return features


class Hybrid(FeatureSource):
    """Online for what the store lacks, which is then stored; a later epoch reads it.

    A shard is written when `shard_bytes` are together; what was not when the process dies is
    computed again. Names of this process's shards begin with `writer`. Several processes and jobs
    may share a store.
    """

    def __init__(self, target: Target, store: Store, writer: str, shard_bytes: int) -> None:
        self._target, self._store = target, store
        self._writer, self._size = writer, shard_bytes
        self._fresh: dict[str, tuple[Sample, TargetFeatures]] = {}

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """From the store where it has all of `samples`, else from the target."""
        if all(self._store.holds(sample) for sample in samples):
            try:
                return self._store.read(samples)
            except BadShardError as error:  # made again
                self._store.discard(error.shard)
            except DataError:
                pass  # not opened this time, as with too many open files: the shard stays
        header = self._store.header
        features = self._target.features(samples, header.all_finals)
        contexts = features.context.split([len(sample) for sample in samples])
        finals = features.final.split([header.finals(sample) for sample in samples])
        parts = zip(contexts, finals, strict=True)
        for sample, (context, final) in zip(samples, parts, strict=True):
            if not self._store.holds(sample):
                own = TargetFeatures(context, final).to("cpu")
                self._fresh[sample.sample_id] = (sample, own)
        if sum(len(sample) for sample, _ in self._fresh.values()) >= self._tokens:
            self._flush()
        return features

    def settle(self, wait: Callable[[], None]) -> None:
        """All that was computed is on disk, and every process knows of it."""
        self._flush()
        wait()
        self._store.refresh(repair=True)  # what is damaged is computed again

    @property
    def _tokens(self) -> int:
        return max(1, self._size // self._store.header.bytes_a_token)

    def _flush(self) -> None:
        if not self._fresh:
            return
        header = self._store.header
        samples = [sample for sample, _ in self._fresh.values()]
        packed = TargetFeatures(
            torch.cat([own.context for _, own in self._fresh.values()]),
            torch.cat([own.final for _, own in self._fresh.values()]),
        )
        encoded = encode(packed, header.dtype, len(header.layer_ids))
        # never the name of another shard: other processes and jobs have places in those
        self._store.write(f"{self._writer}-{secrets.token_hex(8)}", samples, encoded)
        self._fresh.clear()


def _key(samples: Sequence[Sample]) -> tuple[str, ...]:
    """By their tokens: ids are as the data gives them, and may be there twice."""
    return tuple(digest(sample) for sample in samples)
