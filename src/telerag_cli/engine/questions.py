"""Reading questions: JSON lines, OpenAI Batch lines, or plain text with one question per line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import xxhash

from telerag_cli import text
from telerag_cli.corpus.fields import id_of
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.text import TextError

QUESTION_KEYS = ("question", "query", "text")
ID_KEYS = ("id", "_id", "qid", "query_id", "custom_id")
CHAT_ROUTE = "/v1/chat/completions"
_ARRAY = re.compile(r"\s*\[\s*([{\"]|$)")


@dataclass(frozen=True)
class AskOptions:
    """How one question is answered, where that differs from how the engine was opened."""

    pipeline: Pipeline | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `AnswerConfig`."""
    turns: Sequence[Turn] = ()
    """The conversation before the question."""


USUAL = AskOptions()
"""As the engine was opened."""


ReadBody = Callable[[dict[str, Any]], tuple[str, AskOptions]]
"""Turns the body of a Batch line into a question and how to answer it; raises TeleragError."""


@dataclass(frozen=True)
class Question:
    """One item of input: its id (or line number), and the question or what is wrong with it."""

    id: str
    text: str
    batch: dict[str, Any] | None = None
    """The request body, if the line is one of OpenAI's Batch format; it is answered in kind."""
    problem: str | None = None
    options: AskOptions = USUAL

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others: its id, and its text or the digest of its request."""
        return self.id, self.text if self.batch is None else digest(self.batch)


def digest(body: dict[str, Any]) -> str:
    """Return a digest of a request's body, whatever the order of its keys."""
    return f"xxh3:{xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())}"


def read_questions(data: IO[bytes], name: str, read_body: ReadBody | None = None) -> Iterator[Question]:
    """Yield questions as they come, in any of the forms that people keep them in; empty lines are skipped.

    A line is a question, ``id<TAB>question`` as in TREC topics, a JSON object, or one of OpenAI's Batch format; or the
    whole is one JSON array. UTF-8 and UTF-16 are read. An item that cannot be used carries its ``problem``.

    Args:
        data: the source.
        name: of the source, for messages.
        read_body: reads the requests of Batch lines; without it their last user's message is the question.
    """
    read = _Reader(read_body or _last_user_message)
    with text.reading(data, may_be_latin=False) as (handle, _encoding):
        for number, line in enumerate(handle, 1):
            if number == 1 and _ARRAY.match(line):
                yield from read.array(line + handle.read(), name)
                return
            if line.strip():
                yield read.line(line.strip(), number, f"{name}:{number}")


def usable(question: str) -> str:
    """Return a question that models can read; raises InputError if it holds half characters or NULs."""
    try:
        return text.checked(question)
    except TextError as error:
        raise InputError(
            f"The question {text.printable(text.repaired(question))!r:.60} cannot be used: {error}."
        ) from None


@dataclass(frozen=True)
class _Reader:
    """Makes questions of lines and JSON objects."""

    read_body: ReadBody

    def array(self, value: str, name: str) -> Iterator[Question]:
        """Read a file that is one JSON array of objects or strings."""
        try:
            items = text.parse_json(text.checked(value))
        except TextError as error:
            yield Question("1", "", problem=f"{name} begins with [ and is not a JSON array: {error}.")
            return
        for number, item in enumerate(items, 1):
            where = f"{name}, item {number}"
            if isinstance(item, dict):
                yield self._object(item, number, where)
            elif isinstance(item, str) and item.strip():
                yield Question(str(number), item.strip())
            else:
                yield Question(str(number), "", problem=f"{where} is a JSON {type(item).__name__}, not a question.")

    def line(self, line: str, number: int, where: str) -> Question:
        """Read one line without its end."""
        try:
            text.checked(line)
            if line.startswith("{"):
                return self._object(text.parse_json(line), number, where)
        except TextError as error:
            what = "is not JSON" if line.startswith("{") else "cannot be used"
            return Question(_id_in(line) or str(number), "", problem=f"{where} {what}: {error}.")
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) == 1:
            return Question(str(number), line)
        if len(cells) == 2 and all(cells) and not any(map(str.isspace, cells[0])):
            return Question(cells[0], cells[1])
        what = "cells with tabs between, and not an id and a question"
        return Question(str(number), "", problem=f"{where} has {len(cells)} {what}.")

    def _object(self, value: dict[str, Any], number: int, where: str) -> Question:
        key = str(number)
        try:
            key = next((text.checked(id_of(value[name])) for name in ID_KEYS if value.get(name) is not None), key)
            if "body" in value:
                return self._request(value, key, where)
            question = next((value[name] for name in QUESTION_KEYS if value.get(name) is not None), None)
            if not isinstance(question, str) or not question.strip():
                wanted = f"one of {', '.join(QUESTION_KEYS)}"
                return Question(key, "", problem=f"{where} has {sorted(value)} and not {wanted} with a text.")
            return Question(key, text.checked(question.strip()))
        except TextError as error:
            return Question(key, "", problem=f"{where} cannot be used: {error}.")

    def _request(self, value: dict[str, Any], key: str, where: str) -> Question:
        body, url = value["body"], value.get("url", CHAT_ROUTE)
        if not isinstance(body, dict):
            return Question(key, "", {}, f"{where} has a body that is {type(body).__name__}, not an object.")
        if url != CHAT_ROUTE:
            return Question(key, "", body, f"{where} is for {url!r:.60}, and only {CHAT_ROUTE} is answered.")
        try:
            question, options = self.read_body(body)
        except TeleragError as error:
            return Question(key, "", body, f"{where}: {error}")
        return Question(key, text.checked(question), body, options=options)


def _id_in(line: str) -> str | None:
    """Return the id of a line that is not strict JSON, if it is JSON to a parser that is not strict."""
    try:
        value = json.loads(line)
        return next((text.checked(id_of(value[name])) for name in ID_KEYS if value.get(name) is not None), None)
    except (ValueError, RecursionError, AttributeError):
        return None


def _last_user_message(body: dict[str, Any]) -> tuple[str, AskOptions]:
    """Return the text of the last user's message of a request, its parts joined."""
    turns = body.get("messages")
    users = (
        [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
        if isinstance(turns, list)
        else []
    )
    content = users[-1].get("content") if users else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or not content.strip():
        raise InputError("The request has no user's message that is text.")
    return content.strip(), USUAL


async def read_ahead(questions: Iterable[Question], most: int) -> AsyncIterator[Question]:
    """Questions of a source that may block, read by a thread, at most ``most`` ahead; raises what the source raises.

    The thread is a daemon, because nothing can wake one that waits for a terminal or a pipe when the run is
    interrupted.
    """
    loop = asyncio.get_running_loop()
    read: asyncio.Queue[Question | BaseException | None] = asyncio.Queue()
    free = threading.Semaphore(most)

    def put(item: Question | BaseException | None) -> None:
        loop.call_soon_threadsafe(read.put_nowait, item)

    def work() -> None:
        try:
            for question in questions:
                free.acquire()
                put(question)
            put(None)
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens any more
                put(error)

    threading.Thread(target=work, daemon=True, name="questions").start()
    while (item := await read.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        free.release()
        yield item
