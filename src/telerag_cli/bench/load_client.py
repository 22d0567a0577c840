"""What sends one request to an OpenAI-compatible server and notes when each piece of the answer came.

It is no `Endpoint`: nothing is tried again, nothing is checked but that the answer is whole, and what it costs per
request is little. Every request in flight has a connection of its own, so that none waits for another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from telerag_cli.bench.load_metrics import Answer
from telerag_cli.bench.load_names import Backend
from telerag_cli.bench.load_prompts import Prompt
from telerag_cli.errors import ModelError, UsageError

KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_S = 10.0
"""Time for a connection to be made."""
KEPT_S = 2.0
"""A connection idle for longer is not used again: servers close theirs after some seconds, perhaps just as we write."""
LISTING_S = 30.0
"""For a server to list its models."""
DRAIN_S = 1.0
"""For the end of a stream after its last event, so that the connection can be used again."""

TEXT_KEYS = ("content", "reasoning_content", "reasoning", "refusal", "text")
"""Where a piece of text may be; some servers send the same one under two of them."""
USAGE = ("prompt_tokens", "completion_tokens")
BROKEN_OFF = ("abort", "error")
"""Reasons to finish that are none: the server gave up."""
_SAID_CHARACTERS = 300


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    root: str
    """Where ``/models`` is found, as ``http://127.0.0.1:8000/v1``."""
    backend: Backend

    @property
    def url(self) -> str:
        """Where answers come from."""
        return self.root + self.backend.path

    @classmethod
    def find(cls, base_url: str, endpoint: str | None = None, backend: Backend | None = None) -> Server:
        """The server at an address, with or without its ``/v1``.

        Args:
            base_url: as ``http://127.0.0.1:8000``.
            endpoint: a path below it that ends in ``/completions`` or ``/chat/completions``.
            backend: by default what the endpoint says, and chat if there is none.

        Raises:
            UsageError: the address is none, or endpoint and backend contradict each other.
        """
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"'{base_url}' is no address of a server: it does not begin with http:// or https://.",
                remedy="Write it like http://127.0.0.1:8000.",
            )
        try:
            httpx2.URL(base_url)
        except httpx2.InvalidURL as error:
            raise UsageError(
                f"'{base_url}' is no address of a server: {_sentence(str(error))}.",
                remedy="Write it like http://127.0.0.1:8000.",
            ) from error
        base = base_url.rstrip("/")
        if endpoint is None:
            return cls(base if base.endswith("/v1") else f"{base}/v1", backend or Backend.CHAT)
        endpoint = "/" + endpoint.strip("/")
        told = next((each for each in (Backend.CHAT, Backend.COMPLETIONS) if endpoint.endswith(each.path)), None)
        if told is None or (backend is not None and told is not backend):
            wanted = backend.path if backend else "/chat/completions or /completions"
            raise UsageError(
                f"The endpoint {endpoint} does not end in {wanted}.",
                remedy="Name another --endpoint, or another --backend.",
            )
        if endpoint.startswith("/v1/"):
            base = base.removesuffix("/v1")
        return cls((base + endpoint).removesuffix(told.path), told)


