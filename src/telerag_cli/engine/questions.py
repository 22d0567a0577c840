"""Reading questions: JSON lines, OpenAI Batch lines, or plain text with one question per line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

QUESTION_KEYS = ("question", "query", "text")
ID_KEYS = ("id", "_id", "qid", "custom_id")


@dataclass(frozen=True)
class Question:
    """One line of input: its id (or line number), and the question or what is wrong with it."""

    id: str
    text: str
    batch: dict[str, Any] | None = None
    """The request body, if the line is one of OpenAI's Batch format; it is answered in kind."""
    problem: str | None = None


def read_questions(lines: IO[bytes], name: str) -> Iterator[Question]:
    """Questions as they come; empty lines are skipped.

    Args:
        lines: UTF-8 text.
        name: of the source, for messages.
    """
    for number, raw in enumerate(lines, 1):
        where = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield Question(str(number), "", problem=f"{where} is not UTF-8: {error.reason} at byte {error.start}.")
            continue
        if line.startswith("{"):
            yield _from_json(line, number, where)
        elif line:
            yield Question(str(number), line)


def _from_json(line: str, number: int, where: str) -> Question:
    try:
        value: dict[str, Any] = json.loads(line)
    except ValueError as error:
        return Question(str(number), "", problem=f"{where} is not JSON: {error}.")
    key = next((str(value[name]) for name in ID_KEYS if value.get(name) is not None), str(number))
    if isinstance(value.get("body"), dict):
        body = value["body"]
        turns = [turn for turn in body.get("messages") or [] if isinstance(turn, dict) and turn.get("role") == "user"]
        text = turns[-1].get("content") if turns else None
        wanted = "a body with a user message"
    else:
        body = None
        text = next((value[name] for name in QUESTION_KEYS if value.get(name) is not None), None)
        wanted = "one of " + ", ".join(QUESTION_KEYS)
    if not isinstance(text, str) or not text.strip():
        return Question(key, "", body, f"{where} has {sorted(value)} and not {wanted}.")
    return Question(key, text.strip(), body)


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
