"""Answering many questions, some at a time, each with its own output line even if others fail."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telerag_cli.engine.admission import AdmissionQueue, Permit, Worker
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.lines import answer_line, error_line, trace_line
from telerag_cli.engine.questions import Question, read_ahead
from telerag_cli.engine.scheduler import Scheduler
from telerag_cli.errors import InputError, InternalError, TeleragError
from telerag_cli.retrieval.report import JoinReport

Write = Callable[[dict[str, Any]], None]


@dataclass
class Summary:
    """What a run came to, summed over the questions answered."""

    asked: int = 0
    failed: int = 0
    skipped: int = 0
    wall_s: float = 0.0
    dropped_passages: int = 0
    timings: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    joins: Counter[str] = field(default_factory=Counter)

    def add(self, answered: AskResult) -> None:
        """Count an answer."""
        for name, seconds in answered.timings.items():
            self.timings[name] += seconds
        for join in answered.joins:
            self.joins.update(join.counts())
        self.dropped_passages += answered.dropped_passages

    def lines(self) -> list[str]:
        """In words, for the person who waited."""
        words = []
        if count := self.asked - self.failed:
            mean_s = {name: seconds / count for name, seconds in self.timings.items()}
            wanted = self.joins["lists_wanted"]
            words.append(
                f"{count} answered in {self.wall_s:.1f} s ({count / self.wall_s:.2f} a second): "
                f"mean {mean_s['total_s']:.2f} s, of which LLM {mean_s.get('llm_s', 0.0):.2f} s "
                f"and retrieval {mean_s.get('retrieval_s', 0.0):.3f} s; "
                f"{self.joins['lists_hit'] / max(wanted, 1):.0%} of {wanted:,} probed lists were in fast memory."
            )
        if self.joins["lists_failed"]:
            words.append(JoinReport.failures(self.joins["lists_failed"]))
        if self.dropped_passages:
            words.append(f"{self.dropped_passages} passages did not fit the context and were left out.")
        if self.failed:
            words.append(f"{self.failed} failed; their lines say why.")
        if self.skipped:
            words.append(f"{self.skipped} skipped: already answered in the output.")
        return words


@dataclass(frozen=True)
class Outputs:
    """Where lines and messages of a run go."""

    write: Write
    """Takes an output line."""
    record: Write | None
    """Takes a trace line, if the run is recorded."""
    tell: Callable[[str, TeleragError], None]
    """Takes the name of a question and what went wrong with it; the rest go on."""
    advance: Callable[[int], None]
    """Called after each question."""


Outcome = AskResult | TeleragError
Take = Callable[[int, Question, Outcome], None]
"""Takes what became of a question, as soon as it is known, and the question's place among all."""


def answer_all(
    workers: Sequence[Worker],
    scheduler: Scheduler,
    questions: Iterable[Question],
    outputs: Outputs,
    *,
    answered: Collection[tuple[str, str]],
    ordered: bool = False,
) -> Summary:
    """Answer questions and write each one's line as soon as it is there.

    Questions whose keys are in ``answered`` are skipped. ``ordered`` writes in the order of the questions, which may
    keep an answer back until those before it are there.
    """
    summary = Summary()

    def take(_place: int, question: Question, outcome: Outcome) -> None:
        summary.asked += 1
        if isinstance(outcome, TeleragError):
            summary.failed += 1
            outputs.tell(f"question {question.id}", outcome)
            line = error_line(question, outcome)
        else:
            summary.add(outcome)
            line = answer_line(question, outcome)
            if outputs.record:
                outputs.record(trace_line(question, outcome))
        outputs.write(line)
        outputs.advance(1)

    def wanted() -> Iterator[Question]:
        for question in questions:
            if question.key in answered:
                summary.skipped += 1
            else:
                yield question

    started_s = time.perf_counter()
    asyncio.run(answer_each(workers, scheduler, wanted(), in_order(take) if ordered else take))
    summary.wall_s = time.perf_counter() - started_s
    return summary


async def answer_each(
    workers: Sequence[Worker], scheduler: Scheduler, questions: Iterable[Question], take: Take
) -> None:
    """Answer questions as they come, some at a time."""
    schedule = scheduler.schedule
    limit = schedule.batch_size + len(workers) * schedule.micro_batch
    queue = AdmissionQueue(scheduler, workers, limit, eager=False)
    waiting = asyncio.Semaphore(limit)

    async def answer(number: int, question: Question, permit: Permit) -> None:
        outcome: Outcome
        async with permit:
            waiting.release()
            try:
                outcome = await workers[permit.worker].answer(permit.batch, permit.place, question.options)
            except TeleragError as error:
                outcome = error
            except Exception as error:  # a bug costs the question that met it
                outcome = InternalError(error)
        take(number, question, outcome)

    try:
        async with asyncio.TaskGroup() as running:
            number = 0
            async for question in read_ahead(questions, schedule.batch_size):
                if question.problem is None:
                    await waiting.acquire()
                    running.create_task(answer(number, question, queue.submit(question.text)))
                else:
                    take(number, question, InputError(question.problem))
                number += 1
            queue.end()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await queue.close()


def in_order(take: Take) -> Take:
    """A `Take` that keeps outcomes back until all before them are known."""
    kept: dict[int, tuple[Question, Outcome]] = {}
    place = 0

    def take_in_order(number: int, question: Question, outcome: Outcome) -> None:
        nonlocal place
        kept[number] = question, outcome
        while place in kept:
            take(place, *kept.pop(place))
            place += 1

    return take_in_order
