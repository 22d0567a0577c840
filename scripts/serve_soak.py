"""What a server takes: many clients that ask, hang up, send too much or nonsense, all at once; nothing may be lost or crossed.

    python scripts/serve_soak.py INDEX [--clients 32] [--seconds 180] [-o RESULT.json]
    python scripts/serve_soak.py http://127.0.0.1:8000 --pid PID

With an index, `telerag serve-local` is started and stopped; with an address, a running server is used. First everything that
is wrong is asked once, and every question alone; what comes back is what it must be under load. Then each client does one
thing after another, drawn at random: chat and completions, streamed or not, by several pipelines; embeddings, searches, lists;
requests that are cut off before the first byte, in the middle of a stream or half sent; too large ones, malformed ones, ones
that nobody can answer.

Fails if any answer is a 500, belongs to another request, or is missing though we did not cut it off (a documented refusal is
an answer); if afterwards the server still holds something; or if it grows. The actions follow from the seed, what they meet does not.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import random
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from scipy.stats import theilslopes

from server_process import Sample, get_json, sample, serve_local
from telerag_cli.bench_record import record
from telerag_cli.files import write_json

QUESTIONS = Path(__file__).resolve().parent.parent / "datasets" / "python_questions.txt"
PIPELINES = ("hyde", "subquestion", "iterative", "iter_retgen", "flare", "self_rag")
"""Beside naive, which is one call of the LLM."""
NAIVE_SHARE = 0.8
"""Of the questions; the others keep the LLM busy for many times as long."""
LOOKAHEADS = (None, "refined", "question", "off")
"""None of them may change an answer."""
MAX_TOKENS = 24
STORE = "vs_telerag"
REFUSALS = (503, 504)
"""Full, or out of time: documented answers that any request for work may get."""
KEPT_S = 2.0
"""A connection idle for longer is not used again: servers close theirs after some seconds, perhaps just as we write."""
LONGEST_S = 330.0
"""For the next piece of an answer; what takes longer is lost, since by then the server must have said that it is too late."""
HUGE_BYTES = 1 << 30
CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
MOST_CHUNKS = 1024
WARM_S = 60.0
FEWEST_S = 60.0
"""After the warm-up; of less, growth cannot be told from the rest of the warm-up."""
MOST_GROWTH = 0.02
MOST_THREADS, MOST_FILES = 2.0, 4.0
"""By which the trend of either may rise."""
SETTLE_S = 20.0
"""For a server that nobody asks any more to hold nothing."""
SHOWN = 20


class WrongError(Exception):
    """What the server did and should not have."""


@dataclass(frozen=True)
class Ask:
    """What must have the same answer whenever it is asked; how it is streamed and moved ahead is not part of it."""

    route: str
    pipeline: str
    question: str


@dataclass
class Expected:
    """What must come back, by what was asked."""

    answers: dict[Ask, str] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    found: dict[str, list[str]] = field(default_factory=dict)
    first_under_load: int = 0

    def check_answer(self, ask: Ask, text: str) -> None:
        """Compare with what it was; what is asked for the first time is kept, and so compared with its own repetitions."""
        if ask not in self.answers:
            self.answers[ask] = text
            self.first_under_load += 1
        elif self.answers[ask] != text:
            owners = [
                other.question for other, answer in self.answers.items() if answer == text and other != ask
            ]
            whose = f"which is the answer to {owners[0]!r}" if owners else "which is nobody's"
            raise WrongError(f"{ask} has the answer {text!r}, {whose}; before it was {self.answers[ask]!r}")


@dataclass
class Tally:
    """What was done and what came of it."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    """Of whole answers."""


@dataclass(frozen=True)
class Target:
    """The server."""

    url: str
    api_key: str | None

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def head(self, path: str, *lines: str) -> bytes:
        """The beginning of a POST, for a connection of our own."""
        own = [f"{name}: {value}" for name, value in self.headers.items()]
        first = [
            f"POST {path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc}",
            "Content-Type: application/json",
        ]
        return "\r\n".join([*first, *own, *lines]).encode()


Bad = tuple[str, str, str, bytes, tuple[int, ...]]
"""What is wrong, method, path, body, and the statuses that say so."""


def bad_requests() -> list[Bad]:
    """Requests that nobody can answer."""
    chat, completions, embeddings = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
    search = f"/v1/vector_stores/{STORE}/search"
    turn = [{"role": "user", "content": "Why?"}]

    def asking(**changes: Any) -> bytes:
        return json.dumps({"model": "telerag-naive", "messages": turn, "max_tokens": 4} | changes).encode()

    long = [{"role": "user", "content": "why " * 20_000}]
    return [
        ("malformed JSON", "POST", chat, b'{"model": "telerag-naive", "messages": [', (400,)),
        ("no JSON at all", "POST", completions, b"\xff\xfe\x00 nothing", (400,)),
        ("empty body", "POST", embeddings, b"", (400,)),
        ("a list for an object", "POST", chat, b"[1, 2, 3]", (400,)),
        ("deep nesting", "POST", chat, b"[" * 20_000, (400,)),
        ("messages of a wrong type", "POST", chat, asking(messages="Why?"), (400,)),
        ("no messages", "POST", chat, asking(messages=[]), (400,)),
        ("an unknown role", "POST", chat, asking(messages=[{"role": "oracle", "content": "Why?"}]), (400,)),
        ("an unknown model", "POST", chat, asking(model="telerag-nobody"), (404,)),
        ("an absurd temperature", "POST", chat, asking(temperature=99), (400,)),
        ("no number", "POST", chat, b'{"model":"telerag-naive","messages":[{"role":"user","content":"a"}],"top_p":NaN}', (400,)),
        ("negative tokens", "POST", chat, asking(max_tokens=-1), (400,)),
        ("half a seed", "POST", chat, asking(seed=0.5), (400,)),
        ("five answers", "POST", chat, asking(n=5), (400,)),
        ("an unknown option", "POST", chat, asking(sparkle=True), (400,)),
        ("an unknown lookahead", "POST", chat, asking(telerag={"lookahead": "psychic"}), (400,)),
        ("a schema that is none", "POST", chat,
         asking(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}), (400,)),
        ("a prompt beyond the context", "POST", chat, asking(messages=long), (400,)),
        ("the same, streamed", "POST", chat, asking(messages=long, stream=True), (400,)),
        ("a lone surrogate", "POST", chat, asking(messages=[{"role": "user", "content": "\ud800"}]), (400,)),
        ("a prompt of a wrong type", "POST", completions, b'{"model": "telerag-naive", "prompt": {"a": 1}}', (400,)),
        ("nothing to embed", "POST", embeddings, b'{"model": "any", "input": []}', (400, 404)),
        ("an unknown embedder", "POST", embeddings, b'{"model": "nobody", "input": "a"}', (404,)),
        ("an unknown store", "POST", "/v1/vector_stores/vs_none/search", b'{"query": "a"}', (404,)),
        ("too many results", "POST", search, b'{"query": "a", "max_num_results": 5000}', (400,)),
        ("a filter that is none", "POST", search, b'{"query": "a", "filters": {"type": "like", "key": "a", "value": 1}}', (400,)),
        ("an unknown path", "GET", "/v1/nothing", b"", (404,)),
        ("a path outwards", "GET", "/page/..%2f..%2f..%2fetc%2fpasswd", b"", (404,)),
        ("a wrong method", "GET", chat, b"", (405,)),
    ]  # fmt: skip


class Client:
    """One of those at work, with connections of its own."""

    def __init__(self, target: Target, questions: Sequence[str], expected: Expected, tally: Tally, embedder: str,
                 seed: int) -> None:  # fmt: skip
        self._target = target
        self._questions = questions
        self._expected = expected
        self._tally = tally
        self._embedder = embedder
        self._random = random.Random(seed)
        self._bad = bad_requests()
        limits = httpx2.Limits(keepalive_expiry=KEPT_S)
        self._http = httpx2.AsyncClient(base_url=target.url, headers=target.headers, timeout=LONGEST_S, limits=limits,
                                        trust_env=False)  # fmt: skip
        self._actions: list[tuple[str, int, Callable[[], Awaitable[str]]]] = [
            ("chat", 20, self._chat),
            ("chat, streamed", 20, self._streamed_chat),
            ("completion", 6, self._completion),
            ("completion, streamed", 6, self._streamed_completion),
            ("embeddings", 8, self._embed),
            ("search", 8, self._search),
            ("lists", 6, self._look),
            ("hung up before the first byte", 8, self._hang_up_early),
            ("hung up in the stream", 8, self._hang_up_late),
            ("half a request", 4, self._half),
            ("too large by its header", 2, self._huge_header),
            ("too large by its chunks", 1, self._huge_chunks),
            ("no HTTP", 1, self._garbage),
            ("a bad request", 12, self._ask_badly),
        ]

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def work(self, until_s: float) -> None:
        """Do one thing after another until the time has come; the last is finished."""
        actions = [action for _name, _weight, action in self._actions]
        weights = [weight for _name, weight, _action in self._actions]
        names = {action: name for name, _weight, action in self._actions}
        while time.monotonic() < until_s:
            (action,) = self._random.choices(actions, weights)
            await self.do(names[action], action)

    async def do(self, name: str, action: Callable[[], Awaitable[str]]) -> None:
        """One action, and what came of it."""
        began_s = time.perf_counter()
        try:
            outcome = await action()
        except WrongError as error:
            outcome = "wrong"
            self._tally.problems.append(f"{name}: {error}")
        except (httpx2.HTTPError, OSError, ValueError, LookupError, TypeError) as error:
            outcome = "lost"
            self._tally.problems.append(f"{name}: {type(error).__name__}: {error}")
        self._tally.outcomes[name, outcome] += 1
        if outcome == "whole":
            self._tally.latency_s.append(time.perf_counter() - began_s)
        if outcome.startswith("refused: 503"):
            await asyncio.sleep(self._random.uniform(0.1, 0.5))

    async def do_all_bad(self) -> None:
        """Each request that nobody can answer, once."""
        for bad in self._bad:
            await self.do("a bad request", partial(self._ask_badly, bad))
        for name, action in (
            ("too large by its header", self._huge_header),
            ("too large by its chunks", self._huge_chunks),
            ("no HTTP", self._garbage),
        ):
            await self.do(name, action)

    # What is asked for

    def _draw(self, route: str) -> Ask:
        pipeline = "naive" if self._random.random() < NAIVE_SHARE else self._random.choice(PIPELINES)
        return Ask(route, pipeline, self._random.choice(self._questions))

    def _body(self, ask: Ask, *, stream: bool) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": ask.question}
        if ask.route == "chat/completions":
            asked = {"messages": [{"role": "user", "content": ask.question}]}
            if lookahead := self._random.choice(LOOKAHEADS):
                asked["telerag"] = {"lookahead": lookahead, "timeline": self._random.random() < 0.3,
                                    "events": self._random.random() < 0.3}  # fmt: skip
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return {
            "model": f"telerag-{ask.pipeline}",
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            **asked,
            **streaming,
        }

    async def answer(self, ask: Ask) -> str:
        """Have it answered whole and checked."""
        response = await self._post(f"/v1/{ask.route}", self._body(ask, stream=False))
        if refused := self._refused(response):
            return refused
        _expect(response, (200,))
        value = response.json()
        choice = value["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise WrongError(f"the answer has the finish reason {choice['finish_reason']!r}")
        if not value["usage"]["completion_tokens"] <= value["usage"]["total_tokens"]:
            raise WrongError(f"the usage is {value['usage']}")
        self._check(ask, text, value.get("telerag"))
        return "whole"

    async def stream(self, ask: Ask, *, pieces: int | None = None) -> str:
        """The same, streamed; hangs up after so many pieces if told to."""
        async with self._streaming(f"/v1/{ask.route}", self._body(ask, stream=True)) as response:
            if response.status_code != 200:
                await response.aread()
                return self._refused(response) or _expect(response, (200,))
            texts: list[str] = []
            told: dict[str, Any] | None = None
            finish = usage = None
            done = False
            async for event in _events(response):
                if done:
                    raise WrongError(f"after the end comes {event!r}")
                if event == "[DONE]":
                    done = True
                    continue
                chunk = json.loads(event)
                if "error" in chunk:
                    return _refused_in_stream(chunk["error"])
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                    texts.append(piece or "")
                    if choice["finish_reason"]:
                        finish, told = choice["finish_reason"], chunk.get("telerag")
                usage = chunk.get("usage") or usage
                if pieces is not None and len(texts) >= pieces:
                    return "cut off"
        if not done or finish not in ("stop", "length") or not usage:
            raise WrongError(f"the stream ended with finish reason {finish!r}, usage {usage}, {'' if done else 'no '}[DONE]")  # fmt: skip
        self._check(ask, "".join(texts), told)
        return "whole"

    async def embed(self, texts: Sequence[str], form: str = "float") -> str:
        """Embed these and compare with what each was alone."""
        body = {"model": self._embedder, "input": list(texts), "encoding_format": form}
        response = await self._post("/v1/embeddings", body)
        if refused := self._refused(response):
            return refused
        _expect(response, (200,))
        data = response.json()["data"]
        if [each["index"] for each in data] != list(range(len(texts))):
            raise WrongError(f"{len(texts)} texts have the embeddings {[each['index'] for each in data]}")
        for text, each in zip(texts, data, strict=True):
            coded = each["embedding"]
            vector = (
                np.frombuffer(base64.b64decode(coded), "<f4")
                if form == "base64"
                else np.array(coded, np.float32)
            )
            known = self._expected.vectors.setdefault(text, vector)
            cosine = float(known @ vector / (np.linalg.norm(known) * np.linalg.norm(vector)))
            if cosine < 0.999:
                raise WrongError(
                    f"the embedding of {text!r} has a cosine of {cosine:.4f} with what it was before"
                )
        return "whole"

    async def search(self, question: str) -> str:
        """Search and compare with what was found before."""
        body = {"query": question, "max_num_results": 5}
        response = await self._post(f"/v1/vector_stores/{STORE}/search", body)
        if refused := self._refused(response):
            return refused
        _expect(response, (200,))
        hits = response.json()["data"]
        scores = [hit["score"] for hit in hits]
        if scores != sorted(scores, reverse=True):
            raise WrongError(f"the scores for {question!r} are {scores}")
        found = [hit["file_id"] for hit in hits]
        known = self._expected.found.setdefault(question, found)
        if known != found:
            raise WrongError(f"the search for {question!r} finds {found} and found {known} before")
        return "whole"

    def _check(self, ask: Ask, text: str, told: dict[str, Any] | None) -> None:
        if ask.route == "chat/completions":
            if told is None:
                raise WrongError(f"the answer to {ask} says nothing of its passages")
            if told["question"] != ask.question:
                raise WrongError(f"{ask.question!r} got the answer to {told['question']!r}")
        self._expected.check_answer(ask, text)

    # Actions

    async def _chat(self) -> str:
        return await self.answer(self._draw("chat/completions"))

    async def _streamed_chat(self) -> str:
        return await self.stream(self._draw("chat/completions"))

    async def _completion(self) -> str:
        return await self.answer(self._draw("completions"))

    async def _streamed_completion(self) -> str:
        return await self.stream(self._draw("completions"))

    async def _embed(self) -> str:
        texts = self._random.choices(self._questions, k=self._random.choice((1, 1, 2, 40)))
        return await self.embed(texts, self._random.choice(("float", "base64")))

    async def _search(self) -> str:
        return await self.search(self._random.choice(self._questions))

    async def _look(self) -> str:
        path = self._random.choice(
            ("/v1/models", "/health", "/ready", "/metrics", "/telerag/state", "/v1/vector_stores", "/")
        )
        response = await self._http.get(path)
        self._tally.statuses[response.status_code] += 1
        _expect(response, (200,))
        return "whole"

    async def _hang_up_early(self) -> str:
        try:
            async with asyncio.timeout(self._random.random() ** 3 * 2):
                ask = self._draw(self._random.choice(("chat/completions", "completions")))
                return await (self.stream(ask) if self._random.random() < 0.5 else self.answer(ask))
        except TimeoutError:
            return "cut off"

    async def _hang_up_late(self) -> str:
        return await self.stream(self._draw("chat/completions"), pieces=self._random.randint(1, 12))

    async def _half(self) -> str:
        body = json.dumps(self._body(self._draw("chat/completions"), stream=True)).encode()
        whole = self._target.head("/v1/chat/completions", f"Content-Length: {len(body)}") + b"\r\n\r\n" + body
        async with self._connection() as (_reader, writer):
            writer.write(whole[: self._random.randrange(1, len(whole))])
            await writer.drain()
            await asyncio.sleep(self._random.random() * 0.5)
            writer.transport.abort()
        return "cut off"

    async def _huge_header(self) -> str:
        async with self._connection() as (reader, writer):
            writer.write(
                self._target.head("/v1/chat/completions", f"Content-Length: {HUGE_BYTES}") + b"\r\n\r\n{"
            )
            await writer.drain()
            return self._told_status(await self._first_line(reader), (413,))

    async def _huge_chunks(self) -> str:
        async with self._connection() as (reader, writer):
            writer.write(self._target.head("/v1/embeddings", "Transfer-Encoding: chunked") + b"\r\n\r\n")
            answer = asyncio.create_task(self._first_line(reader))
            try:
                for _ in range(MOST_CHUNKS):
                    if answer.done():
                        break
                    writer.write(CHUNK)
                    await writer.drain()
                    await asyncio.sleep(0)
                else:
                    raise WrongError(f"{MOST_CHUNKS * len(CHUNK):,} bytes were taken without a word")
                return self._told_status(await answer, (413,))
            except ConnectionError:  # what it wrote before it closed may be lost with what we sent
                return "refused: closed"
            finally:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)

    async def _garbage(self) -> str:
        async with self._connection() as (reader, writer):
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00" + self._random.randbytes(200) + b"\r\n\r\n")
            await writer.drain()
            line = await self._first_line(reader)
            return self._told_status(line, (400,)) if line else "refused: closed"

    async def _ask_badly(self, bad: Bad | None = None) -> str:
        what, method, path, body, statuses = bad or self._random.choice(self._bad)
        response = await self._http.request(
            method, path, content=body, headers={"content-type": "application/json"}
        )
        self._tally.statuses[response.status_code] += 1
        if response.status_code not in (*statuses, *REFUSALS):
            raise WrongError(f"{what}: {response.status_code} and not {statuses[0]}: {response.text[:300]}")
        if not isinstance(response.json()["error"]["message"], str):
            raise WrongError(f"{what}: {response.text[:300]} is no error of OpenAI's form")
        return f"refused: {response.status_code}"

    # How it is sent

    async def _post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        response = await self._http.post(path, json=body)
        self._tally.statuses[response.status_code] += 1
        return response

    @contextlib.asynccontextmanager
    async def _streaming(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx2.Response]:
        async with self._http.stream("POST", path, json=body) as response:
            self._tally.statuses[response.status_code] += 1
            yield response

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        parts = urlsplit(self._target.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _first_line(self, reader: asyncio.StreamReader) -> bytes:
        async with asyncio.timeout(LONGEST_S):
            return await reader.readline()

    def _told_status(self, line: bytes, wanted: Sequence[int]) -> str:
        status = int(line.split()[1])
        self._tally.statuses[status] += 1
        if status not in wanted:
            raise WrongError(f"{line!r} and not {wanted[0]}")
        return f"refused: {status}"

    def _refused(self, response: httpx2.Response) -> str:
        """That it is a refusal that any request may get; empty if it is none."""
        if response.status_code not in REFUSALS:
            return ""
        if response.status_code == 503 and not float(response.headers["retry-after"]) >= 0:
            raise WrongError(f"a 503 says Retry-After: {response.headers['retry-after']}")
        return f"refused: {response.status_code} {response.json()['error']['code']}"


async def _events(response: httpx2.Response) -> AsyncIterator[str]:
    """The data of server-sent events."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def _refused_in_stream(error: dict[str, Any]) -> str:
    if error["type"] not in ("timeout_error", "overloaded_error"):
        raise WrongError(f"the stream ended with {error}")
    return f"refused: in the stream, {error['code']}"


