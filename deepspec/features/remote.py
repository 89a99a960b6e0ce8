"""Features fetched from servers of `deepspec serve-target`.

A request that fails goes to another server, and a server that failed rests for a while; training
ends only when none has answered for `features.patience` seconds. Nothing is lost: a request is
asked again until it is answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_exponential_jitter,
    wait_fixed,
)

from deepspec.config.schema import FeaturesConfig
from deepspec.errors import ServerError
from deepspec.features.encoding import decode
from deepspec.progress import say
from deepspec.records import Sample, TargetFeatures
from deepspec.secrets import hide_url, masked, shown_url, token_of

TOKEN = "DEEPSPEC_TOKEN"
IDENTITY = "x-target-weights"  # in every answer: a server may be started again with another model
ALL_WEIGHTS = "x-target-all-weights"  # the same of all values, where the server knows it
CONNECT_SECONDS = 5.0
REST_SECONDS = 5.0  # a server that failed is asked again after it, or when all have failed


def headers_of(identity: dict[str, str]) -> list[tuple[str, str]]:
    """What answers of the server of this target carry."""
    known = {IDENTITY: identity["weights"], ALL_WEIGHTS: identity.get("all_weights", "")}
    return [(key, value) for key, value in known.items() if value]


class _Unavailable(Exception):
    """This server cannot answer now; another, or later this one, may."""


@dataclass
class _Server:
    address: str  # as it is shown
    url: str
    asked: int = 0  # requests on their way
    rested: float = 0.0  # when it may be asked again


class RemoteTarget:
    """`servers`, as one. Raises ServerError when they cannot be used; see `describe`.

    `all_finals`: as in `Target.features`. `tokens` and `received` count what came over the wire,
    bodies only.
    """

    def __init__(self, config: FeaturesConfig, all_finals: bool = True) -> None:
        self._config, self._all_finals = config, all_finals
        self._servers = [
            _Server(shown_url(url.rstrip("/")), url.rstrip("/")) for url in config.servers
        ]
        self._lock, self._closed = threading.Lock(), threading.Event()
        self.tokens = self.received = 0
        token = token_of(TOKEN)
        for url in config.servers:
            hide_url(url)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(config.timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
        )
        self.description = self._describe()
        self.identity: dict[str, str] = self.description["identity"]

    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """Of `samples`, packed, on the CPU; from whichever server answers."""
        request = {
            "input_ids": torch.cat([sample.input_ids for sample in samples]).int(),
            "lengths": torch.tensor([len(sample) for sample in samples], dtype=torch.int32),
        }
        tokens = finals = len(request["input_ids"])
        if not self._all_finals:
            request["loss_mask"] = torch.cat([sample.loss_mask for sample in samples])
            finals = sum(int(sample.followed.sum()) for sample in samples)
        body = save(request)
        retrying = Retrying(
            stop=stop_any(
                stop_after_delay(self._config.patience), stop_when_event_set(self._closed)
            ),
            sleep=sleep_using_event(self._closed),
            wait=wait_exponential_jitter(initial=0.05, max=REST_SECONDS, jitter=0.05),
            retry=retry_if_exception_type(_Unavailable),
            reraise=True,
        )
        try:
            content: bytes = retrying(self._ask, body)
        except _Unavailable as error:
            raise ServerError(
                f"no feature server has answered for {self._config.patience:g} s; the last said: "
                f"{error}. Start one of {', '.join(each.address for each in self._servers)} again "
                "(deepspec serve-target); the same command then goes on from the last checkpoint"
            ) from None
        features = self._features(content, tokens, finals)
        with self._lock:
            self.tokens += tokens
            self.received += len(content)
        return features

    def close(self) -> str:
        """Give up what is still asked for; a line about what came over the wire."""
        self._closed.set()
        a_token = self.received / max(1, self.tokens)
        return f"features: {self.tokens} tokens fetched, {a_token:.0f} bytes a token on the wire"

    def _ask(self, body: bytes) -> bytes:
        server = self._choose()
        try:
            response = self._client.post(f"{server.url}/v1/features", content=body)
        except httpx.TransportError as error:
            self._rest(server, REST_SECONDS)
            raise _Unavailable(
                f"{server.address}: {type(error).__name__} {masked(str(error))}"
            ) from None
        finally:
            with self._lock:
                server.asked -= 1
        said = f"{server.address}: HTTP {response.status_code} {masked(response.text)[:200]}"
        if response.status_code in (429, 502, 503, 504):
            self._rest(server, _pause(response))
            raise _Unavailable(said)
        if response.status_code >= 500:
            self._rest(server, REST_SECONDS)
            raise _Unavailable(said)
        if response.status_code != 200:
            raise ServerError(f"{said}; {_advice(response.status_code)}")
        if any(response.headers.get(key) != value for key, value in headers_of(self.identity)):
            raise ServerError(
                f"{server.address} serves another target than before; start it again with the "
                "one that training began with"
            )
        return response.content

    def _choose(self) -> _Server:
        """The least asked of those that may be; when all rest, the one that has rested longest."""
        with self._lock:
            now = time.monotonic()
            able = [server for server in self._servers if server.rested <= now]
            chosen = (
                min(able, key=lambda s: s.asked)
                if able
                else min(self._servers, key=lambda s: s.rested)
            )
            chosen.asked += 1
            return chosen

    def _rest(self, server: _Server, seconds: float) -> None:
        with self._lock:
            server.rested = time.monotonic() + seconds

    def _features(self, content: bytes, tokens: int, finals: int) -> TargetFeatures:
        try:
            features = decode(load(content))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ServerError(f"a feature server sent something else: {error}") from None
        layers, width = len(self.description["layer_ids"]), self.description["hidden_size"]
        shapes = tuple(features.context.shape), tuple(features.final.shape)
        expected = (tokens, layers * width), (finals, width)
        if shapes != expected:
            raise ServerError(
                f"a feature server sent features of shapes {shapes} for {expected}; {_advice(200)}"
            )
        return features

    def _describe(self) -> dict[str, Any]:
        """What the servers say of their target; waits for the first that answers, which may still
        be loading it. Raises ServerError: all that answer must agree."""
        retrying = Retrying(
            stop=stop_after_delay(self._config.patience),
            wait=wait_fixed(1),
            retry=retry_if_exception_type(_Unavailable),
            reraise=True,
            before_sleep=_tell,
        )
        try:
            found: dict[str, dict[str, Any]] = retrying(self._ask_all)
        except _Unavailable as error:
            raise ServerError(
                f"no feature server has answered for {self._config.patience:g} s: {error}. Start "
                "them by deepspec serve-target, or mend features.servers (such as "
                "[http://10.0.0.5:8300])"
            ) from None
        (first, description), *others = found.items()
        for address, other in others:
            different = [key for key in description if other.get(key) != description[key]]
            if different:
                raise ServerError(
                    f"{first} and {address} differ in {', '.join(different)}; they must serve the "
                    "same target with the same settings"
                )
        return description

    def _ask_all(self) -> dict[str, dict[str, Any]]:
        found, failures = {}, []
        for server in self._servers:
            try:
                response = self._client.get(f"{server.url}/v1/target")
                if response.status_code in (401, 403):
                    raise ServerError(
                        f"{server.address}: HTTP {response.status_code}; {_advice(401)}"
                    )
                if response.status_code != 200:
                    failures.append(f"{server.address} (HTTP {response.status_code})")
                    continue
                found[server.address] = response.json()
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise ServerError(
                    f"features.servers: {server.address} is no address ({masked(str(error))}); "
                    "give such as [http://10.0.0.5:8300]"
                ) from None
            except (httpx.HTTPError, ValueError) as error:
                failures.append(f"{server.address} ({type(error).__name__}: {masked(str(error))})")
        if not found:
            raise _Unavailable("; ".join(failures))
        return found


def _tell(state: RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        say(f"waiting for a feature server: {state.outcome.exception()}")


def _pause(response: httpx.Response) -> float:
    try:
        return float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return 1.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"set the variable {TOKEN} to the token that the servers were started with"
    if status == 413:
        return (
            "start the servers with a larger serve.max_body_mib or serve.max_tokens, or lower "
            "training.micro_batch_size"
        )
    return "are client and server of one version?"
