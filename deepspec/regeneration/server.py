"""Answers through an OpenAI-compatible server, many requests at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import httpx
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from deepspec.config.schema import DataConfig, FieldsConfig, RegenerateConfig, as_dict
from deepspec.data.chat_template import SWITCHES
from deepspec.data.turns import OURS, Message, Unusable, parse_turn
from deepspec.errors import ConfigError, DeepSpecError, ServerError
from deepspec.http_answers import UnusableAnswerError, fetch
from deepspec.json_files import parse_json
from deepspec.regeneration.dialogue import BROKEN, Dialogue
from deepspec.secrets import hide_url, masked, shown_url, token_of

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0
LARGEST_ANSWER = 64 * 2**20  # bytes; with token ids and log-probabilities some megabytes
IDS = "return_token_ids"  # vLLM's; other servers ignore or refuse it


class ServerAnswerer:
    """The target behind `{server}/chat/completions`, as `model` (None asks the server).

    The server renders the prompts: it must have the target's own chat template, which receives
    `enable_thinking` and `data.template_options`. A template that reads today's date gets the
    server's, unless it takes a date from `data.template_options`. What a request leaves out is the
    server's choice; many take it from the model's generation_config.json, such as a top_k where
    regenerate.top_k is 0. `api_key` is sent with every request and stands in no error and no
    file. `first_pause`: seconds before a failed request is tried again, doubled each time.

    Answers have the ids that were sampled where the server returns them (vLLM does), else only
    their text. With tools, `tool_choice` is "none": vLLM then shows the tools to the model and
    leaves its calls in the text, as the target wrote them.
    """

    error: type[DeepSpecError] = ServerError

    def __init__(
        self,
        server: str,
        model: str | None,
        data: DataConfig,
        api_key: str | None = None,
        first_pause: float = 1.0,
    ) -> None:
        hide_url(server)
        self._server = server.rstrip("/")
        self._shown = shown_url(self._server)
        self._model = model
        self._data = data
        self._api_key = api_key
        self._has_answered = False
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._first_pause = first_pause
        self._unknown: set[str] = set()  # fields that the server does not know
        self._known: set[str] = set()

    @cached_property
    def model(self) -> str:
        """The model's name on the server. Raises ServerError when that is not to be had."""
        try:
            with ThreadPoolExecutor(1) as aside:  # this thread may be running an event loop
                response = aside.submit(asyncio.run, self._models()).result()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(
                f"regenerate.server={self._shown} cannot be reached ({masked(str(error))}); start "
                "the server, mend the URL (such as http://127.0.0.1:8000/v1), or set "
                "regenerate.server=null to answer in process"
            ) from None
        if self._model is not None:
            return self._model
        if self._way_out(response):
            raise self._refusal(response)
        try:
            names = [
                entry["id"] for entry in parse_json(response.raise_for_status().content)["data"]
            ]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"regenerate.server={self._shown} does not say which models it has "
                f"({type(error).__name__}: {masked(str(error))}); set regenerate.server_model"
            ) from None
        if len(names) != 1:
            raise ServerError(
                f"regenerate.server={self._shown} has {len(names)} models "
                f"({', '.join(names[:5])}); set regenerate.server_model to the one to ask"
            )
        return names[0]

    async def _models(self) -> httpx.Response:
        async with httpx.AsyncClient(headers=self._headers) as client:
            url = f"{self._server}/models"
            return await fetch(client, "GET", url, CONNECT_SECONDS, LARGEST_ANSWER)

    def describe(self) -> dict[str, Any]:
        """The model's name, and what the template is told. The server may move."""
        written = as_dict(self._data)  # what comes from the environment stays out of files
        return {
            "answerer": "server",
            "model": self.model,
            "thinking": self._data.thinking,
            "system_prompt": written["system_prompt"],
            "template_options": written["template_options"],
        }

    def answer(
        self,
        dialogues: Iterable[Dialogue],
        config: RegenerateConfig,
        done: Callable[[Dialogue], None],
    ) -> None:
        """`config.concurrency` dialogues at a time; see `Answerer.answer`.

        Raises ServerError when as many samples in a row failed for the server's sake (at least
        10): it is gone, and every further sample would wait through all its retries.
        """
        asyncio.run(self._answer_all(iter(dialogues), config, done))

    async def _answer_all(
        self,
        waiting: Iterable[Dialogue],
        config: RegenerateConfig,
        done: Callable[[Dialogue], None],
    ) -> None:
        failed_in_a_row = 0

        async def work() -> None:
            nonlocal failed_in_a_row
            for dialogue in waiting:  # one iterator, shared by all workers
                while dialogue.open:
                    await self._answer_turn(client, dialogue, config)
                done(dialogue)
                failure = dialogue.failure
                failed_in_a_row = 0 if failure is None or failure.own else failed_in_a_row + 1
                if failure is not None and failed_in_a_row >= max(config.concurrency, 10):
                    raise ServerError(
                        f"regenerate.server={self._shown} failed {failed_in_a_row} samples in a "
                        f"row; the last with {failure.reason} ({failure.detail}). Answers so far "
                        "are kept: mend the server and start again"
                    )

        timeout = httpx.Timeout(config.timeout, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=config.concurrency)
        async with httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=self._headers
        ) as client:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(config.concurrency):
                        workers.create_task(work())
            except* (DeepSpecError, OSError) as errors:  # OSError: `done` met a full disk
                raise errors.exceptions[0] from None

    async def _answer_turn(
        self, client: httpx.AsyncClient, dialogue: Dialogue, config: RegenerateConfig
    ) -> None:
        try:
            response = await self._ask(client, self._request(dialogue, config), config.retries)
        except httpx.HTTPStatusError as error:
            status, text = error.response.status_code, self._excerpt(error.response)
            if status == 401 or (status == 404 and not self._has_answered):
                raise self._refusal(error.response) from None
            way_out = "regenerate.top_k=0 leaves it out" if "top_k" in text else ""
            # a server may forbid (403) one prompt and answer the others
            way_out = way_out or self._way_out(error.response)
            # 400 is how servers say that a prompt does not fit into the model's context
            detail = f"{text}; {way_out}" if way_out else text
            dialogue.give_up(f"HTTP {status}", detail, own=status == 400)
        except httpx.RequestError as error:
            timed_out = isinstance(error, httpx.TimeoutException)
            reason = "timeout" if timed_out else "no connection"
            reason = "unusable answer" if isinstance(error, UnusableAnswerError) else reason
            dialogue.give_up(reason, f"{type(error).__name__}: {masked(str(error))}", own=False)
        else:
            self._has_answered = True
            _take(dialogue, response, self._excerpt(response))

    def _way_out(self, response: httpx.Response) -> str:
        """What to change where `response` refuses every request, else an empty text."""
        if response.status_code in (401, 403):
            return (
                "check the key in the environment variable that regenerate.api_key_env names"
                if self._api_key
                else "set regenerate.api_key_env to the name of the environment variable that "
                "holds the server's API key"
            )
        if response.status_code == 404:
            return (
                "check regenerate.server_model and the URL"
                if self._server.endswith("/v1")
                else f"did you mean regenerate.server={self._shown}/v1?"
            )
        return ""

    def _refusal(self, response: httpx.Response) -> ServerError:
        return ServerError(
            f"regenerate.server={self._shown} answers HTTP {response.status_code} to "
            f"{response.url.path} ({self._excerpt(response)}); {self._way_out(response)}"
        )

    def _excerpt(self, response: httpx.Response) -> str:
        """The beginning of the response's text, without secrets, which some servers repeat."""
        text = response.text
        if self._api_key:
            text = text.replace(self._api_key, "[API key]")
        return " ".join(masked(text).split())[:300]

    async def _ask(
        self, client: httpx.AsyncClient, request: dict[str, Any], retries: int
    ) -> httpx.Response:
        """The response to `request`, or to what is left of it without fields that are refused."""
        while True:
            try:
                response = await self._post(client, request, retries)
                break
            except httpx.HTTPStatusError as error:
                field = self._refused_field(error.response, request)
                if field is None:
                    raise
                request = {name: value for name, value in request.items() if name != field}
        if IDS in request:
            self._known.add(IDS)
        else:
            self._unknown.add(IDS)
        return response

    def _refused_field(self, response: httpx.Response, request: dict[str, Any]) -> str | None:
        """The field to leave out of `request`, after an error that its presence may explain."""
        text = response.text
        if response.status_code not in (400, 422):
            return None
        # a prompt that leaves less room in the context: without the field, that is the limit
        lengths = ("max_tokens", "max_completion_tokens", "in the completion", "for the completion")
        if "max_tokens" in request and any(words in text for words in lengths):
            return "max_tokens"
        # not every server names the field that it does not know
        return IDS if IDS in request and (IDS in text or IDS not in self._known) else None

    async def _post(
        self, client: httpx.AsyncClient, request: dict[str, Any], retries: int
    ) -> httpx.Response:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(retries + 1),
            wait=wait_exponential_jitter(
                initial=self._first_pause, max=LONGEST_PAUSE, jitter=self._first_pause / 2
            ),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )

        async def post() -> httpx.Response:
            url = f"{self._server}/chat/completions"
            seconds = client.timeout.read or math.inf  # of the whole answer, too
            response = await fetch(client, "POST", url, seconds, LARGEST_ANSWER, json=request)
            return response.raise_for_status()

        answered: httpx.Response = await retrying(post)
        return answered

    def _request(self, dialogue: Dialogue, config: RegenerateConfig) -> dict[str, Any]:
        messages = [_as_openai(message) for message in dialogue.messages]
        if self._data.system_prompt and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self._data.system_prompt})
        digest = hashlib.blake2b(f"{config.seed}/{dialogue.turn}".encode(), digest_size=4).digest()
        tools = {"tools": list(dialogue.tools), "tool_choice": "none"} if dialogue.tools else {}
        return {
            "model": self.model,
            "messages": messages,
            **tools,
            "temperature": config.temperature,
            "top_p": config.top_p,
            **({"top_k": config.top_k} if config.top_k else {}),
            "max_tokens": config.max_new_tokens,
            "seed": int.from_bytes(digest, "big") >> 1,  # some servers take 31 bits
            "chat_template_kwargs": {
                **dict.fromkeys(SWITCHES, self._data.thinking),
                **self._data.template_options,
            },
            **({IDS: True} if IDS not in self._unknown else {}),
        }