@dataclass(frozen=True)
class Sampling:
    """What every request asks for besides its prompt."""

    max_tokens: int
    """For prompts that have no length of their own."""
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of the body; one that is None takes ours of that name away."""

    def body(self, server: Server, model: str, prompt: Prompt) -> bytes:
        """The request as JSON."""
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt.text}]}
            if server.backend is Backend.CHAT
            else {"prompt": prompt.text}
        )
        body = {
            "model": model,
            **asked,
            "max_tokens": prompt.max_tokens or self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.extra_body,
        }
        body = {name: value for name, value in body.items() if value is not None or name not in self.extra_body}
        return json.dumps(body).encode()


class LoadClient:
    """Connections to one server, and what is asked of it. An async context manager."""

    def __init__(
        self, server: Server, model: str, sampling: Sampling, timeout_s: float, api_key: str | None = None
    ) -> None:
        """Connect to nothing yet.

        Args:
            server: where requests go.
            model: its name there.
            sampling: what they ask for.
            timeout_s: the longest silence, before the first byte and between any two.
            api_key: by default the variable OPENAI_API_KEY; without one, none is sent.
        """
        self.server, self.model = server, model
        self._sampling = sampling
        self._timeout_s = timeout_s
        self._headers = _headers(api_key) | {
            "content-type": "application/json",
            "accept": "text/event-stream",
            "accept-encoding": "identity",
        }
        self._timeouts = httpx2.Timeout(timeout_s, connect=CONNECT_S).as_dict()
        self._tls = ssl.create_default_context()
        # One transport a connection: a common pool looks through all of its connections for every request, which
        # at hundreds of them takes longer than the request.
        self._idle: list[httpx2.AsyncHTTPTransport] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    async def ask(self, prompt: Prompt) -> Answer:
        """Send a prompt and read the whole answer. What goes wrong is told in the answer."""
        content = self._sampling.body(self.server, self.model, prompt)
        request = httpx2.Request(
            "POST", self.server.url, headers=self._headers, content=content, extensions={"timeout": self._timeouts}
        )
        line = self._idle.pop() if self._idle else self._connection()
        reusable, error = False, ""
        heard = _Heard(time.perf_counter())
        try:
            reusable = await self._exchange(line, request, heard)
        except _FaultError as fault:
            error = f"The server at {self.server.root} {fault}."
        except httpx2.RequestError as fault:
            error = f"The server at {self.server.root} {self._broken(fault)}."
        finally:
            ended_s = time.perf_counter() - heard.sent_s
            if reusable:
                self._idle.append(line)
            else:
                await line.aclose()
        return heard.answer(ended_s, error)

    def _connection(self) -> httpx2.AsyncHTTPTransport:
        return httpx2.AsyncHTTPTransport(verify=self._tls, limits=httpx2.Limits(keepalive_expiry=KEPT_S))

    async def _exchange(self, line: httpx2.AsyncHTTPTransport, request: httpx2.Request, heard: _Heard) -> bool:
        """Read the answer to its end; whether the connection can be used again.

        Raises:
            _FaultError: it is no whole answer.
            httpx2.RequestError: the connection broke, or there was none.
        """
        response = await line.handle_async_request(request)
        try:
            if response.status_code != httpx2.codes.OK:
                raise _FaultError(
                    f"answers {response.status_code}: {_said(await response.aread()) or response.reason_phrase}"
                )
            packets = response.aiter_raw()
            async with contextlib.aclosing(packets):
                async for packet in packets:
                    heard.feed(packet)
                    if heard.done:
                        return await _drained(packets)
                heard.close()
            return True
        finally:
            await response.aclose()

    def _broken(self, error: httpx2.RequestError) -> str:
        """What became of the connection."""
        if isinstance(error, httpx2.ConnectTimeout):
            return f"cannot be reached: no connection within {CONNECT_S:g} s"
        if isinstance(error, httpx2.TimeoutException):
            return f"sent nothing for {self._timeout_s:g} s"
        verb = "cannot be reached" if isinstance(error, httpx2.ConnectError) else "broke the connection"
        return f"{verb}: {_root(error)}"


def first_model(server: Server, api_key: str | None = None) -> str:
    """The model that the server lists first.

    Raises:
        ModelError: it cannot be reached, refuses, or lists none.
    """
    url = f"{server.root}/models"
    try:
        with httpx2.Client(timeout=httpx2.Timeout(LISTING_S, connect=CONNECT_S), trust_env=False) as client:
            response = client.get(url, headers=_headers(api_key))
    except httpx2.ConnectError as error:
        raise ModelError(
            f"The server at {server.root} cannot be reached: {_root(error)}.", remedy="Start it, or check the address."
        ) from error
    except httpx2.RequestError as error:
        raise ModelError(
            f"The server at {server.root} does not tell its models: {_root(error)}.", remedy="Name one with --model."
        ) from error
    if response.status_code != httpx2.codes.OK:
        said = _said(response.content) or response.reason_phrase
        remedy = (
            f"Set {KEY_VARIABLE} to a key of this server."
            if response.status_code in (401, 403)
            else "Check the address, or name a model with --model."
        )
        raise ModelError(f"{url} answers {response.status_code}: {said}.", remedy=remedy)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, TypeError, LookupError) as error:
        raise ModelError(f"{url} lists no model.", remedy="Name one with --model.") from error


class _FaultError(Exception):
    """What a server did wrong, as the end of a sentence about it."""


class _Heard:
    """An answer as it comes in: server-sent events, cut into packets anywhere."""

    def __init__(self, sent_s: float) -> None:
        self.sent_s = sent_s
        self.done = False
        self._finished = False
        self._rest = b""
        self._texts: list[str] = []
        self._text_s: list[float] = []
        self._last_s: float | None = None
        self._usage: dict[str, Any] = {}

    def feed(self, packet: bytes) -> None:
        """Take what has just come.

        Raises:
            _FaultError: it is no part of an answer.
        """
        now_s = time.perf_counter() - self.sent_s
        *lines, self._rest = (self._rest + packet).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self.done:
                self._take(line[5:].strip(), now_s)

    def close(self) -> None:
        """Note that nothing more will come.

        Raises:
            _FaultError: the answer is not whole.
        """
        self.feed(b"\n")
        self._check_whole()

    def answer(self, ended_s: float, error: str) -> Answer:
        """What has come; ``ended_s`` is when it failed, if it did."""
        latency_s = ended_s if error or self._last_s is None else self._last_s
        return Answer(
            self.sent_s,
            latency_s,
            tuple(self._text_s),
            "".join(self._texts),
            self._usage.get("prompt_tokens"),
            self._usage.get("completion_tokens"),
            error,
        )

    def _check_whole(self) -> None:
        if self._last_s is None:
            raise _FaultError("sent a stream that cannot be read: it has no piece of an answer")
        if not self._finished:  # as llama-cpp-python's server does when the next request interrupts this one
            raise _FaultError("ended its stream without saying that the answer is complete")

    def _take(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._check_whole()
            self.done = True
            return
        try:
            chunk = json.loads(data)
            told = chunk.get("error")
            usage, choices = chunk.get("usage"), chunk.get("choices")
            pieces = [_piece(choice) for choice in (choices or ())[:1]]
            reasons = [choice.get("finish_reason") for choice in (choices or ())[:1]]
            tokens = {name: int(usage[name]) for name in USAGE if usage.get(name) is not None} if usage else {}
        except ValueError as error:
            raise _FaultError(f"sent a stream that cannot be read: {_sentence(str(error))}") from error
        except (AttributeError, TypeError, LookupError) as error:
            raise _FaultError(_no_chunk(data)) from error
        if told:
            code = told.get("code") if isinstance(told, dict) else None
            raise _FaultError(f"answers {code or 'with an error'}: {_sentence(_message(told))}")
        if choices is None and not usage:
            raise _FaultError(_no_chunk(data))
        self._last_s = now_s
        self._usage = tokens or self._usage
        for piece in pieces:
            if piece:
                self._texts.append(piece)
                self._text_s.append(now_s)
        for reason in reasons:
            if reason in BROKEN_OFF:
                raise _FaultError(f"ended the answer with '{reason}'")
            self._finished = self._finished or reason is not None


def _piece(choice: dict[str, Any]) -> str:
    """The text in a choice of a chunk; empty if there is none, as when only the role is told."""
    holder = choice.get("delta") or choice
    found = (holder.get(key) for key in TEXT_KEYS)
    return next((text for text in found if isinstance(text, str) and text), "")


async def _drained(packets: Any) -> bool:
    """Read what follows the last event; whether the stream ended as it should, and soon."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in packets:
                pass
    except (TimeoutError, httpx2.TransportError):
        return False
    return True


