"""Features fetched from servers of `deepspec serve-target`.

A request that fails goes to another server, and a server that failed rests for a while; training
ends only when none has answered for `features.patience` seconds. Nothing is lost: a request is
asked again until it is answered.

An answer is read as if its server were hostile: within `features.timeout` as a whole, up to the
size that the request's tokens give, and only in the tensors, data types and shapes expected. Values
that are not finite meet the same check as the own target's: that of the loss.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import httpx
import torch
from pydantic import Field
from safetensors.torch import save
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
from deepspec.features.wire import (
    PATIENCE,
    expected_answer,
    headers_of,
    largest_answer,
    read_answer,
)
from deepspec.http_answers import UnusableAnswerError, fetch, shown
from deepspec.json_files import as_kind, parse_json
from deepspec.progress import say
from deepspec.records import Sample, TargetFeatures
from deepspec.secrets import hide_url, shown_url, token_of

TOKEN = "DEEPSPEC_TOKEN"
CONNECT_SECONDS = 5.0
REST_SECONDS = 5.0  # a server that failed is asked again after it, or when all have failed
LONGEST_REST = 60.0  # whatever a server asks for by Retry-After
MAX_DESCRIPTION = 2**20  # bytes


class _Unavailable(Exception):
    """This server cannot answer now; another, or later this one, may."""


@dataclass(frozen=True)
class Description:
    """What a server is asked for once: its target, and what its features look like."""

    identity: dict[str, str]
    layer_ids: Annotated[list[int], Field(min_length=1, max_length=10_000)]
    hidden_size: Annotated[int, Field(gt=0, le=2**20)]
    dtype: Literal["bfloat16", "float8", "float32"]


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
        # httpx has no limit on the time of a whole request; asyncio has
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="http", daemon=True).start()
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(config.timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
        )
        self.description = self._describe()
        self.identity = self.description.identity

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
        body, looks = save(request), self.description
        expected = expected_answer(
            looks.dtype, tokens, finals, len(looks.layer_ids), looks.hidden_size
        )
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
            content: bytes = retrying(self._ask, body, largest_answer(expected))
        except _Unavailable as error:
            raise ServerError(
                f"no feature server has answered for {self._config.patience:g} s; the last said: "
                f"{error}. Start one of {', '.join(each.address for each in self._servers)} again "
                "(deepspec serve-target); the same command then goes on from the last checkpoint"
            ) from None
        try:
            tensors = read_answer(content, expected)
        except ValueError as error:
            raise ServerError(
                f"a feature server sent something else: {error}; {_advice(200)}"
            ) from None
        with self._lock:
            self.tokens += tokens
            self.received += len(content)
        return decode(tensors)

    def close(self) -> str:
        """Give up what is still asked for; a line about what came over the wire."""
        self._closed.set()
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop)
        a_token = self.received / max(1, self.tokens)
        return f"features: {self.tokens} tokens fetched, {a_token:.0f} bytes a token on the wire"

    def _ask(self, body: bytes, limit: int) -> bytes:
        server = self._choose()
        try:
            response = self._wait_for(self._post(server.url, body, limit))
        except UnusableAnswerError as error:
            raise ServerError(f"{server.address}: {error}; {_advice(200)}") from None
        except httpx.TransportError as error:
            self._rest(server, REST_SECONDS)
            said = shown(str(error))
            raise _Unavailable(f"{server.address}: {type(error).__name__} {said}") from None
        finally:
            with self._lock:
                server.asked -= 1
        said = f"{server.address}: HTTP {response.status_code} {shown(response.text)}"
        if response.status_code in (408, 429, 502, 503, 504):
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

    async def _post(self, server_url: str, body: bytes, limit: int) -> httpx.Response:
        seconds = self._config.timeout
        headers = {PATIENCE: f"{seconds:g}"}
        url = f"{server_url}/v1/features"
        return await fetch(self._client, "POST", url, seconds, limit, content=body, headers=headers)

    async def _cancel(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._client.aclose()

    def _wait_for(self, request: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(request, self._loop).result()

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

    def _describe(self) -> Description:
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
            found: dict[str, Description] = retrying(self._ask_all)
        except _Unavailable as error:
            raise ServerError(
                f"no feature server has answered for {self._config.patience:g} s: {error}. Start "
                "them by deepspec serve-target, or mend features.servers (such as "
                "[http://10.0.0.5:8300])"
            ) from None
        (first, description), *others = found.items()
        for address, other in others:
            theirs = asdict(other)
            different = [key for key, own in asdict(description).items() if theirs[key] != own]
            if different:
                raise ServerError(
                    f"{first} and {address} differ in {', '.join(different)}; they must serve the "
                    "same target with the same settings"
                )
        return description

    def _ask_all(self) -> dict[str, Description]:
        found, failures = {}, []
        for server in self._servers:
            url = f"{server.url}/v1/target"
            request = fetch(self._client, "GET", url, self._config.timeout, MAX_DESCRIPTION)
            try:
                response = self._wait_for(request)
                if response.status_code in (401, 403):
                    raise ServerError(
                        f"{server.address}: HTTP {response.status_code}; {_advice(401)}"
                    )
                if response.status_code != 200:
                    failures.append(f"{server.address} (HTTP {response.status_code})")
                    continue
                found[server.address] = _described(response.content)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise ServerError(
                    f"features.servers: {server.address} is no address ({shown(str(error))}); "
                    "give such as [http://10.0.0.5:8300]"
                ) from None
            except (httpx.HTTPError, ValueError) as error:
                said = f"{type(error).__name__}: {shown(str(error))}"
                failures.append(f"{server.address} ({said})")
        if not found:
            raise _Unavailable("; ".join(failures))
        return found


def _described(content: bytes) -> Description:
    description = as_kind(Description, parse_json(content))
    if "weights" not in description.identity:
        raise ValueError("identity has no weights")
    return description


def _tell(state: RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        say(f"waiting for a feature server: {state.outcome.exception()}")


def _pause(response: httpx.Response) -> float:
    """Return the seconds that a server asks to be left alone, within reason."""
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return 1.0
    return min(max(seconds, 0.0), LONGEST_REST) if not math.isnan(seconds) else 1.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"set the variable {TOKEN} to the token that the servers were started with"
    if status == 413:
        return (
            "start the servers with a larger serve.max_body_mib or serve.max_tokens, or lower "
            "training.micro_batch_size"
        )
    if 300 <= status < 400:
        return "redirects are not followed; give the final address in features.servers"
    return "are client and server of one version?"
