"""The frozen target behind HTTP, for trainers on other machines.

    POST /v1/features   safetensors: input_ids [T] int32, lengths [B] int32 -> as `encode` gives;
                        with loss_mask [T] bool, final states only where a supervised token follows
    GET  /v1/target     identity, layer ids, hidden size, dtype
    GET  /health        200 while requests are taken
    GET  /metrics       Prometheus

Bodies are safetensors both ways, never pickle. One thread computes, a bounded queue waits, and a
request beyond it is refused (503 with Retry-After). What crosses the wire is O(D) a token: hidden
states, never logits.

No client can hold up the others: a request enters the queue when its body is complete, bodies must
arrive at a minimal rate and within a budget of memory, clients are served in turn, and a request
leaves the queue when its client has gone or will not wait any longer.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import socket
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from safetensors.torch import save
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from deepspec.config.schema import ServeConfig
from deepspec.errors import ConfigError
from deepspec.features.connections import BYTES_PER_SECOND, Connections
from deepspec.features.encoding import encode, resolve_dtype
from deepspec.features.turns import Turns
from deepspec.features.wire import PATIENCE, TooManyTokensError, Wanted, headers_of, read_request
from deepspec.streams import visible
from deepspec.targets import Target

MIB = 2**20
GONE = 499  # as nginx counts it: the client closed the connection before the answer


class FeatureServer:
    """The application: `FeatureServer(target, config, token).app`."""

    def __init__(self, target: Target, config: ServeConfig, token: str | None) -> None:
        self._target, self._config, self._token = target, config, token
        self._dtype = resolve_dtype(config.dtype, target.dtype)
        headers_of(target.identity)  # waits for the hash of its weights before any request does
        self._turns = Turns(config.queue)
        self._held: Tally[str] = Tally()  # bytes of bodies by client
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="target")
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "deepspec_requests",
            "Requests by status; 499: the client had gone, 504: it would not have waited longer",
            ["status"],
            registry=registry,
        )
        self._lost = Counter(
            "deepspec_lost_connections", "Connections closed", ["reason"], registry=registry
        )
        self._tokens = Counter("deepspec_tokens", "Tokens computed", registry=registry)
        self._bytes = Counter("deepspec_sent_bytes", "Bytes of features sent", registry=registry)
        self._seconds = Histogram("deepspec_seconds", "Seconds of a forward", registry=registry)
        Gauge("deepspec_waiting", "Requests waiting or computed", registry=registry).set_function(
            lambda: len(self._turns)
        )
        Gauge("deepspec_body_bytes", "Bytes of bodies held", registry=registry).set_function(
            self._held.total
        )
        self.app = Starlette(
            routes=[
                Route("/v1/features", self._counted, methods=["POST"]),
                Route("/v1/target", self._describe),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ]
        )

    def http_server(self) -> uvicorn.Server:
        """Return the server of the application, with limits on its connections."""
        connections = Connections(self._config, lambda reason: self._lost.labels(reason).inc())
        settings: dict[str, Any] = {
            "http": connections.protocol,
            "ws": "none",
            "lifespan": "off",
            "timeout_keep_alive": math.ceil(self._config.request_seconds),
            "proxy_headers": False,  # a client's address is that of its connection
            "access_log": False,
            "log_level": "error",  # what clients do wrong is counted instead
        }
        return uvicorn.Server(uvicorn.Config(self.app, **settings))

    async def _counted(self, request: Request) -> Response:
        status = 500
        try:
            response = await self._features(request)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = GONE
            return Response(status_code=GONE)
        finally:
            self._requests.labels(str(status)).inc()

    async def _features(self, request: Request) -> Response:
        self._authorize(request)
        client = request.client.host if request.client else ""
        until = time.monotonic() + _patience(request)
        with self._share(client) as held:
            wanted = self._wanted(await self._body(request, client, held))
            async with self._turn(request, client, until) as gone:
                loop = asyncio.get_running_loop()
                body = await loop.run_in_executor(self._compute, self._answer, wanted)
                if gone.done():
                    raise ClientDisconnect
        headers = dict(headers_of(self._target.identity))
        return Response(body, media_type="application/octet-stream", headers=headers)

    @asynccontextmanager
    async def _turn(
        self, request: Request, client: str, until: float
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Wait for the turn of a request. The yielded task is done once its client has gone.

        Raises ClientDisconnect or HTTPException where the turn does not come.
        """
        turn = self._turns.join(client)
        if turn is None:
            raise _busy("the queue is full")
        gone = asyncio.create_task(_disconnected(request))
        try:
            left = until - time.monotonic()
            await asyncio.wait((turn, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for _ in range(3):  # what closed the connection at once is seen by then
                await asyncio.sleep(0)
            if gone.done():
                raise ClientDisconnect
            if not turn.done() or time.monotonic() > until:
                raise HTTPException(504, "the time that the client gave is over")
            if not turn.result():
                raise _busy("the queue is full, and other clients have fewer requests in it")
            yield gone
        finally:
            gone.cancel()
            self._turns.leave(turn)

    def _answer(self, wanted: Wanted) -> bytes:
        begun = time.monotonic()
        features = self._target.features(wanted.samples, wanted.all_finals)
        encoded = encode(features, self._dtype, len(self._target.layer_ids))
        body = save({name: tensor.cpu().contiguous() for name, tensor in encoded.items()})
        self._seconds.observe(time.monotonic() - begun)
        self._tokens.inc(features.context.shape[0])
        self._bytes.inc(len(body))
        return body

    @contextmanager
    def _share(self, client: str) -> Iterator[list[int]]:
        """Count the bytes of a request as held by `client` until it is over."""
        held = [0]
        try:
            yield held
        finally:
            self._held[client] -= held[0]
            if not self._held[client]:
                del self._held[client]

    async def _body(self, request: Request, client: str, held: list[int]) -> bytes:
        """Return the body. Raises HTTPException as soon as it is too large or too slow, or the
        bodies together are too large."""
        limit, budget = self._config.max_body_mib * MIB, self._config.bodies_mib * MIB
        own = max(limit, budget // 4)  # what one client may hold
        declared = request.headers.get("content-length")
        if declared is None:
            raise HTTPException(411, "a request needs the header Content-Length")
        length = int(declared)
        if length > limit:
            raise HTTPException(413, f"the body exceeds serve.max_body_mib ({limit} bytes)")
        if self._held.total() + length > budget or self._held[client] + length > own:
            raise _busy("too many bodies at once")
        loop, body = asyncio.get_running_loop(), bytearray()
        last = loop.time() + self._config.request_seconds
        try:
            async with asyncio.timeout_at(last) as time_limit:
                async for chunk in request.stream():
                    body += chunk
                    held[0] += len(chunk)
                    self._held[client] += len(chunk)
                    if self._held.total() > budget or self._held[client] > own:
                        raise _busy("too many bodies at once")
                    time_limit.reschedule(last + held[0] / BYTES_PER_SECOND)
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly", {"Connection": "close"}) from None
        return bytes(body)

    def _wanted(self, body: bytes) -> Wanted:
        try:
            return read_request(body, self._target.vocab_size, self._config.max_tokens)
        except TooManyTokensError as error:
            raise HTTPException(413, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def _describe(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse(
            {
                "identity": self._target.identity,
                "layer_ids": list(self._target.layer_ids),
                "hidden_size": self._target.hidden_size,
                "dtype": self._dtype,
            }
        )

    async def _health(self, _request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _metrics(self, _request: Request) -> Response:
        return PlainTextResponse(generate_latest(self._registry))

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong")


async def _disconnected(request: Request) -> None:
    """Return when the client of a request with a complete body has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _patience(request: Request) -> float:
    """Return the seconds that the client will wait, without a limit where it does not say."""
    given = request.headers.get(PATIENCE)
    try:
        seconds = math.inf if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise HTTPException(400, f"{PATIENCE} is no number of seconds")
    return min(seconds, 1e6)


def _busy(why: str) -> HTTPException:
    return HTTPException(503, why, {"Retry-After": "1"})


def serve(target: Target, config: ServeConfig, token: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C; what is being computed is still answered.

    Raises ConfigError where the address is not to be had.
    """
    server = FeatureServer(target, config, token).http_server()
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"serve.host={config.host} serve.port={config.port} cannot be listened on ({error}); "
            "give another port, or 0 for a free one"
        ) from None
    address = f"http://{config.host}:{listener.getsockname()[1]}"
    print(visible(f"serving {target.name} at {address}"), flush=True)
    server.run([listener])