def _expect(response: httpx2.Response, statuses: Sequence[int]) -> str:
    if response.status_code not in statuses:
        request = response.request
        raise WrongError(
            f"{request.method} {request.url.path} is answered with {response.status_code}: {response.text[:300]}"
        )
    return ""


# The server from outside


class Watching:
    """Looks at the server's process every second, in a thread."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(1.0):
            try:
                self.samples.append(sample(self.pid))
            except ProcessLookupError:
                return

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()


def trend(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The ends of the line through the values that outliers hardly move: the median of all slopes (Theil and Sen)."""
    slope, offset, _low, _high = theilslopes(values, times_s)
    return float(offset + slope * times_s[0]), float(offset + slope * times_s[-1])


def growth(samples: Sequence[Sample], warm_s: float) -> dict[str, Any]:
    """How memory, threads and files went after the warm-up; None if there are too few samples."""
    kept = [one for one in samples if one.at_s >= samples[0].at_s + warm_s]
    if len(kept) < 3:
        return {"judged": False, "seconds": 0.0}
    times_s = [one.at_s for one in kept]
    resident, private = ([getattr(one, name) for one in kept] for name in ("resident_bytes", "private_bytes"))
    (first, last), (first_private, last_private) = trend(times_s, resident), trend(times_s, private)
    threads, files = (
        trend(times_s, [float(getattr(one, name)) for one in kept]) for name in ("threads", "files")
    )
    return {
        "judged": times_s[-1] - times_s[0] >= FEWEST_S - 2,
        "seconds": round(times_s[-1] - times_s[0], 1),
        "resident_bytes": round(last),
        "resident_growth": round(last / first - 1, 5),
        "private_growth": round(last_private / first_private - 1, 5),
        "threads_growth": round(threads[1] - threads[0], 2),
        "files_growth": round(files[1] - files[0], 2),
    }


