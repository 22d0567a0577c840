"""Answering many questions, some at a time, each with its line, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from telerag_cli.engine.dispatch import ReplicaState
from telerag_cli.engine.engine import Answered
from telerag_cli.engine.lines import answer_line, error_line, trace_line
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.question_reader import QuestionReader
from telerag_cli.engine.questions import Question
from telerag_cli.engine.scheduler import Scheduler
from telerag_cli.engine.workers import Worker
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.retrieval.retriever import JoinReport

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


Outcome = Answered | TeleragError
Take = Callable[[int, Question, Outcome], None]
"""Takes what became of a question, as soon as it is known, and the question's place among all."""


def answer_all(
    workers: Sequence[Worker],
    scheduler: Scheduler,
    questions: Iterable[Question],
    outputs: Outputs,
    *,
    answered: Collection[str],
    ordered: bool = False,
) -> Summary:
    """Answer questions and write each one's line as soon as it is there.

    Args:
        workers: what answers.
        scheduler: puts questions together, and says which worker takes which.
        questions: from any source, read as they come.
        outputs: where lines and messages go.
        answered: ids to skip.
        ordered: write in the order of the questions, which may keep an answer back until those before it are there.
    """
    summary = Summary()

    def take(_place: int, question: Question, outcome: Outcome) -> None:
        summary.asked += 1
        if isinstance(outcome, TeleragError):
            summary.failed += 1
            outputs.tell(f"question {question.id}: {outcome}")
            line = error_line(question, str(outcome))
        else:
            summary.add(outcome)
            line = answer_line(question, outcome)
            if outputs.record:
                outputs.record(trace_line(question, outcome))
        outputs.write(line)
        outputs.advance(1)

    def wanted() -> Iterator[Question]:
        for question in questions:
            if question.id in answered:
                summary.skipped += 1
            else:
                yield question

    started_s = time.perf_counter()
    asyncio.run(answer_each(workers, scheduler, wanted(), InOrder(take) if ordered else take))
    summary.wall_s = time.perf_counter() - started_s
    return summary


async def answer_each(
    workers: Sequence[Worker], scheduler: Scheduler, questions: Iterable[Question], take: Take
) -> None:
    """Answer questions: gather, schedule, answer; whatever is ready goes on.

    Args:
        workers: what answers.
        scheduler: puts questions together, and says which worker takes which.
        questions: from any source, read as they come.
        take: called once for each.
    """
    await _Run(workers, scheduler, take).everything(questions)


class InOrder:
    """A `Take` that keeps outcomes back until all before them are known."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._next = 0
        self._kept: dict[int, tuple[Question, Outcome]] = {}

    def __call__(self, place: int, question: Question, outcome: Outcome) -> None:
        """See `Take`."""
        self._kept[place] = question, outcome
        while self._next in self._kept:
            self._take(self._next, *self._kept.pop(self._next))
            self._next += 1


class _Run:
    def __init__(self, workers: Sequence[Worker], scheduler: Scheduler, take: Take) -> None:
        self._workers = workers
        self._scheduler = scheduler
        self._done = take
        self._count = 0
        self._asked: dict[int, Question] = {}
        self._members = [0] * len(workers)
        """Questions under way, by worker."""
        self._left: dict[int, int] = {}
        """Of them, by micro-batch."""
        self._under_way: list[dict[int, MicroBatch]] = [{} for _ in workers]

    async def everything(self, questions: Iterable[Question]) -> None:
        """Until the source has ended and every question has its line."""
        schedule = self._scheduler.schedule
        gathering = QuestionReader(questions, schedule.batch_size, schedule.max_wait_s)
        running: set[asyncio.Task[None]] = set()
        coming: asyncio.Task[list[Question]] | None = asyncio.create_task(gathering.some())
        try:
            while coming or running or self._scheduler.queue.waiting:
                running |= self._start()
                # One batch is read ahead, and looked at when what waits no longer fills the workers.
                wanted = {coming} if coming and self._scheduler.queue.waiting < len(self._workers) else set()
                await asyncio.wait(running | wanted, return_when=asyncio.FIRST_COMPLETED)
                running = {task for task in running if not _finished(task)}
                if coming in wanted and coming.done():
                    gathered = coming.result()
                    coming = asyncio.create_task(gathering.some()) if gathered else None
                    await self._gathered(gathered)
        finally:
            left = [task for task in (*running, coming) if task]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _gathered(self, questions: Sequence[Question]) -> None:
        """Put questions in the queue; what is none has its outcome already."""
        new: list[int] = []
        for question in questions:
            number, self._count = self._count, self._count + 1
            if question.problem is None:
                self._asked[number] = question
                new.append(number)
            else:
                self._done(number, question, InputError(question.problem))
        if new:
            texts = [self._asked[number].text for number in new]
            self._scheduler.queue.add(await asyncio.to_thread(self._scheduler.cut, texts, new))

    def _start(self) -> set[asyncio.Task[None]]:
        """Give the workers as many micro-batches as they can take."""
        if not self._scheduler.queue.waiting:
            return set()
        size = self._scheduler.schedule.micro_batch
        states = [
            ReplicaState(number, (worker.at_once - members) // size, worker.resident(), tuple(batches.values()))
            for number, (worker, members, batches) in enumerate(
                zip(self._workers, self._members, self._under_way, strict=True)
            )
        ]
        started = set()
        for worker, batch in self._scheduler.queue.assign(states):
            self._under_way[worker][batch.number] = batch
            self._members[worker] += len(batch.members)
            self._left[batch.number] = len(batch.members)
            started |= {asyncio.create_task(self._answer(worker, batch, place)) for place in range(len(batch.members))}
        return started

    async def _answer(self, worker: int, batch: MicroBatch, place: int) -> None:
        number = batch.members[place]
        outcome: Outcome
        try:
            outcome = await self._workers[worker].answer(batch, place)
        except TeleragError as error:
            outcome = error
        finally:
            self._members[worker] -= 1
            self._left[batch.number] -= 1
            if not self._left[batch.number]:
                del self._left[batch.number], self._under_way[worker][batch.number]
        self._done(number, self._asked.pop(number), outcome)


def _finished(task: asyncio.Task[None]) -> bool:
    """Whether a task is done; raises what it raised."""
    if task.done():
        task.result()
    return task.done()