def _headers(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get(KEY_VARIABLE)
    return {"authorization": f"Bearer {key}"} if key else {}


def _no_chunk(data: bytes) -> str:
    shown = data.decode(errors="replace")
    return f"sent a stream that cannot be read: {shown[:80]} is no chunk of a completion"


def _said(body: bytes) -> str:
    """A server's own words about an error, in whatever form it wraps them."""
    text = body.decode(errors="replace")
    try:
        return _sentence(_message(json.loads(text)))
    except ValueError:
        return _sentence(text)


def _message(value: Any) -> str:
    while isinstance(value, dict):
        inner = next((value[key] for key in ("error", "message", "detail") if value.get(key)), None)
        if inner is None:
            break
        value = inner
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sentence(text: str) -> str:
    """A text on one line, not too long, without the full stop at its end."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _SAID_CHARACTERS else line[: _SAID_CHARACTERS - 1] + "…"


def _root(error: BaseException) -> str:
    """What the operating system said about a connection, below the layers that wrap it."""
    found = next((cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno), None)
    if found is None:
        return _sentence(str(error) or type(error).__name__)
    # The numbers of TLS and of name look-ups are their own.
    own = isinstance(found, ssl.SSLError | socket.gaierror)
    said = str(found.strerror) if own or not found.errno else os.strerror(found.errno)
    return said[:1].lower() + said[1:]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        error = inner[0] if inner else error.__cause__ or error.__context__
