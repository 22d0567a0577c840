"""Any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp's server, and many more.

Every answer is streamed where the server can, so that the time to the first token is known and text can be shown as it
grows. Servers differ: some refuse parameters or roles (`Dialect`), some stand few requests at once (`AdaptiveLimit`),
some ignore a schema silently. A reply is therefore checked against the shape that was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from telerag_cli.config import DEFAULT_CTX_SIZE, DEFAULT_TIMEOUT_S, KEY_VARIABLE
from telerag_cli.errors import ModelError, TeleragError, UsageError, one_line
from telerag_cli.llm.addresses import find_api, is_elsewhere
from telerag_cli.llm.base import Generation, Message, OnText, Request
from telerag_cli.llm.concurrency import AdaptiveLimit
from telerag_cli.llm.dialect import Dialect
from telerag_cli.llm.event_stream import DONE, server_events
from telerag_cli.llm.reasoning import only_reasoning
from telerag_cli.llm.refusals import (
    BrokenOffError,
    Server,
    Trouble,
    UnreadableError,
    is_context,
    is_crowded,
    said_by,
    status_of,
    wait_s,
)
from telerag_cli.llm.streamed_answer import StreamedAnswer
from telerag_cli.text import repaired

DEFAULT_PARALLEL = 8
DEFAULT_RETRIES = 3
_NOT_OF_THE_REQUEST = (401, 403, 405, 408, 409, 429, 502, 503, 504)
"""Refusals that have nothing to do with how something is asked."""
CONNECT_S = 10.0
"""Time allowed for making a connection."""
_MAX_BODY = 2000
"""As much of an error's body is searched for what was refused."""
DRAIN_S = 0.2
"""Time allowed for the end of a body whose answer is complete, so that its connection can be used again."""


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
        Tries are repeated after a transient failure, as long as no text was passed on, and after one that comes of too
        many requests at once: fewer run from then on. ``notice`` is called once for each way of asking that the server
        refuses and that is given up for the session.

        Raises:
            UsageError: the address is not one, or there are several models.
            ModelError: the server cannot be asked for its models, or has none.
        """
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"'{base_url}' is not the address of a server: it does not begin with http:// or https://.",
                remedy="Write it like http://localhost:8000/v1.",
            )
        self._server = Server(base_url.rstrip("/"), timeout_s, connect_s=min(CONNECT_S, timeout_s))
        self._retries = retries
        self._notice = notice
        key = api_key or os.environ.get(KEY_VARIABLE) or "none"
        self._settings: dict[str, Any] = {
            "base_url": self._server.url,
            "api_key": key,
            "timeout": openai.Timeout(timeout_s, connect=self._server.connect_s),
            "max_retries": 0,  # see `_retried`
        }
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self.context_tokens = context_tokens
        self.parallel = parallel
        self.dialect = Dialect()
        """How requests are put; it changes when the server refuses one way."""
        self._stands = parallel
        self._told_limit = False
        self._headers = {"Authorization": f"Bearer {key}"}
        self._found: str | None = None
        """Where the API is, once it was looked for."""
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
        answer = await self._retried(session, request, on_text)
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

    async def _retried(self, session: _Session, request: Request, on_text: OnText | None) -> StreamedAnswer:
        """Try until there is an answer.

        The client's own retries are off: they end with the first byte of the stream, and their waits would count as
        the server's time.
        """
        tried = 0
        while True:
            async with session.limit.place() as began:
                answer = StreamedAnswer(request, on_text)
                body = self.dialect.body(self.name, request)
                try:
                    return await self._stream(session.client, body, answer)
                except (openai.APIError, BrokenOffError) as caught:
                    error: Trouble = caught
                except UnreadableError as caught:
                    misplaced = await self._misplaced(str(caught)) if caught.elsewhere else None
                    raise misplaced or self._server.unreadable(str(caught)) from caught
                if self._learns(body, error):
                    continue
                pause_s = wait_s(error, tried + 1)
                crowded = pause_s is not None and is_crowded(error) and self._falls(session.limit, began, error)
            if not crowded:
                tried += 1
                if pause_s is None or answer.shown or tried > self._retries:
                    raise await self._refused(session.client, error, tried, answer.pieces) from error
            await asyncio.sleep(pause_s or 0.0)

    async def _stream(self, client: openai.AsyncOpenAI, body: dict[str, Any], answer: StreamedAnswer) -> StreamedAnswer:
        """Ask, and take what comes until the answer is complete."""
        odd = ""
        completions = client.chat.completions.with_streaming_response
        async with completions.create(**body) as asked:
            response = asked.http_response
            elsewhere = "event-stream" not in response.headers.get("content-type", "")
            events = server_events(_bytes(response))
            try:
                async for event in events:
                    if event.data.startswith(DONE):
                        break
                    chunk = _parsed(event.data, event.name, response.request)
                    if "choices" in chunk or "usage" in chunk:
                        answer.add(chunk)
                    elif not event.name:
                        odd = odd or event.data
                    if answer.cut:
                        return answer
            except ValueError as error:
                raise UnreadableError(str(error), elsewhere=elsewhere) from error
            with contextlib.suppress(TimeoutError, ValueError, openai.APIError):
                async with asyncio.timeout(DRAIN_S):
                    async for _event in events:
                        pass
        if answer.finish is None:
            if odd and not answer.pieces:
                raise UnreadableError(f"{odd:.60} is not a chunk of a completion", elsewhere=elsewhere)
            raise BrokenOffError
        return answer

    def _learns(self, body: dict[str, Any], error: Trouble) -> bool:
        """Whether the server refused how it was asked, and can be asked in another way from now on."""
        status = status_of(error)
        if not isinstance(error, openai.APIError) or isinstance(error, openai.APIConnectionError) or is_context(error):
            return False
        if status in _NOT_OF_THE_REQUEST:
            return False
        said, broken = said_by(error), status is not None and status >= 500
        news = self.dialect.learn(body, said, error.param, broken=broken)
        if news is None:  # some pass on another server's words beside their own
            news = self.dialect.learn(body, f"{error.body}"[:_MAX_BODY], broken=broken)
        if news and self._notice:
            self._notice(f"{self._server} {news}. It said: {said}.")
        return news is not None

    def _falls(self, limit: AdaptiveLimit, began: int, error: Trouble) -> bool:
        """Whether a request was refused as one of too many, so that it gets another try with fewer beside it."""
        before = limit.most
        again = limit.fall(began)
        if limit.most < before:
            self._stands = limit.most
            if self._notice and not self._told_limit:
                self._told_limit = True
                said = str(self._server.explained(error, 1).message)
                self._notice(f"{said} It gets fewer than {before} requests at once from now on.")
        return again

    async def _refused(self, client: openai.AsyncOpenAI, error: Trouble, tried: int, pieces: int) -> TeleragError:
        """The error to show in the end."""
        models: list[str] = []
        status, said = status_of(error), said_by(error) if isinstance(error, openai.APIError) else ""
        if is_elsewhere(said) or (status in (404, 405) and "model" not in said.lower()):
            misplaced = await self._misplaced(f"{status}: {said}" if status else said)
            if misplaced:
                return misplaced
        if status == 404:
            models = await self._models(client)
        return self._server.explained(error, tried, pieces, models)

    async def _misplaced(self, why: str) -> ModelError | None:
        """The error for an address where there is no API, if it is found at another one of this server."""
        if self._found is None:
            self._found = await asyncio.to_thread(find_api, self._server.url, self._headers) or self._server.url
        return self._server.misplaced(why, self._found) if self._found != self._server.url else None

    def _check(self, answer: StreamedAnswer) -> None:
        if answer.finish not in ("stop", "length"):
            raise ModelError(
                f"{self._server} ended the answer with '{answer.finish}', not with 'stop' or 'length'.",
                remedy="Ask something else, or use another model.",
            )
        if answer.refusal:
            raise ModelError(
                f"The model {self.name} refuses to answer: {one_line(answer.refusal)}.",
                remedy="Ask something else, or use another model.",
            )
        if answer.reasoned and not answer.text.strip():
            raise only_reasoning(f"The model {self.name}", answer.tokens)
        if not answer.has_shape():
            wanted = answer.request.shape.description() if answer.request.shape else "text"
            raise ModelError(
                f"{self._server} wrote {answer.reply.strip()!r:.80}, which is not {wanted}.",
                remedy="Use a server and a model that keep to a JSON schema.",
            )

    def _only_model(self) -> str:
        models, why = list[str](), "it lists no model"
        try:
            with openai.OpenAI(**self._settings | {"max_retries": self._retries}) as client:
                models = _names(client.models.list())
        except openai.APIError as error:
            if status_of(error) not in (404, 405):
                tried = 1 if wait_s(error, 1) is None else self._retries + 1
                raise self._server.explained(error, tried) from error
            why = f"{status_of(error)}: {said_by(error)}"
        except (ValueError, RecursionError) as error:
            why = str(error)
        if not models:
            self._found = find_api(self._server.url, self._headers) or self._server.url
            if self._found != self._server.url:
                raise self._server.misplaced(why, self._found)
            raise ModelError(
                f"{self._server} does not say which model it has ({one_line(why)}).",
                remedy="Name one that it has, and check the address; it often ends in /v1.",
            )
        if len(models) > 1:
            raise UsageError(
                f"{self._server} has {len(models)} models: {', '.join(models)}.", remedy="Name one of them."
            )
        return models[0]

    async def _models(self, client: openai.AsyncOpenAI) -> list[str]:
        """The server's models, or none if it does not tell: another error is being explained already."""
        try:
            return _names(await client.models.list())
        except (openai.APIError, ValueError, RecursionError):
            return []

    async def _session(self) -> _Session:
        """This event loop's connections and slots; neither can be shared between loops."""
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            client = openai.AsyncOpenAI(**self._settings)
            session = _Session(client, AdaptiveLimit(self._stands), self._live(loop, client))
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
    limit: AdaptiveLimit
    lifetime: AsyncGenerator[None]


