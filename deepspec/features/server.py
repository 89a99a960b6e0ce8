"""The frozen target behind HTTP, for trainers on other machines.

    POST /v1/features   safetensors: input_ids [T] int32, lengths [B] int32 -> as `encode` gives;
                        with loss_mask [T] bool, final states only where a supervised token follows
    GET  /v1/target     identity, layer ids, hidden size, dtype
    GET  /health        200 while requests are taken
    GET  /metrics       Prometheus

Bodies are safetensors both ways, never pickle. One thread computes, a bounded queue waits, and a
request beyond it is told to come back (503 with Retry-After). What crosses the wire is O(D) a
token: hidden states, never logits.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from safetensors import SafetensorError
from safetensors.torch import load, save
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from deepspec.config.schema import ServeConfig
from deepspec.errors import ConfigError
from deepspec.features.encoding import encode, resolve_dtype
from deepspec.features.remote import headers_of
from deepspec.records import Sample
from deepspec.streams import visible
from deepspec.targets import Target

MIB = 2**20


class FeatureServer:
    """The application: `FeatureServer(target, config, token).app`."""

    def __init__(self, target: Target, config: ServeConfig, token: str | None) -> None:
        self._target, self._config, self._token = target, config, token
        self._dtype = resolve_dtype(config.dtype, target.dtype)
        headers_of(target.identity)  # waits for the hash of its weights before any request does
        self._waiting = 0
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="target")
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "deepspec_requests", "Requests by status", ["status"], registry=registry
        )
        self._tokens = Counter("deepspec_tokens", "Tokens computed", registry=registry)
        self._bytes = Counter("deepspec_sent_bytes", "Bytes of features sent", registry=registry)
        self._seconds = Histogram("deepspec_seconds", "Seconds of a forward", registry=registry)
        Gauge("deepspec_waiting", "Requests waiting or computed", registry=registry).set_function(
            lambda: self._waiting
        )
        self.app = Starlette(
            routes=[
                Route("/v1/features", self._counted, methods=["POST"]),
                Route("/v1/target", self._describe),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ]
        )

    async def _counted(self, request: Request) -> Response:
        status = 500
        try:
            response = await self._features(request)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._requests.labels(str(status)).inc()

    async def _features(self, request: Request) -> Response:
        self._authorize(request)
        if self._waiting >= self._config.queue:
            raise HTTPException(503, "the queue is full", {"Retry-After": "1"})
        self._waiting += 1
        try:
            wanted = self._wanted(await self._body(request))
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(self._compute, self._answer, *wanted)
        finally:
            self._waiting -= 1
        headers = dict(headers_of(self._target.identity))
        return Response(body, media_type="application/octet-stream", headers=headers)

    def _answer(self, samples: list[Sample], all_finals: bool) -> bytes:
        begun = time.monotonic()
        features = self._target.features(samples, all_finals)
        encoded = encode(features, self._dtype, len(self._target.layer_ids))
        body = save({name: tensor.cpu().contiguous() for name, tensor in encoded.items()})
        self._seconds.observe(time.monotonic() - begun)
        self._tokens.inc(features.context.shape[0])
        self._bytes.inc(len(body))
        return body

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is seen to be too large."""
        limit = self._config.max_body_mib * MIB
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"the body exceeds serve.max_body_mib ({limit} bytes)")
        return bytes(body)

    def _wanted(self, body: bytes) -> tuple[list[Sample], bool]:
        """The samples, and whether final states of all their tokens are."""
        try:
            tensors = load(body)
            ids, lengths = tensors["input_ids"].long(), tensors["lengths"].tolist()
            mask = tensors.get("loss_mask", torch.ones_like(ids, dtype=torch.bool)).bool()
        except (SafetensorError, KeyError, ValueError) as error:
            raise HTTPException(400, f"not input_ids and lengths: {error}") from None
        fine = ids.dim() == 1 and lengths and min(lengths) > 0 and sum(lengths) == len(ids)
        fine = fine and mask.shape == ids.shape
        if not fine or not 0 <= int(ids.min()) <= int(ids.max()) < self._target.vocab_size:
            raise HTTPException(400, "lengths do not add up, or a token is outside the vocabulary")
        padded = max(lengths) * len(lengths)
        if padded > self._config.max_tokens:
            raise HTTPException(413, f"{padded} tokens, padding counted, exceed serve.max_tokens")
        parts = zip(ids.split(lengths), mask.split(lengths), strict=True)
        samples = [Sample(own, its, str(index)) for index, (own, its) in enumerate(parts)]
        return samples, "loss_mask" not in tensors

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


def serve(target: Target, config: ServeConfig, token: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C; what is being computed is still answered.

    Raises ConfigError where the address is not to be had.
    """
    import uvicorn

    app: Any = FeatureServer(target, config, token).app
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"serve.host={config.host} serve.port={config.port} cannot be listened on ({error}); "
            "give another port, or 0 for a free one"
        ) from None
    address = f"http://{config.host}:{listener.getsockname()[1]}"
    print(visible(f"serving {target.name} at {address}"), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])
