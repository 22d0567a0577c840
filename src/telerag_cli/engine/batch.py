"""Answering many questions, some at a time, each with its line, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.engine.lines import answer_line, error_line, trace_line
from telerag_cli.engine.questions import Question
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.lookahead.retriever import JoinReport
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.registry import PipelineName

Write = Callable[[dict[str, Any]], None]


@dataclass
class Summary:
    """What a run came to; seconds are sums over the questions answered, save ``wall_s``."""

    asked: int = 0
    failed: int = 0
    skipped: int = 0
    wall_s: float = 0.0
    total_s: float = 0.0
    llm_s: float = 0.0
    retrieval_s: float = 0.0
    lists_hit: int = 0
    lists_wanted: int = 0
    lists_failed: int = 0
    passages_dropped: int = 0

    def add(self, answered: Answered) -> None:
        """Count an answer."""
        self.total_s += answered.timings["total_s"]
        self.llm_s += answered.timings.get("llm_s", 0.0)
        self.retrieval_s += answered.timings.get("retrieval_s", 0.0)
        self.lists_hit += sum(join.lists_hit for join in answered.joins)
        self.lists_wanted += sum(join.lists_wanted for join in answered.joins)
        self.lists_failed += sum(join.lists_failed for join in answered.joins)
        self.passages_dropped += answered.dropped_passages

    def lines(self) -> list[str]:
        """In words, for the person who waited."""
        words = []
        count = self.asked - self.failed
        if count:
            words.append(
                f"{count} answered in {self.wall_s:.1f} s ({count / self.wall_s:.2f} a second): mean {self.total_s / count:.2f} s, of "
                f"which LLM {self.llm_s / count:.2f} s and retrieval {self.retrieval_s / count:.3f} s; "
                f"{self.lists_hit / max(self.lists_wanted, 1):.0%} of {self.lists_wanted:,} probed lists were in fast memory."
            )
        if self.lists_failed:
            words.append(JoinReport.failures(self.lists_failed))
        if self.passages_dropped:
            words.append(f"{self.passages_dropped} passages did not fit the context and were left out.")
        if self.failed:
            words.append(f"{self.failed} failed; their lines say why.")
        if self.skipped:
            words.append(f"{self.skipped} skipped: already answered in the output.")
        return words


@dataclass(frozen=True)
class Outputs:
    """Where a run tells what it does."""

    write: Write
    """Takes an output line."""
    record: Write | None
    """Takes a trace line, if the run is recorded."""
    tell: Callable[[str], None]
    """Takes what went wrong with a question; the rest go on."""
    advance: Callable[[int], None]
    """Called after each question."""


def answer_all(
    engine: Engine,
    name: PipelineName,
    pipeline: Pipeline,
    questions: Iterable[Question],
    outputs: Outputs,
    *,
    concurrency: int,
    answered: set[str],
    ordered: bool = False,
) -> Summary:
    """Answer questions and write each one's line as soon as it is there.

    Args:
        engine: what answers.
        name: of the pipeline, for the lines.
        pipeline: how to answer.
        questions: from any source, read as they come.
        outputs: where lines and messages go.
        concurrency: questions under way at once.
        answered: ids to skip.
        ordered: write in the order of the questions, which may keep an answer back until those before it are there.
    """
    summary = Summary()
    write = _InOrder(outputs.write) if ordered else None
    started_s = time.perf_counter()

    async def one(number: int, question: Question) -> None:
        try:
            if question.problem is not None:
                raise InputError(question.problem)
            result = await engine.ask(pipeline, question.text, name=name.value)
        except TeleragError as error:
            summary.failed += 1
            outputs.tell(f"question {question.id}: {error}")
            line = error_line(question, str(error))
        else:
            summary.add(result)
            line = answer_line(question, result, name, engine.settings.lookahead)
            if outputs.record:
                outputs.record(trace_line(question, result, name))
        if write:
            write.put(number, line)
        else:
            outputs.write(line)
        outputs.advance(1)

    async def everything() -> None:
        running: set[asyncio.Task[None]] = set()
        source = _feed(questions, concurrency)

        async def following() -> Question | None:
            return await anext(source, None)

        coming: asyncio.Task[Question | None] | None = asyncio.create_task(following())
        try:
            while coming or running:
                room = coming is not None and len(running) < concurrency
                await asyncio.wait(
                    running | ({coming} if room and coming else set()), return_when=asyncio.FIRST_COMPLETED
                )
                running = {task for task in running if not _finished(task)}
                if not room or coming is None or not coming.done():
                    continue
                question = coming.result()
                coming = asyncio.create_task(following()) if question else None
                if question and question.id in answered:
                    summary.skipped += 1
                elif question:
                    running.add(asyncio.create_task(one(summary.asked, question)))
                    summary.asked += 1
        finally:
            left = [task for task in (*running, coming) if task]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    asyncio.run(everything())
    summary.wall_s = time.perf_counter() - started_s
    return summary


def _finished(task: asyncio.Task[None]) -> bool:
    """Whether a task is done; raises what it raised."""
    if task.done():
        task.result()
    return task.done()


class _InOrder:
    """Keeps lines back until all before them are written."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._next = 0
        self._kept: dict[int, dict[str, Any]] = {}

    def put(self, number: int, line: dict[str, Any]) -> None:
        """Write line ``number``, and those that waited for it, or keep it."""
        self._kept[number] = line
        while self._next in self._kept:
            self._write(self._kept.pop(self._next))
            self._next += 1


async def _feed(questions: Iterable[Question], ahead: int) -> AsyncIterator[Question]:
    """Read a blocking source in a thread, a few items ahead.

    The thread is a daemon, because nothing can wake one that waits for a terminal or a pipe when the run is interrupted.
    """
    loop = asyncio.get_running_loop()
    read: asyncio.Queue[Question | BaseException | None] = asyncio.Queue()
    places = threading.Semaphore(ahead)

    def put(item: Question | BaseException | None) -> bool:
        try:
            loop.call_soon_threadsafe(read.put_nowait, item)
        except RuntimeError:
            return False  # the loop has ended, and nobody listens any more
        return True

    def work() -> None:
        try:
            for question in questions:
                places.acquire()
                if not put(question):
                    return
            put(None)
        except BaseException as error:  # told where it can be handled
            put(error)

    threading.Thread(target=work, daemon=True, name="questions").start()
    while (item := await read.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        places.release()
        yield item