async def _bytes(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The body as it comes, with the errors that the client has for sending."""
    try:
        async for piece in response.aiter_bytes():
            yield piece
    except httpx2.TimeoutException as error:
        raise openai.APITimeoutError(request=response.request) from error
    except httpx2.RequestError as error:
        raise openai.APIConnectionError(request=response.request) from error


def _parsed(text: str, name: str, request: httpx2.Request) -> dict[str, Any]:
    """The chunk in an event; empty if it is an event of another kind.

    Raises:
        APIError: it says what is wrong.
        ValueError: it cannot be read.
    """
    try:
        chunk: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        if name == "error":
            chunk = {"message": text}
        elif name in ("", "message"):
            raise ValueError(f"{error}, in {text:.60}") from error
        else:
            return {}
    body = chunk if isinstance(chunk, dict) else {}
    if told := body.get("error") or (chunk if name == "error" or body.get("object") == "error" else None):
        raise openai.APIError("an error", request, body=told)
    if not body and not name and chunk != {}:
        raise ValueError(f"{text:.60} is not a chunk of a completion")
    return body


def _names(page: Any) -> list[str]:
    """The models of a list, or none if something else came with status 200."""
    models = getattr(page, "data", None)
    return sorted(repaired(str(getattr(each, "id", each))) for each in models) if isinstance(models, list) else []