HELD = (("queue", "running"), ("queue", "waiting"), ("llm", "running"), ("llm", "waiting"), ("arena", "references"),
        ("lookahead", "rounds"))  # fmt: skip


def held(state: dict[str, Any]) -> dict[str, int]:
    """What the server holds for requests."""
    return {f"{group}.{name}": state[group][name] for group, name in HELD}


def settled(target: Target) -> tuple[dict[str, int], float]:
    """What it holds when nobody asks any more, and after how many seconds that was nothing."""
    began_s = time.monotonic()
    while True:
        left = held(get_json(f"{target.url}/telerag/state", target.api_key))
        took_s = time.monotonic() - began_s
        if not any(left.values()) or took_s > SETTLE_S:
            return left, took_s
        time.sleep(0.1)


async def references(client: Client, questions: Sequence[str]) -> None:
    """Ask everything alone."""
    for question in questions:
        for ask in (Ask("chat/completions", "naive", question), Ask("completions", "naive", question)):
            if (outcome := await client.answer(ask)) != "whole":
                raise SystemExit(f"{ask} asked alone is {outcome}")
        for work in (client.embed([question]), client.search(question)):
            if (outcome := await work) != "whole":
                raise SystemExit(f"{question!r} asked alone is {outcome}")


async def load(clients: Sequence[Client], seconds: float) -> None:
    """All at once; each finishes what it is at."""
    until_s = time.monotonic() + seconds
    try:
        await asyncio.gather(*(client.work(until_s) for client in clients))
    finally:
        for client in clients:
            await client.close()


