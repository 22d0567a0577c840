"""Any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp's server, and many more.

Every answer is streamed, so that the time to the first token is known and text can be shown as it grows. Servers
differ: some send no count of tokens, some take a JSON schema in an older form only, some ignore a schema silently. A
reply is therefore checked against the shape that was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import openai
from openai.types.chat import ChatCompletionChunk

from telerag_cli.config import DEFAULT_CTX_SIZE, DEFAULT_TIMEOUT_S
from telerag_cli.errors import ContextError, ModelError, TeleragError, UsageError, connection_cause, one_line
from telerag_cli.llm.base import Generation, Message, OnText, Request
from telerag_cli.llm.streamed_answer import StreamedAnswer

DEFAULT_PARALLEL = 8
DEFAULT_RETRIES = 3
KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_S = 10.0
"""Time allowed for making a connection."""
FIRST_WAIT_S = 0.5
"""Wait before the second try; it doubles with every further one."""
MAX_WAIT_S = 60.0
"""Longest wait that a server may ask for; beyond it the request fails."""
MAX_STOP_TEXTS = 4
"""As many as OpenAI takes."""

SchemaFormat = Literal["json_schema", "json_object"]
"""How a schema is sent to a server: OpenAI's way, or the one before it."""

_TRANSIENT = (408, 409, 429)
_WAIT = "Wait, or send it fewer requests at once."
_REMEDIES = {
    401: f"Set {KEY_VARIABLE} to a key of this server.",
    403: f"Set {KEY_VARIABLE} to a key of this server.",
    404: "Check the address; it often ends in /v1.",
    **dict.fromkeys(_TRANSIENT, _WAIT),
}
"""What to do about a refusal, by its status."""


