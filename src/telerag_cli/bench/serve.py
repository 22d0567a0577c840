"""Load on a running server, as ``vllm bench serve`` makes it, and vLLM's figures of what came back.

Requests start when they are due, whatever became of those before them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from telerag_cli.bench.load_client import LoadClient
from telerag_cli.bench.load_metrics import Answer, Wanted, arrivals_s, figures
from telerag_cli.bench.load_prompts import Prompt
from telerag_cli.bench.results import Cell, Check, SuiteResult
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.errors import ModelError
from telerag_cli.progress import Advance
from telerag_cli.system import hardware

Ask = Callable[[Prompt], Awaitable[Answer]]
Watch = Callable[[str, int], AbstractContextManager[Advance]]
"""Told what begins and of how many requests; gives what is called with the number of those that have ended."""

LATE_S = 0.02
"""99 times in 100, at most, for both kinds of lateness: what nobody who waits for an answer would notice."""
TICK_S = 0.01
"""Between two looks at how late this process is."""
REASONS_SHOWN = 3
SPARE_FILES = 64
"""Beside the connections."""


@dataclass(frozen=True)
class Load:
    """How many requests are sent, and when."""

    num_prompts: int
    """At each rate."""
    rates: tuple[float, ...]
    """Requests a second, one run each; infinity sends all at once."""
    num_warmups: int = 0
    """Before the first run."""
    burstiness: float = 1.0
    """See `arrivals_s`."""
    max_concurrency: int | None = None
    """Requests under way at once; what is due beyond it waits here, and its clock starts when it is sent."""
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What came of the requests at one rate."""

    rate: float
    began_s: float
    """By `time.perf_counter`."""
    duration_s: float
    answers: list[Answer]
    """Of those that ended, in the order in which they were due."""
    late_s: list[float]
    """By how much requests started after they were due."""
    slow_s: list[float]
    """By how much this process was late to do what it had to, every `TICK_S`: so much too long may a latency be."""
    planned: int
    interrupted: bool = False

    @property
    def name(self) -> str:
        """The rate in words."""
        return "an unlimited rate" if math.isinf(self.rate) else f"{self.rate:g} requests/s"

    @property
    def failed(self) -> list[Answer]:
        """Those that did not bring a whole answer."""
        return [answer for answer in self.answers if answer.error]


@dataclass(frozen=True)
class About:
    """What is told of a load beside its figures."""

    label: str
    """The system's name in the result."""
    command: str
    settings: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


async def drive(
    ask: Ask,
    prompts: Sequence[Prompt],
    due_s: Sequence[float],
    rate: float,
    max_concurrency: int | None,
    advance: Advance,
) -> Run:
    """Start every request when it is due, and wait for all. Cancelled, it returns what has ended by then.

    Args:
        ask: sends a request.
        prompts: of the requests.
        due_s: (prompts,) ascending; when each starts, in seconds from now.
        rate: for the result.
        max_concurrency: requests under way at once; None for no limit.
        advance: called as each ends.
    """
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    answers: dict[int, Answer] = {}
    late_s: list[float] = []
    slow_s: list[float] = []
    running: set[asyncio.Task[None]] = set()
    interrupted = False

    async def one(number: int, prompt: Prompt) -> None:
        async with slots:
            answers[number] = await ask(prompt)
        advance(1)

    async def watch() -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            slow_s.append(time.perf_counter() - due)

    began_s = time.perf_counter()
    watching = asyncio.create_task(watch())
    try:
        for number, (prompt, due) in enumerate(zip(prompts, due_s, strict=True)):
            # Also when it is late: what was started must get its turn.
            await asyncio.sleep(max(began_s + due - time.perf_counter(), 0.0))
            late_s.append(time.perf_counter() - began_s - due)
            running.add(asyncio.create_task(one(number, prompt)))
        await asyncio.gather(*running)
    except asyncio.CancelledError:
        interrupted = True
    finally:
        ended_s = time.perf_counter()
        for task in (watching, *running):
            task.cancel()
        await asyncio.gather(watching, *running, return_exceptions=True)
    if not interrupted:  # not the end of the streams, which may come later
        ended_s = max(answer.sent_s + answer.latency_s for answer in answers.values())
    return Run(
        rate,
        began_s,
        ended_s - began_s,
        [answers[number] for number in sorted(answers)],
        late_s,
        slow_s,
        len(prompts),
        interrupted,
    )


