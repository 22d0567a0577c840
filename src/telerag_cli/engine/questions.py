"""Reading questions: JSON lines, OpenAI Batch lines, or plain text with one question per line."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from telerag_cli import text
from telerag_cli.corpus.fields import id_of
from telerag_cli.text import TextError

QUESTION_KEYS = ("question", "query", "text")
ID_KEYS = ("id", "_id", "qid", "query_id", "custom_id")
_ARRAY = re.compile(r"\s*\[\s*([{\"]|$)")


@dataclass(frozen=True)
class Question:
    """One line of input: its id (or line number), and the question or what is wrong with it."""

    id: str
    text: str
    batch: dict[str, Any] | None = None
    """The request body, if the line is one of OpenAI's Batch format; it is answered in kind."""
    problem: str | None = None


def read_questions(data: IO[bytes], name: str) -> Iterator[Question]:
    """Yield questions as they come, in any of the forms that people keep them in; empty lines are skipped.

    A line is a question, ``id<TAB>question`` as in TREC topics, a JSON object, or one of OpenAI's Batch format; or the
    whole is one JSON array. UTF-8 and UTF-16 are read. An item that cannot be used carries its ``problem``.

    Args:
        data: the source.
        name: of the source, for messages.
    """
    with text.reading(data, may_be_latin=False) as (handle, _encoding):
        for number, line in enumerate(handle, 1):
            if number == 1 and _ARRAY.match(line):
                yield from _from_array(line + handle.read(), name)
                return
            if line.strip():
                yield _question(line.strip(), number, f"{name}:{number}")


def _from_array(value: str, name: str) -> Iterator[Question]:
    try:
        items = text.parse_json(text.checked(value))
    except TextError as error:
        yield Question("1", "", problem=f"{name} begins with [ and is not a JSON array: {error}.")
        return
    for number, item in enumerate(items, 1):
        where = f"{name}, item {number}"
        if isinstance(item, dict):
            yield _from_object(item, number, where)
        elif isinstance(item, str) and item.strip():
            yield Question(str(number), item.strip())
        else:
            yield Question(str(number), "", problem=f"{where} is a JSON {type(item).__name__}, not a question.")


def _question(line: str, number: int, where: str) -> Question:
    try:
        text.checked(line)
        if line.startswith("{"):
            value = text.parse_json(line)
            assert isinstance(value, dict)
            return _from_object(value, number, where)
    except TextError as error:
        what = "is not JSON" if line.startswith("{") else "cannot be used"
        return Question(str(number), "", problem=f"{where} {what}: {error}.")
    cells = line.split("\t")
    if len(cells) == 1:
        return Question(str(number), line)
    if len(cells) == 2 and cells[0] and not any(map(str.isspace, cells[0].strip())):
        return Question(cells[0].strip(), cells[1].strip())
    return Question(
        str(number), "", problem=f"{where} has {len(cells)} cells with tabs between, and not an id and a question."
    )


def _from_object(value: dict[str, Any], number: int, where: str) -> Question:
    key = str(number)
    try:
        key = next((id_of(value[name]) for name in ID_KEYS if value.get(name) is not None), key)
    except TextError as error:
        return Question(key, "", problem=f"{where}: {error}.")
    if "body" in value:
        body = value["body"]
        if not isinstance(body, dict):
            return Question(key, "", {}, f"{where} has a body that is {type(body).__name__}, not an object.")
        asked = _asked(body.get("messages"))
        if asked is None:
            return Question(key, "", body, f"{where} has a body without a user's message that is text.")
        return Question(key, asked, body)
    question = next((value[name] for name in QUESTION_KEYS if value.get(name) is not None), None)
    if not isinstance(question, str) or not question.strip():
        return Question(key, "", None, f"{where} has {sorted(value)} and not one of {', '.join(QUESTION_KEYS)}.")
    return Question(key, question.strip())


def _asked(messages: Any) -> str | None:
    """Return the text of the last user's message of a request, its parts joined, or None if it has none."""
    users = (
        [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        if isinstance(messages, list)
        else []
    )
    content = users[-1].get("content") if users else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content.strip() or None if isinstance(content, str) else None


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