class Endpoint:
    """A model behind an OpenAI-compatible server."""

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        context_tokens: int = DEFAULT_CTX_SIZE,
        parallel: int = DEFAULT_PARALLEL,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """Take the address, such as ``http://localhost:8000/v1``; the server is asked only if ``model`` is None.

        None is the only model that the server has. The key is by default the variable OPENAI_API_KEY, or a placeholder
        for servers that want none. ``timeout_s`` is the longest silence, before the first byte and between any two.
        Tries are repeated after a transient failure, as long as no text was passed on. ``notice`` is called once if
        the server takes schemas in the older form only.

        Raises:
            UsageError: the address is not one, or there are several models.
            ModelError: the server cannot be asked for its models, or has none.
        """
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"'{base_url}' is not the address of a server: it does not begin with http:// or https://.",
                remedy="Write it like http://localhost:8000/v1.",
            )
        self._url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._connect_s = min(CONNECT_S, timeout_s)
        self._retries = retries
        self._notice = notice
        self._settings: dict[str, Any] = {
            "base_url": self._url,
            "api_key": api_key or os.environ.get(KEY_VARIABLE) or "none",
            "timeout": openai.Timeout(timeout_s, connect=self._connect_s),
            "max_retries": 0,  # see `_retried`
        }
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self.context_tokens = context_tokens
        self.parallel = parallel
        self.schema_format: SchemaFormat = "json_schema"
        """How schemas are sent; it changes when the server says that it knows only the older way."""
        self.name = model or self._only_model()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """An estimate, as the tokenizer is unknown: three bytes of UTF-8 a token, and eight tokens a message.

        English has four or more bytes a token and source code three, so the estimate is on the high side; long
        numbers and rare scripts can take more tokens than it says.
        """
        return sum(math.ceil(len(message.content.encode()) / 3) + 8 for message in messages)

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """See `Generator`. ``queue_s`` includes the waits between tries.

        If the server sends no usage, ``prompt_tokens`` is the estimate and ``completion_tokens`` counts the pieces
        received. With a schema they are those of the JSON text, and up to that many more than ``max_tokens``.

        Raises:
            UsageError: the end of the text is to be ignored.
            InputError: the server says that the prompt exceeds its context.
            ModelError: the server cannot be reached, refuses, breaks off, or its reply does not have the shape.
        """
        if request.shape and request.shape.json_schema() is None:
            raise UsageError(
                "A server takes a JSON schema and not a grammar, which this request has.",
                remedy="Use a model file, or a JSON schema.",
            )
        if request.ignore_eos:
            raise UsageError(
                "A server ends an answer where the model does, and this request wants all of its max_tokens.",
                remedy="Use a model file.",
            )
        session = await self._session()
        asked_s = time.perf_counter()
        async with session.slots:
            answer = await self._retried(session.client, request, on_text)
        self._check(answer)
        return answer.generation(asked_s, self.count_tokens(request.messages))

    def forget(self) -> None:
        """What a server caches is its own."""

    def close(self) -> None:
        """Close the connections. Those of an event loop that has been closed properly went with it."""
        for loop, session in list(self._sessions.items()):
            if loop.is_running():  # perhaps in this very thread, which therefore cannot wait for it
                asyncio.run_coroutine_threadsafe(session.lifetime.aclose(), loop)
            elif not loop.is_closed():
                loop.run_until_complete(session.lifetime.aclose())

    async def _retried(self, client: openai.AsyncOpenAI, request: Request, on_text: OnText | None) -> StreamedAnswer:
        """Try until there is an answer.

        The client's own retries are off: they end with the first byte of the stream, and their waits would count as
        the server's time.
        """
        tried = 0
        while True:
            answer = StreamedAnswer(request, on_text)
            sent_format = self.schema_format
            try:
                await self._stream(client, answer)
            except (openai.APIError, _BrokenOffError) as error:
                said = _said(error) if isinstance(error, openai.APIStatusError) else ""
                if request.shape and sent_format == "json_schema" and "json_schema" in said and "json_object" in said:
                    if self.schema_format == "json_schema" and self._notice:  # another request may have been quicker
                        self._notice(
                            f"The server at {self._url} does not know json_schema; schemas go to it with json_object."
                        )
                    self.schema_format = "json_object"
                    continue
                tried += 1
                wait_s = None if answer.shown or tried > self._retries else _wait_s(error, tried)
                if wait_s is None:
                    models = await self._models(client) if _status(error) == 404 else []
                    raise self._explained(error, tried, answer.pieces, models) from error
                await asyncio.sleep(wait_s)
            else:
                return answer

    async def _stream(self, client: openai.AsyncOpenAI, answer: StreamedAnswer) -> None:
        try:
            async with await client.chat.completions.create(**self._body(answer.request)) as stream:
                async for chunk in stream:
                    if not isinstance(chunk, ChatCompletionChunk) or chunk.choices is None:
                        raise self._malformed(f"{chunk!r:.60} is not a chunk of a completion")
                    answer.add(chunk)
                    if answer.cut:
                        return
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._malformed(str(error)) from error
        if answer.finish is None:
            raise _BrokenOffError

    def _body(self, request: Request) -> dict[str, Any]:
        shape = request.shape
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "max_tokens": request.max_tokens + (shape.json_tokens() if shape else 0),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if shape is not None:
            # No stop texts: they are meant for the text, and would end the JSON around it.
            if self.schema_format == "json_object":
                body["response_format"] = {"type": "json_object", "schema": shape.json_schema()}
            else:
                schema = {"name": "answer", "schema": shape.json_schema(), "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.stop:
            body["stop"] = list(request.stop[:MAX_STOP_TEXTS])
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": 1}  # some servers send none without the second
        return body

    def _check(self, answer: StreamedAnswer) -> None:
        if answer.finish not in ("stop", "length"):
            raise ModelError(
                f"The server at {self._url} ended the answer with '{answer.finish}', not with 'stop' or 'length'.",
                remedy="Ask something else, or use another model.",
            )
        if answer.refusal:
            raise ModelError(
                f"The model {self.name} refuses to answer: {one_line(answer.refusal)}.",
                remedy="Ask something else, or use another model.",
            )
        if not answer.has_shape():
            wanted = answer.request.shape.description() if answer.request.shape else "text"
            raise ModelError(
                f"The server at {self._url} wrote {answer.reply.strip()!r:.80}, which is not {wanted}.",
                remedy="Use a server and a model that keep to a JSON schema.",
            )

    def _malformed(self, problem: str) -> ModelError:
        return ModelError(
            f"The server at {self._url} sent a stream that cannot be read: {one_line(problem)}.",
            remedy="Check that the address is that of an OpenAI-compatible API; it often ends in /v1.",
        )

    def _explained(
        self, error: openai.APIError | _BrokenOffError, tried: int, pieces: int = 0, models: Sequence[str] = ()
    ) -> TeleragError:
        """The error to show for one that a server caused in its last try."""
        server, cause = f"The server at {self._url}", error.__cause__
        counts = [f"{tried} tries"] * (tried > 1) + [f"{pieces} token{'s' * (pieces > 1)}"] * (pieces > 0)
        after = f" after {' and '.join(counts)}" if counts else ""
        if isinstance(error, _BrokenOffError):
            return ModelError(
                f"{server} ended its stream{after} without saying that the answer is complete.",
                remedy="Its log may say why; a prompt longer than its context is one reason.",
            )
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            silent = isinstance(cause, httpx2.ConnectTimeout)
            why = f"no connection within {self._connect_s:g} s" if silent else connection_cause(cause)
            return ModelError(f"{server} cannot be reached{after}: {why}.", remedy="Start it, or check the address.")
        if isinstance(error, openai.APITimeoutError):
            return ModelError(
                f"{server} sent nothing for {self._timeout_s:g} s{after}.",
                remedy="Check that it is not overloaded, or allow it more time.",
            )
        if isinstance(error, openai.APIConnectionError):
            why = connection_cause(cause or error)
            return ModelError(f"{server} broke the connection{after}: {why}.", remedy="Its log may say why.")
        status = _status(error)
        refusal = f"{server} answers {status or 'with an error'}{after}: {_said(error)}"
        if _is_context(error):
            return ContextError(f"{refusal}.", remedy="Shorten the question, lower --max-tokens or --ctx-size.")
        if models:
            return ModelError(f"{refusal}; it has {', '.join(models)}.", remedy="Name one of its models.")
        return ModelError(f"{refusal}.", remedy=_REMEDIES.get(status or 0, "Its log may say more."))

    def _only_model(self) -> str:
        try:
            with openai.OpenAI(**self._settings | {"max_retries": self._retries}) as client:
                models = _names(client.models.list())
        except openai.APIError as error:
            tried = 1 if _wait_s(error, 1) is None else self._retries + 1
            raise self._explained(error, tried) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._malformed(str(error)) from error
        if not models:
            raise ModelError(f"The server at {self._url} lists no model.", remedy="Name one that it has.")
        if len(models) > 1:
            raise UsageError(
                f"The server at {self._url} has {len(models)} models: {', '.join(models)}.", remedy="Name one of them."
            )
        return models[0]

    async def _models(self, client: openai.AsyncOpenAI) -> list[str]:
        """The server's models, or none if it does not tell: another error is being explained already."""
        try:
            return _names(await client.models.list())
        except (openai.APIError, ValueError):
            return []

    async def _session(self) -> _Session:
        """This event loop's connections and slots; neither can be shared between loops."""
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            client = openai.AsyncOpenAI(**self._settings)
            session = _Session(client, asyncio.Semaphore(self.parallel), self._live(loop, client))
            self._sessions[loop] = session
            await anext(session.lifetime)
        return self._sessions[loop]

    async def _live(self, loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> AsyncGenerator[None]:
        """Hold a session as long as its loop lives: asyncio closes all generators before it closes a loop."""
        try:
            yield
        finally:
            self._sessions.pop(loop, None)
            await client.close()


@dataclass(frozen=True)
class _Session:
    client: openai.AsyncOpenAI
    slots: asyncio.Semaphore
    lifetime: AsyncGenerator[None]


class _BrokenOffError(Exception):
    """A stream ended in good order, but before the answer did."""


def _wait_s(error: openai.APIError | _BrokenOffError, tried: int) -> float | None:
    """Seconds until the next try; None if it would fail like the last one."""
    status = _status(error)
    lost = isinstance(error, openai.APIConnectionError | _BrokenOffError)
    if not lost and (status is None or (status not in _TRANSIENT and status < 500)):
        return None
    asked_s = _retry_after_s(error)
    if asked_s is not None:
        return asked_s if asked_s <= MAX_WAIT_S else None
    # Clients that failed together must not come back together.
    return min(FIRST_WAIT_S * 2.0 ** (tried - 1), MAX_WAIT_S) * random.uniform(0.75, 1.0)


def _retry_after_s(error: Exception) -> float | None:
    """The header Retry-After, which has seconds or a date."""
    if not isinstance(error, openai.APIStatusError):
        return None
    value = error.response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status, or the one within a stream that had begun with 200."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code
    code = getattr(error, "code", None)
    return int(code) if code and code.isdigit() else None


def _is_context(error: openai.APIError) -> bool:
    said = f"{error.code} {error.type} {_said(error)}".lower()
    words = ("context length", "context_length", "context size", "context_size", "context window")
    return _status(error) in (None, 400, 413, 422) and any(word in said for word in words)


def _said(error: openai.APIError) -> str:
    """The server's own words, however it wraps them."""
    body: Any = error.body
    if isinstance(body, dict):
        body = next((body[key] for key in ("message", "detail", "error") if body.get(key)), body)
    return one_line(str(body or error.message))


def _names(page: Any) -> list[str]:
    """The models of a list, or none if something else came with status 200."""
    return sorted(str(model.id) for model in getattr(page, "data", None) or ())