def measure(client: LoadClient, prompts: Iterator[Prompt], load: Load, watch: Watch) -> list[Run]:
    """Put the load on a server, rate by rate. Interrupted, it returns what was measured, the last run in part.

    Args:
        client: asks the server.
        prompts: enough of them; the warm-up and every rate take the next ones, for a server may keep those it has seen.
        load: when they are sent.
        watch: told of every run.

    Raises:
        ModelError: every request of the warm-up failed.
        KeyboardInterrupt: interrupted when nothing was measured yet.
    """
    _allow_files(load.max_concurrency or load.num_prompts)
    runs = asyncio.run(_measure(client, prompts, load, watch))
    if not any(run.answers for run in runs):
        raise KeyboardInterrupt
    return runs


async def _measure(client: LoadClient, prompts: Iterator[Prompt], load: Load, watch: Watch) -> list[Run]:
    runs: list[Run] = []

    async def run(what: str, count: int, rate: float) -> Run:
        due_s = arrivals_s(count, rate, load.burstiness, load.seed)
        with watch(what, count) as advance:
            return await drive(
                client.ask, list(itertools.islice(prompts, count)), due_s.tolist(), rate, load.max_concurrency, advance
            )

    async with client:
        if load.num_warmups:
            warmup = await run("warming up", load.num_warmups, math.inf)
            if warmup.interrupted:
                return []
            if len(warmup.failed) == load.num_warmups:
                raise ModelError(
                    warmup.failed[0].error,
                    remedy="It was the warm-up, and nothing is measured yet; --num-warmups 0 leaves it out.",
                )
        for rate in load.rates:
            runs.append(await run(f"rate {rate:g}", load.num_prompts, rate))
            if runs[-1].interrupted:
                break
    return runs


def suite_result(runs: Sequence[Run], load: Load, wanted: Wanted, about: About, *, detailed: bool) -> SuiteResult:
    """The figures of a load as a benchmark's result; a run of which nothing ended has no cell.

    Args:
        runs: one a rate.
        load: what was asked for.
        wanted: which figures.
        about: what else is to be told.
        detailed: keep an entry for every request: vLLM's lists (``ttfts``, ``itls``, ...) one by one, in seconds.

    Raises:
        ModelError: every request of every run failed, and nobody interrupted them.
    """
    answers = [answer for run in runs for answer in run.answers]
    if all(answer.error for answer in answers) and not runs[-1].interrupted:
        raise ModelError(
            f"All requests failed ({len(answers)}). The first: {answers[0].error}",
            remedy="Check the server and the options; nothing is written.",
        )
    suite = SUITES[SuiteName.SERVE]
    cells = [
        Cell(
            about.label,
            {"request_rate": "inf" if math.isinf(run.rate) else run.rate},
            _values(run, wanted),
            _detailed(run) if detailed else [],
        )
        for run in runs
        if run.answers
    ]
    settings = {
        "num_prompts": load.num_prompts,
        "num_warmups": load.num_warmups,
        "burstiness": "inf" if math.isinf(load.burstiness) else load.burstiness,
        "max_concurrency": load.max_concurrency,
        "seed": load.seed,
        "goodput_ms": dict(wanted.goodput_ms),
        **about.settings,
    }
    what = f"{about.settings.get('model', about.label)}, served at {about.settings.get('base_url', 'an address')}"
    took_s = runs[-1].began_s + runs[-1].duration_s - runs[0].began_s
    began = datetime.now(UTC) - timedelta(seconds=time.perf_counter() - runs[0].began_s)
    return SuiteResult(
        suite=SuiteName.SERVE.value,
        title=suite.title,
        stands_for=suite.stands_for,
        date=began.isoformat(timespec="seconds"),
        took_s=took_s,
        command=about.command,
        hardware=hardware(),
        metadata=about.metadata,
        settings=settings,
        systems={about.label: {"what": what}},
        axes=list(suite.axes),
        cells=cells,
        ratios=[],
        checks=[check for run in runs if run.answers for check in _checks(run)],
        notes=[*about.notes, *(note for run in runs for note in _notes(run))],
    )


