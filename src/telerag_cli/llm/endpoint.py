"""Any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp's server, and many more.

Every answer is streamed, so that the time to the first token is known and text can be shown as it grows. What such
servers do not agree on is treated here: some send no count of tokens, some take a JSON schema in an older form only,
some take no schema and say nothing. A reply is therefore checked against the shape that was asked for.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import email.utils
import json
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import openai
from openai.types.chat import ChatCompletionChunk

from telerag_cli.config import DEFAULT_CTX_SIZE, DEFAULT_TIMEOUT_S
from telerag_cli.errors import ContextError, ModelError, TeleragError, UsageError
from telerag_cli.llm.base import FinishReason, Generation, Message, OnText, Request, Token, find_stop, stripped
from telerag_cli.llm.shapes import Choice, Gbnf, Json, Lines, Shape

DEFAULT_PARALLEL = 8
DEFAULT_RETRIES = 3
KEY_VARIABLE = "OPENAI_API_KEY"

CONNECT_S = 10.0
"""Time for a connection to be made."""
FIRST_WAIT_S = 0.5
"""Before the second try; it doubles with every further one."""
MAX_WAIT_S = 60.0
"""A server that wants to be left alone for longer has given up on us, and we on it."""
STOP_TEXTS = 4
"""As many as OpenAI takes."""

SchemaFormat = Literal["json_schema", "json_object"]
"""How a server is told a schema: OpenAI's way, or the way that was there before it."""