def api_key_of(config: RegenerateConfig) -> str | None:
    """The key in the environment variable `regenerate.api_key_env`, None where none is named.

    Raises ConfigError where the variable is not set, or holds what is no key.
    """
    name = config.api_key_env
    if name is None:
        return None
    if not os.environ.get(name, "").strip():
        raise ConfigError(
            f"regenerate.api_key_env={name}: this environment variable is not set; set it to the "
            "server's API key, or regenerate.api_key_env=null to send none"
        )
    return token_of(name)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _as_openai(message: Message) -> Message:
    """`message` with the arguments of its tool calls as text, and without our own keys."""
    sent = {key: value for key, value in message.items() if key not in OURS}
    if calls := sent.get("tool_calls"):
        sent["tool_calls"] = [_with_text(call, place) for place, call in enumerate(calls)]
    return sent


def _with_text(call: dict[str, Any], place: int) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": f"call_{place}", **call, "function": {**function, "arguments": arguments}}


def _take(dialogue: Dialogue, response: httpx.Response, excerpt: str) -> None:
    """Give the answer to `dialogue`: its ids where the server returned them, else its text."""
    try:
        body = parse_json(response.content)
        choice = body["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        content = (message["content"] or "").rstrip(BROKEN if reason == "length" else "")
        ids = [int(token) for token in choice.get("token_ids") or ()]
        tokens = int((body.get("usage") or {}).get("completion_tokens") or len(ids))
    except (ValueError, LookupError, TypeError, AttributeError):
        dialogue.give_up("not a chat completion", excerpt, own=False)
        return
    parsed = message.get("reasoning_content") or message.get("reasoning")
    if parsed and not ids:
        detail = "the server cut the reasoning out; start it without a reasoning parser"
        dialogue.give_up("answer is not whole", detail, own=False)
    elif reason not in ("stop", "length", *(["tool_calls"] if ids else [])):
        dialogue.give_up(f"finish reason {reason}", excerpt)
    elif not ids:
        dialogue.answer({"content": content}, tokens, truncated=reason == "length")
    else:  # the ids are the whole answer, whatever the server parsed out of the text
        try:
            answer, _ = parse_turn({**message, "role": "assistant"}, FieldsConfig())
        except Unusable as why:
            dialogue.give_up(str(why), excerpt)
            return
        answer |= {"content": content, "token_ids": ids}
        dialogue.answer(answer, tokens, truncated=reason == "length")