def _values(run: Run, wanted: Wanted) -> dict[str, Any]:
    values = figures(run.answers, run.duration_s, wanted)
    if not math.isinf(run.rate):
        values["p99_start_lag_ms"] = 1e3 * _late(run.late_s)
    values["p99_read_lag_ms"] = 1e3 * _late(run.slow_s)
    return values


def _detailed(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "start_time": answer.sent_s - run.began_s,
            "input_len": answer.input_tokens,
            "output_len": answer.output_tokens,
            "ttft": None if answer.error and not answer.text_s else answer.ttft_s,
            "itl": list(answer.itl_s),
            "e2el": answer.latency_s,
            "generated_text": answer.text,
            "error": answer.error,
        }
        for answer in run.answers
    ]


def _checks(run: Run) -> Iterator[Check]:
    whole = len(run.answers) - len(run.failed)
    yield Check(
        "requests answered",
        whole == run.planned,
        f"At {run.name}, {whole} of {run.planned} requests brought a whole answer.",
    )
    if not math.isinf(run.rate):
        yield Check(
            "requests on time",
            _late(run.late_s) <= LATE_S,
            f"At {run.name}, 99 % of requests started at most {1e3 * _late(run.late_s):.1f} ms after they were due; "
            f"{1e3 * LATE_S:g} ms are allowed.",
        )
    yield Check(
        "answers read on time",
        _late(run.slow_s) <= LATE_S,
        f"At {run.name}, the load generator was at most {1e3 * _late(run.slow_s):.1f} ms late in 99 % of cases, by which "
        f"latencies may be too long; {1e3 * LATE_S:g} ms are allowed.",
    )


def _late(times_s: Sequence[float]) -> float:
    return float(np.percentile(times_s, 99)) if times_s else 0.0


def _notes(run: Run) -> Iterator[str]:
    if run.interrupted:
        ended = len(run.answers)
        yield (
            f"The run at {run.name} was interrupted when {ended} of {run.planned} requests had ended; "
            f"{len(run.late_s) - ended} more had been due and are left out."
        )
    if run.failed:
        reasons = Counter(answer.error for answer in run.failed).most_common()
        told = " ".join(f"{count} x: {reason}" for reason, count in reasons[:REASONS_SHOWN])
        more = f" And {len(reasons) - REASONS_SHOWN} other reasons." if len(reasons) > REASONS_SHOWN else ""
        yield f"At {run.name}, {len(run.failed)} of {len(run.answers)} requests failed. {told}{more}"
    whole = [answer for answer in run.answers if not answer.error]
    uncounted = sum(answer.usage_tokens is None for answer in whole)
    if uncounted:
        yield (
            f"At {run.name}, the server sent no usage for {uncounted} of {len(whole)} answers: their output tokens are "
            "pieces of text, and input tokens are unknown."
        )
    empty = sum(not answer.text_s for answer in whole)
    if empty:
        yield f"At {run.name}, {empty} of {len(whole)} answers were empty; their ttft is the time to their end."


def _allow_files(connections: int) -> None:
    """Let this process open as many connections as it may need, if it may; those it cannot open fail and are told."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