_TRANSIENT = (408, 409, 429)
_SAID_CHARACTERS = 300


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
        """Take the address; nothing is asked of the server yet unless ``model`` is None.

        Args:
            base_url: where ``/chat/completions`` is found, as ``http://localhost:8000/v1``.
            model: its name there; None for the only one that the server has.
            context_tokens: tokens that prompt and answer may have together.
            parallel: requests sent at once; more of them wait.
            api_key: by default the variable OPENAI_API_KEY; a server that wants none gets a placeholder.
            timeout_s: the longest silence, before the first byte and between any two. A whole answer may take longer.
            retries: further tries after a failure that may pass. There is none once text was passed on.
            notice: told, once, that the server takes schemas in the older form only.

        Raises:
            UsageError: the address is none, or there are several models.
            ModelError: the server cannot be asked for its models, or has none.
        """
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"'{base_url}' is no address of a server: it does not begin with http:// or https://.",
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
            "max_retries": 0,  # see `_insist`
        }
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self.context_tokens = context_tokens
        self.parallel = parallel
        self.schema_format: SchemaFormat = "json_schema"
        """How schemas are sent; it changes when the server says that it knows only the older way."""
        self.name = model or self._only_model()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """An estimate, as the tokenizer is not known: three bytes of UTF-8 a token, and eight tokens a message.

        English has four or more bytes a token and source code three, so the estimate is on the high side; long
        numbers and rare scripts can take more tokens than it says.
        """
        return sum(math.ceil(len(message.content.encode()) / 3) + 8 for message in messages)

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """See `Generator`. ``queue_s`` has the waits between tries too.

        If the server sends no usage, ``prompt_tokens`` is the estimate and ``completion_tokens`` counts the pieces
        that came. With a schema they are those of the JSON text, and up to that many more than ``max_tokens``.

        Raises:
            UsageError: the shape is a grammar, or the end of the text is to be ignored.
            InputError: the server says that the prompt exceeds its context.
            ModelError: the server cannot be reached, refuses, breaks off, or its reply is not of the shape.
        """
        _refuse_impossible(request)
        session = await self._session()
        asked_s = time.perf_counter()
        async with session.slots:
            answer = await self._insist(session.client, request, on_text)
        self._check(answer)
        return answer.generation(asked_s, self.count_tokens(request.messages))

    def forget(self) -> None:
        """What a server keeps is its own."""

    def close(self) -> None:
        """Close the connections. Those of an event loop that has been closed properly went with it."""
        for loop, session in list(self._sessions.items()):
            if loop.is_running():  # perhaps this very thread's: it cannot be waited for
                asyncio.run_coroutine_threadsafe(session.lifetime.aclose(), loop)
            elif not loop.is_closed():
                loop.run_until_complete(session.lifetime.aclose())

    async def _insist(self, client: openai.AsyncOpenAI, request: Request, on_text: OnText | None) -> _Answer:
        """Try until there is an answer.

        The client's own retries are off: they end with the first byte of the stream, and the time they wait would
        count as the server's.
        """
        tried = 0
        while True:
            answer = _Answer(request, on_text)
            sent_format = self.schema_format
            try:
                await self._write(client, answer)
            except (openai.APIError, _BrokenOffError) as error:
                if request.shape and sent_format == "json_schema" and _knows_older_form_only(error):
                    self._use_older_form()
                    continue
                tried += 1
                wait_s = None if answer.shown or tried > self._retries else _wait_s(error, tried)
                if wait_s is None:
                    held = await self._held(client) if _status(error) == 404 else None
                    raise self._explained(error, tried, answer.pieces, held) from error
                await asyncio.sleep(wait_s)
            else:
                return answer

    async def _write(self, client: openai.AsyncOpenAI, answer: _Answer) -> None:
        stream = await client.chat.completions.create(**self._body(answer.request))
        async with stream, contextlib.aclosing(self._chunks(stream)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
                if answer.cut:
                    return
        if answer.finish is None:
            raise _BrokenOffError

    async def _chunks(self, stream: openai.AsyncStream[ChatCompletionChunk]) -> AsyncGenerator[ChatCompletionChunk]:
        """The chunks of a stream; ModelError if something in it is none."""
        try:
            async for chunk in stream:
                if not isinstance(chunk, ChatCompletionChunk) or chunk.choices is None:
                    raise self._malformed(f"{chunk!r:.60} is no chunk of a completion")
                yield chunk
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._malformed(str(error)) from error

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "max_tokens": request.max_tokens + _json_room(request.shape),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.shape is not None:
            # No stop texts: they are meant for the text, and would end the JSON around it.
            body["response_format"] = self._response_format(request.shape)
        elif request.stop:
            body["stop"] = list(request.stop[:STOP_TEXTS])
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": 1}  # some servers send none without the second
        return body

    def _response_format(self, shape: Shape) -> dict[str, Any]:
        if self.schema_format == "json_object":
            return {"type": "json_object", "schema": shape.schema}
        schema = {"name": "answer", "schema": shape.schema, "strict": True}
        return {"type": "json_schema", "json_schema": schema}

    def _use_older_form(self) -> None:
        if self.schema_format == "json_schema" and self._notice:
            self._notice(f"The server at {self._url} does not know json_schema; schemas go to it with json_object.")
        self.schema_format = "json_object"

    def _check(self, answer: _Answer) -> None:
        if answer.finish not in ("stop", "length"):
            raise ModelError(
                f"The server at {self._url} ended the answer with '{answer.finish}', not with 'stop' or 'length'.",
                remedy="Ask something else, or use another model.",
            )
        if answer.refusal:
            raise ModelError(
                f"The model {self.name} refuses to answer: {_sentence(answer.refusal)}.",
                remedy="Ask something else, or use another model.",
            )
        if not answer.fits():
            raise ModelError(
                f"The server at {self._url} wrote {answer.reply.strip()!r:.80}, which is not {answer.wanted()}.",
                remedy="Use a server and a model that keep to a JSON schema.",
            )

    def _malformed(self, what: str) -> ModelError:
        return ModelError(
            f"The server at {self._url} sent a stream that cannot be read: {_sentence(what)}.",
            remedy="Check that the address is that of an OpenAI-compatible API; it often ends in /v1.",
        )

    def _explained(
        self, error: openai.APIError | _BrokenOffError, tried: int, pieces: int = 0, held: list[str] | None = None
    ) -> TeleragError:
        """The error to show for one that a server caused in its last try."""
        server = f"The server at {self._url}"
        tries = [f"{tried} tries"] if tried > 1 else []
        tokens = [f"{pieces} token{'s' * (pieces > 1)}"] if pieces else []
        after = f" after {' and '.join(tries + tokens)}" if tries or tokens else ""
        cause = error.__cause__
        if isinstance(error, _BrokenOffError):
            return ModelError(
                f"{server} ended its stream{after} without saying that the answer is complete.",
                remedy="Its log may say why; a prompt longer than its context is one reason.",
            )
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            silent = isinstance(cause, httpx2.ConnectTimeout)
            why = f"no connection within {self._connect_s:g} s" if silent else _root(cause)
            return ModelError(f"{server} cannot be reached{after}: {why}.", remedy="Start it, or check the address.")
        if isinstance(error, openai.APITimeoutError):
            return ModelError(
                f"{server} sent nothing for {self._timeout_s:g} s{after}.",
                remedy="Check that it is not overloaded, or allow it more time.",
            )
        if isinstance(error, openai.APIConnectionError):
            return ModelError(
                f"{server} broke the connection{after}: {_root(cause or error)}.", remedy="Its log may say why."
            )
        status = _status(error)
        refusal = f"{server} answers {status or 'with an error'}{after}: {_said(error)}"
        if _is_context(error):
            return ContextError(f"{refusal}.", remedy="Shorten the question, lower --max-tokens or --ctx-size.")
        if status in (401, 403):
            return ModelError(f"{refusal}.", remedy=f"Set {KEY_VARIABLE} to a key of this server.")
        if status == 404 and held:
            return ModelError(f"{refusal}; it has {', '.join(held)}.", remedy="Name one of its models.")
        if status == 404:
            return ModelError(f"{refusal}.", remedy="Check the address; it often ends in /v1.")
        if status in _TRANSIENT:
            return ModelError(f"{refusal}.", remedy="Wait, or send it fewer requests at once.")
        return ModelError(f"{refusal}.", remedy="Its log may say more.")

    def _only_model(self) -> str:
        try:
            with openai.OpenAI(**self._settings | {"max_retries": self._retries}) as client:
                held = _names(client.models.list())
        except openai.APIError as error:
            tried = 1 if _wait_s(error, 1) is None else self._retries + 1
            raise self._explained(error, tried) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._malformed(str(error)) from error
        if not held:
            raise ModelError(f"The server at {self._url} lists no model.", remedy="Name one that it has.")
        if len(held) > 1:
            raise UsageError(
                f"The server at {self._url} has {len(held)} models: {', '.join(held)}.", remedy="Name one of them."
            )
        return held[0]

    async def _held(self, client: openai.AsyncOpenAI) -> list[str]:
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
    """A stream ended, in good order, before the answer did."""


class _Answer:
    """What has come in one try."""

    def __init__(self, request: Request, on_text: OnText | None) -> None:
        self.request = request
        self.reply = ""
        """As the server wrote it."""
        self.text = ""
        """As the shape would have it, without stop texts."""
        self.pieces = 0
        """Tokens as far as one can tell before there is usage: pieces of text, or the tokens with probabilities."""
        self.refusal = ""
        self.finish: str | None = None
        self.cut = False
        """The text ended at a stop text that the server did not see."""
        self.shown = False
        """Whether text was passed on, so that there is no way back."""
        self._on_text = on_text
        self._stopped_by: str | None = None
        self._logprobs: list[tuple[bytes, float]] = []
        self._usage: Any = None
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = self._started_s

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Take the next chunk."""
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.logprobs and choice.logprobs.content:
            self._logprobs += [
                (bytes(token.bytes) if token.bytes else token.token.encode(), token.logprob)
                for token in choice.logprobs.content
            ]
        if choice.delta and choice.delta.refusal:
            self.refusal += choice.delta.refusal
        if choice.delta and choice.delta.content:
            self._grow(choice.delta.content)
        if choice.finish_reason and not self.cut:
            self.finish = choice.finish_reason
            if self._first_s is None:  # an empty answer takes the time of its end
                self._last_s = time.perf_counter()
            # vLLM tells the stop text; a number there is a token.
            said = (choice.model_extra or {}).get("stop_reason")
            self._stopped_by = said if said in self.request.stop else None

    def fits(self) -> bool:
        """Whether the reply is of the shape asked for, as far as it goes."""
        shape = self.request.shape
        if shape is None or self.cut:
            return True
        if isinstance(shape, Choice):
            return self.text in shape.options
        if self.finish == "length":
            return self.reply.lstrip().startswith("{")
        return _has_keys(self.reply, shape)

    def wanted(self) -> str:
        """The shape in words."""
        shape = self.request.shape
        if isinstance(shape, Choice):
            return f"one of {', '.join(shape.options)} in JSON"
        return "JSON of the schema"

    def generation(self, asked_s: float, estimated_tokens: int) -> Generation:
        """The result, if the answer is complete."""
        reason: FinishReason = "length" if self.finish == "length" else "stop"
        plain = self.request.shape is None or isinstance(self.request.shape, Json)
        text, tokens = stripped(self.text, _spans(self.text, self._logprobs) if plain else ())
        usage = self._usage
        details = usage.prompt_tokens_details if usage else None
        first_s = self._first_s or self._last_s
        return Generation(
            text,
            reason,
            prompt_tokens=usage.prompt_tokens if usage else estimated_tokens,
            completion_tokens=usage.completion_tokens if usage else self.pieces,
            prefill_s=first_s - self._started_s,
            decode_s=self._last_s - first_s,
            queue_s=self._started_s - asked_s,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            stopped_by=self._stopped_by,
            tokens=tokens,
        )

    def _grow(self, piece: str) -> None:
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        self.reply += piece
        self.pieces = max(self.pieces + 1, len(self._logprobs))
        before, shape = self.text, self.request.shape
        self.text = shape.plain(self.reply) if shape else self.reply
        if stop := find_stop(self.text, self.request.stop):
            self.text, self._stopped_by = self.text[: stop[0]], stop[1]
            self.finish, self.cut = "stop", True
        if self._on_text and len(self.text) > len(before):
            self.shown = True
            self._on_text(self.text, self.pieces)


def _refuse_impossible(request: Request) -> None:
    if isinstance(request.shape, Gbnf) or (request.shape and request.shape.schema is None):
        raise UsageError(
            "A server takes a JSON schema and not a grammar, which this request has.",
            remedy="Use a model file, or a JSON schema.",
        )
    if request.ignore_eos:
        raise UsageError(
            "A server ends an answer where the model does, and this request wants all of its max_tokens.",
            remedy="Use a model file.",
        )


def _json_room(shape: Shape | None) -> int:
    """Tokens for the JSON around a text, at most: ``max_tokens`` is meant for the text alone."""
    if isinstance(shape, Lines):
        return 24 + 4 * shape.most
    return 24 if isinstance(shape, Choice) else 0


def _has_keys(reply: str, shape: Shape) -> bool:
    """Whether a whole reply is a JSON object with the keys that the schema requires."""
    try:
        value = json.loads(reply, strict=False)
    except ValueError:
        return False
    return isinstance(value, dict) and set((shape.schema or {}).get("required", ())) <= set(value)


def _spans(text: str, logprobs: Sequence[tuple[bytes, float]]) -> tuple[Token, ...]:
    """The tokens' places in the text; none if they do not spell it, for then no place is sure."""
    # A character may span tokens; it belongs to the one that completes it.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    spelled, tokens = "", []
    for raw, logprob in logprobs:
        start = len(spelled)
        spelled += decoder.decode(raw)
        tokens.append(Token(start, min(len(spelled), len(text)), logprob))
    return tuple(tokens) if spelled.startswith(text) else ()


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
    """The HTTP status, or the one that a stream told after it had begun with 200."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code
    code = getattr(error, "code", None)
    return int(code) if code and code.isdigit() else None


def _knows_older_form_only(error: Exception) -> bool:
    said = _said(error) if isinstance(error, openai.APIStatusError) else ""
    return "json_schema" in said and "json_object" in said


def _is_context(error: openai.APIError) -> bool:
    said = f"{error.code} {error.type} {_said(error)}".lower()
    words = ("context length", "context_length", "context size", "context_size", "context window")
    return _status(error) in (None, 400, 413, 422) and any(word in said for word in words)


def _said(error: openai.APIError) -> str:
    """The server's own words, in whatever form it wraps them."""
    body: Any = error.body
    if isinstance(body, dict):
        body = next((body[key] for key in ("message", "detail", "error") if body.get(key)), body)
    return _sentence(str(body or error.message))


def _sentence(text: str) -> str:
    """A text on one line, not too long, without the full stop at its end."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _SAID_CHARACTERS else line[: _SAID_CHARACTERS - 1] + "…"


def _root(error: BaseException) -> str:
    """What the operating system said about a connection, below the layers that wrap it."""
    found = next((cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno), None)
    if found is None:
        return _sentence(str(error) or type(error).__name__)
    said = os.strerror(found.errno) if found.errno and found.errno > 0 else str(found.strerror)
    return said[:1].lower() + said[1:]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        grouped = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        error = grouped[0] if grouped else error.__cause__ or error.__context__


def _names(page: Any) -> list[str]:
    """The models of a list, or none if it is something else that came with status 200."""
    return sorted(str(model.id) for model in getattr(page, "data", None) or ())
