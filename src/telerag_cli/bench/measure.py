"""Asking all systems the same questions in turn, and what came of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from telerag_cli.bench.results import Cell, Check, Key, Ratio
from telerag_cli.bench.statistics import mean_ratio, ratio, short, summary
from telerag_cli.bench.suites import Pages, SystemName
from telerag_cli.bench.systems import Harness, System
from telerag_cli.config import ScheduleConfig
from telerag_cli.engine.admission import Local, Worker
from telerag_cli.engine.batch import answer_each
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.questions import Question
from telerag_cli.engine.scheduler import Scheduler, scheduled
from telerag_cli.errors import TeleragError
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.progress import Advance

BASELINES = (SystemName.FAISS_ONDISK, SystemName.FAISS_MEMORY, SystemName.FETCH)
"""What the others are divided by: the first of them that takes part."""
COMPARED = (
    (SystemName.FETCH, SystemName.REFINED),
    (SystemName.ARRIVAL, SystemName.REFINED),
    (SystemName.QUESTION, SystemName.REFINED),
    (SystemName.FAISS_MEMORY, SystemName.REFINED),
    (SystemName.REFINED, SystemName.RESIDENT),
    (SystemName.REFINED, SystemName.LLM_ONLY),
    (SystemName.USELESS, SystemName.FETCH),
)
"""What else is divided, where both take part."""
UNMEASURED = ("llm_s", "total_s", "join_s", "embed_s")
"""Timings that are sums or parts of others."""
NEVER_COLD = (SystemName.RESIDENT, SystemName.FAISS_MEMORY, SystemName.FAISS_GPU, SystemName.LLM_ONLY)
"""They read nothing from the index's files when a question comes."""


@dataclass(frozen=True)
class Work:
    """Some questions that are asked at once, by one pipeline."""

    key: Key
    """Where in the suite this belongs."""
    pipeline: Pipeline
    questions: tuple[str, ...]
    number: int = 0
    """Tells repetitions of the same questions apart."""
    prepare: Callable[[System], None] = lambda _system: None
    """Called off the clock, before the turn."""
    at_once: int | None = None
    """How many of them run at once, put together by the system's scheduler; None: all."""

    @property
    def place(self) -> tuple[object, ...]:
        """What a turn of another system at the same work has too."""
        return tuple(self.key.items()), self.questions, self.number


@dataclass(frozen=True)
class SystemTurn:
    """One system's turn at some work. Times are milliseconds."""

    system: str
    work: Work
    wall_ms: float
    """Until the last answer."""
    answers: list[AskResult]
    errors: list[str]
    pages_left: float
    """Share of the index file that was in the page cache when it began."""

    def times_ms(self, name: str) -> list[float]:
        """One of the timings of each answer; 0 where it has none."""
        return [1e3 * answered.timings.get(f"{name}_s", 0.0) for answered in self.answers]

    def texts(self) -> tuple[str, ...]:
        """The answers."""
        return tuple(answered.answer for answered in self.answers)

    def passages(self) -> tuple[tuple[str, ...], ...]:
        """Ids of the passages that each answer was written from."""
        return tuple(tuple(hit.passage.id for hit in answered.found) for answered in self.answers)


def take_turns(
    rig: Harness, works: Sequence[Work], systems: Sequence[SystemName], warmups: Sequence[Work], advance: Advance
) -> list[SystemTurn]:
    """Have each system do the warm-ups, which are forgotten, and then each work; which system goes first rotates."""
    turns = []
    with asyncio.Runner() as runner:
        for measured, some in ((False, warmups), (True, works)):
            for number, work in enumerate(some):
                for name in _order(systems, number):
                    turn = runner.run(_turn(rig, rig.systems[name], work))
                    advance(1)
                    if measured:
                        turns.append(turn)
                    elif turn.errors and not turn.answers:
                        raise TeleragError(f"{name} cannot answer '{work.questions[0]:.60}': {turn.errors[0]}")
    return turns


def _order(systems: Sequence[SystemName], number: int) -> list[SystemName]:
    """All systems, beginning with another each time; llm-only needs what the others found, so it is never first."""
    first = number % len(systems)
    order = [*systems[first:], *systems[:first]]
    if order[0] is SystemName.LLM_ONLY:
        order[:2] = order[1::-1]
    return order