@contextlib.contextmanager
def target_of(
    where: str, pid: int | None, options: Sequence[str], api_key: str | None
) -> Iterator[tuple[Target, int | None]]:
    """The server: the one at an address, or one that we start over an index."""
    if where.startswith("http://"):
        yield Target(where.rstrip("/"), api_key), pid
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serve_local(Path(where), *options, log=log, api_key=api_key) as served:
            yield Target(served.url, api_key), served.process.pid
            code = served.stop(60)
        if code:
            raise SystemExit(f"the server ended with exit code {code}\n{log.read_text()[-4000:]}")


def table(tally: Tally) -> Iterator[str]:
    """What was done, and how often it came to what."""
    names = list(dict.fromkeys(name for name, _outcome in sorted(tally.outcomes)))
    for name in names:
        told = [
            f"{outcome} {count}" for (each, outcome), count in tally.outcomes.most_common() if each == name
        ]
        yield f"{name:32} {', '.join(told)}"


def main() -> None:
    """Run, print, write; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", metavar="URL|INDEX")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--warm", type=float, default=WARM_S, help="seconds until growth counts")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--pool", type=int, default=12, help="different questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, if it is on this machine")
    parser.add_argument("--api-key", help="the server's; one that is started here then asks for it")
    parser.add_argument("--serve-options", default="", help="further options of telerag serve-local")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    questions = options.questions.read_text(encoding="utf-8").splitlines()[: options.pool]

    problems: list[str] = []
    tally, expected = Tally(), Expected()
    samples: list[Sample] = []
    before: Sample | None = None
    after: Sample | None = None
    with target_of(options.server, options.pid, shlex.split(options.serve_options), options.api_key) as (
        target,
        pid,
    ):
        embedder = get_json(f"{target.url}/telerag/state", target.api_key)["embedder"]

        def client(number: int) -> Client:
            return Client(target, questions, expected, tally, embedder, options.seed * 1000 + number)

        async def alone() -> None:
            first = client(-1)
            await first.do_all_bad()
            await references(first, questions)
            await first.close()

        async def together() -> None:
            await load([client(number) for number in range(options.clients)], options.seconds)

        asyncio.run(alone())
        alone_answers = len(expected.answers)
        tally.statuses.clear()
        before = sample(pid) if pid else None
        began_s = time.monotonic()
        if pid:
            with Watching(pid) as watching:
                asyncio.run(together())
            samples = watching.samples
        else:
            asyncio.run(together())
        took_s = time.monotonic() - began_s
        left, settled_s = settled(target)
        after = sample(pid) if pid else None
    problems += tally.problems
    if any(left.values()):
        problems.append(f"after {settled_s:.0f} s the server still holds {left}")
    grown = growth(samples, options.warm) if samples else {"judged": False, "seconds": 0.0}
    problems += judge(grown, before, after)

    requests = sum(tally.outcomes.values())
    outcomes = {name: {outcome: count for (each, outcome), count in sorted(tally.outcomes.items()) if each == name}
                for name, _outcome in sorted(tally.outcomes)}  # fmt: skip
    whole = sum(count for (_name, outcome), count in tally.outcomes.items() if outcome == "whole")
    for line in table(tally):
        print(line)
    print("statuses " + ", ".join(f"{status}: {count}" for status, count in sorted(tally.statuses.items())))
    print(
        f"{requests} requests in {took_s:.0f} s, {whole} whole answers; nothing held after {settled_s:.1f} s; growth {grown}"
    )
    for problem in problems[:SHOWN]:
        print(f"WRONG {problem}")
    if len(problems) > SHOWN:
        print(f"WRONG and {len(problems) - SHOWN} more")
    if options.output:
        figures = figures_of(options, requests, whole, len(problems), tally, grown, settled_s)
        write_json(options.output, record(
            shlex.join(["python", *sys.argv]), figures=figures, clients=options.clients, seconds=options.seconds, seed=options.seed,
            requests=requests, whole_answers=whole, outcomes=outcomes,
            statuses={str(status): count for status, count in sorted(tally.statuses.items())},
            latency_s={f"p{share}": round(float(np.percentile(tally.latency_s, share)), 4) for share in (50, 95, 99)} if whole else {},
            asked_alone=alone_answers, first_under_load=expected.first_under_load, held_after=left, settled_s=round(settled_s, 2),
            growth=grown, resident_bytes=[one.resident_bytes for one in samples], problems=problems))  # fmt: skip
    if problems:
        raise SystemExit(1)


def judge(grown: dict[str, Any], before: Sample | None, after: Sample | None) -> Iterator[str]:
    """What is wrong with how the server went."""
    if grown["judged"]:
        if grown["resident_growth"] >= MOST_GROWTH:
            yield f"memory grew by {grown['resident_growth']:.1%} in {grown['seconds']:.0f} s; {MOST_GROWTH:.0%} are allowed"
        if grown["threads_growth"] >= MOST_THREADS:
            yield f"threads grew by {grown['threads_growth']:g} in {grown['seconds']:.0f} s"
        if grown["files_growth"] >= MOST_FILES:
            yield f"open files grew by {grown['files_growth']:g} in {grown['seconds']:.0f} s"
    if before and after and after.files > before.files + MOST_FILES:
        yield f"{after.files} files are open when nobody asks; before it were {before.files}"


def figures_of(options: argparse.Namespace, requests: int, whole: int, problems: int, tally: Tally, grown: dict[str, Any],
               settled_s: float) -> list[dict[str, str]]:  # fmt: skip
    """Rows for the README."""
    setting = f"{options.clients} clients for {options.seconds:.0f} s"
    rows = [
        {"what": f"The server under {setting}: 500s, lost or crossed answers", "value": str(problems),
         "against": f"{requests:,} requests, {whole:,} whole answers, {tally.statuses[503]:,} refused because the queue was full",
         "goal": "0"},
        {"what": "Requests, LLM slots, references to lists that are left afterwards", "value": "0" if settled_s <= SETTLE_S else "some",
         "against": f"within {settled_s:.1f} s", "goal": "0"},
    ]  # fmt: skip
    if grown["judged"]:
        rows.append({"what": f"Growth of its memory in {grown['seconds']:.0f} s after the warm-up",
                     "value": f"{grown['resident_growth']:+.2%}", "against": f"{grown['resident_bytes'] / 2**20:,.0f} MiB",
                     "goal": "at most 2 %"})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