async def _turn(rig: Harness, system: System, work: Work) -> SystemTurn:
    left = rig.start(system)
    work.prepare(system)
    began_s = time.perf_counter()
    if work.at_once is None:
        asked = [system.engine.aask(question, pipeline=work.pipeline) for question in work.questions]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
    else:
        retriever, nprobe = system.engine.retriever, system.engine.nprobe
        wish = ScheduleConfig(schedule=system.schedule, batch_size=len(work.questions))
        schedule = scheduled(wish, work.at_once, retriever.tier.arena_bytes, retriever.index, nprobe)
        worker = Local(system.engine, work.at_once, work.pipeline)
        outcomes = await outcomes_of([worker], Scheduler.over(system.engine, schedule), work.questions)
    turn = turn_of(system.name, work, outcomes, time.perf_counter() - began_s, left)
    if system.name is not SystemName.LLM_ONLY:
        for answered in turn.answers:
            rig.recalled.remember(answered.retrievals)
    return turn


async def outcomes_of(
    workers: Sequence[Worker], scheduler: Scheduler, questions: Sequence[str]
) -> list[AskResult | BaseException]:
    """Have workers answer questions; return each one's answer or error, in order."""
    outcomes: dict[int, AskResult | BaseException] = {}

    def take(place: int, _question: Question, outcome: AskResult | TeleragError) -> None:
        outcomes[place] = outcome

    asked = [Question(str(place), text) for place, text in enumerate(questions)]
    await answer_each(workers, scheduler, asked, take)
    return [outcomes[place] for place in range(len(questions))]


def turn_of(
    system: str, work: Work, outcomes: Sequence[AskResult | BaseException], took_s: float, pages_left: float = 0.0
) -> SystemTurn:
    """Return what came of a turn; raise an outcome that is a bug."""
    answers = [outcome for outcome in outcomes if isinstance(outcome, AskResult)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for outcome in failed:
        if not isinstance(outcome, TeleragError):
            raise outcome
    return SystemTurn(system, work, 1e3 * took_s, answers, list(map(str, failed)), pages_left)


def ttft_ms(answered: AskResult) -> float:
    """From the question until the answer's first token: what comes before the last text, its waiting and its prompt."""
    last = answered.stages[-1]
    before_s = answered.timings["total_s"] - last.took_s
    return 1e3 * (before_s + last.generation.queue_s + last.generation.prefill_s)


def stages_ms(answered: AskResult) -> dict[str, float]:
    """Milliseconds of each stage in the order in which they first ran, with retrieval before the last."""
    stages = {
        name.removesuffix("_s"): 1e3 * value for name, value in answered.timings.items() if name not in UNMEASURED
    }
    stages.setdefault("retrieval", 0.0)
    names = [name for name in dict.fromkeys(stage.name for stage in answered.stages) if name in stages]
    names[-1:-1] = ["retrieval"]
    return {name: stages[name] for name in names}


def cell(system: str, key: Key, turns: Sequence[SystemTurn], *, detailed: bool) -> Cell:
    """Return what one system did at one place of a suite."""
    answers = [answered for turn in turns for answered in turn.answers]
    wall_s = sum(turn.wall_ms for turn in turns) / 1e3
    tokens = sum(stage.generation.completion_tokens for answered in answers for stage in answered.stages)
    values: dict[str, object] = {
        "completed": len(answers),
        "failed": sum(len(turn.errors) for turn in turns),
        "duration": short(wall_s),
        "request_throughput": short(len(answers) / wall_s),
        "output_throughput": short(tokens / wall_s),
        **summary("e2el_ms", [value for turn in turns for value in turn.times_ms("total")]),
        **summary("ttft_ms", [ttft_ms(answered) for answered in answers if answered.stages]),
        **summary("retrieval_ms", [value for turn in turns for value in turn.times_ms("retrieval")]),
        **summary("join_ms", [value for turn in turns for value in turn.times_ms("join")]),
    }
    if answers:
        stages = [stages_ms(answered) for answered in answers]
        names = dict.fromkeys(name for each in stages for name in each)
        values["mean_stage_ms"] = {
            name: short(sum(each.get(name, 0.0) for each in stages) / len(stages)) for name in names
        }
    joins = [join for answered in answers for join in answered.joins]
    if wanted := sum(join.lists_wanted for join in joins):
        values["hit_share"] = short(sum(join.lists_hit for join in joins) / wanted)
        for name in ("bytes_wanted", "bytes_moved", "bytes_missed"):
            values[name] = sum(getattr(join, name) for join in joins) // len(answers)
        values["lists_in_place"] = sum(join.lists_in_place for join in joins)
    if errors := [error for turn in turns for error in turn.errors]:
        values["first_error"] = errors[0]
    kept = [_detail(turn, answered) for turn in turns for answered in turn.answers] if detailed else []
    return Cell(system, key, values, kept)


def _detail(turn: SystemTurn, answered: AskResult) -> dict[str, object]:
    return {
        "questions": list(turn.work.questions),
        "repeat": turn.work.number,
        "e2el_ms": short(1e3 * answered.timings["total_s"]),
        "ttft_ms": short(ttft_ms(answered)),
        "stage_ms": {name: short(value) for name, value in stages_ms(answered).items()},
        "join_ms": short(1e3 * answered.timings.get("join_s", 0.0)),
        "pages_left": short(turn.pages_left),
        "lists_hit": sum(join.lists_hit for join in answered.joins),
        "lists_wanted": sum(join.lists_wanted for join in answered.joins),
        "answer": answered.answer,
        "passages": [hit.passage.id for hit in answered.found],
    }


def cells(turns: Sequence[SystemTurn], *, detailed: bool) -> list[Cell]:
    """Return a cell for each key, in the order in which they were measured, and each system, in that of their names."""
    groups: dict[tuple[int, str], list[SystemTurn]] = {}
    keys = _keys(turns)
    for turn in turns:
        groups.setdefault((keys.index(turn.work.key), turn.system), []).append(turn)
    known = [*SystemName, *(turn.system for turn in turns)]
    order = sorted(groups, key=lambda group: (group[0], known.index(group[1])))
    return [cell(system, keys[place], groups[place, system], detailed=detailed) for place, system in order]


def _keys(turns: Sequence[SystemTurn]) -> list[Key]:
    return [dict(key) for key in dict.fromkeys(tuple(turn.work.key.items()) for turn in turns)]


def comparisons(systems: Sequence[SystemName]) -> list[tuple[SystemName, SystemName]]:
    """Return which systems are divided by which: the baseline by all others, and what is in `COMPARED`."""
    baseline = next((name for name in BASELINES if name in systems), systems[0])
    pairs = [(baseline, name) for name in systems if name is not baseline]
    return list(dict.fromkeys([*pairs, *(pair for pair in COMPARED if set(pair) <= set(systems))]))


def ratios(
    turns: Sequence[SystemTurn], systems: Sequence[SystemName], metrics: Sequence[str], seed: int
) -> list[Ratio]:
    """Return every comparison, for each key."""
    return [
        ratio(key, over, under, metric, _pairs(turns, key, over, under, metric), seed=seed)
        for key in _keys(turns)
        for metric in metrics
        for over, under in comparisons(systems)
        if not (metric == "retrieval_ms" and SystemName.LLM_ONLY in (over, under))
    ]


def mean_ratios(
    turns: Sequence[SystemTurn], systems: Sequence[SystemName], keys: Sequence[Key], label: Key, seed: int
) -> list[Ratio]:
    """Return every comparison end to end, as the mean over some keys."""
    return [
        mean_ratio(
            label, over, under, "e2el_ms", [_pairs(turns, key, over, under, "e2el_ms") for key in keys], seed=seed
        )
        for over, under in comparisons(systems)
    ]


def _pairs(
    turns: Sequence[SystemTurn], key: Key, over: SystemName, under: SystemName, metric: str
) -> list[tuple[float, float]]:
    """Return a metric of two systems' complete turns at the same works."""
    found: dict[str, dict[object, float]] = {over: {}, under: {}}
    for turn in turns:
        if turn.system in found and turn.work.key == key and not turn.errors:
            name = "total" if metric == "e2el_ms" else "retrieval"
            value = turn.wall_ms if metric == "wall_ms" else sum(turn.times_ms(name))
            if value > 0:  # a pipeline may decide not to retrieve
                found[turn.system][turn.work.place] = value
    return [(found[over][work], found[under][work]) for work in found[over] if work in found[under]]


def checks(turns: Sequence[SystemTurn], pages: Pages) -> list[Check]:
    """Check that all systems found and wrote the same, and that cold was cold."""
    works: dict[object, list[SystemTurn]] = {}
    for turn in turns:
        works.setdefault(turn.work.place, []).append(turn)
    whole = [some for some in works.values() if not any(turn.errors for turn in some)]
    result = []
    for what, of in (("answers", SystemTurn.texts), ("passages", SystemTurn.passages)):
        same = sum(len({of(turn) for turn in some}) == 1 for some in whole)
        says = f"{same} of {len(works)} works have the same {what} by all."
        result.append(Check(f"same {what}", same == len(works), says))
    failed, asked = sum(len(turn.errors) for turn in turns), sum(len(turn.work.questions) for turn in turns)
    result.append(Check("all completed", failed == 0, f"{failed} of {asked} questions failed."))
    readers = [turn.pages_left for turn in turns if turn.system not in NEVER_COLD] or [0.0]
    if pages is Pages.COLD:
        says = f"At most {max(readers):.2%} of lists.bin was in the page cache when a question came, for any system."
        result.append(Check("cold", max(readers) <= 0.01, says))
    else:
        says = f"At least {min(readers):.1%} of lists.bin was in the page cache when a question came, for every system."
        result.append(Check("warm", min(readers) >= 0.95, says))
    return result
