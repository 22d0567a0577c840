"""The suites that answer questions: each is a list of works, and what is made of the turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from telerag_cli.bench import measure, page_cache
from telerag_cli.bench.measure import SystemTurn, Work, take_turns
from telerag_cli.bench.results import Cell, Check, Key, Ratio
from telerag_cli.bench.suites import Pages, SuiteName, SystemName
from telerag_cli.bench.systems import Harness, Perfect, Setup, System
from telerag_cli.config import PipelineName
from telerag_cli.engine.engine import AskResult
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.pipelines.base import Pipeline

GENERATING_FIRST = (
    PipelineName.HYDE,
    PipelineName.SUBQUESTION,
    PipelineName.ITERATIVE,
    PipelineName.ITER_RETGEN,
    PipelineName.FLARE,
)
"""Pipelines whose queries are written by the LLM: those that lookahead by the text so far is for."""
MEAN = "mean of those that retrieve after generating"
DROPPED = "Cold: " + page_cache.HOW + " Arenas are emptied, and the LLM forgets its prompts."
KEPT = "Warm: the index file is read once before, and what page cache and arenas hold stays from question to question."


@dataclass(frozen=True)
class Ask:
    """What the user asked of a suite."""

    setup: Setup
    systems: tuple[SystemName, ...]
    questions: Mapping[str, Sequence[str]]
    """By dataset; the first ``num_warmups`` are for warming up only."""
    pipelines: Sequence[Pipeline]
    num_warmups: int
    repeats: int
    seed: int
    detailed: bool
    counting: Callable[[str, int], Any]
    """Opens a display of so many turns; see `console.progress`."""


@dataclass(frozen=True)
class Outcome:
    """What a suite found."""

    systems: dict[str, dict[str, Any]]
    cells: list[Cell]
    ratios: list[Ratio]
    checks: list[Check]
    notes: list[str]


def latency(ask: Ask, pages: Sequence[Pages]) -> Outcome:
    """One question at a time: pipelines x datasets, from cold, or warm."""
    parts = []
    for state in pages:
        works = _one_by_one(ask, ("pipeline", "dataset"), pages=state.value)
        turns, systems = _turns(ask, replace(ask.setup, pages=state), works)
        parts.append(
            Outcome(
                systems,
                measure.cells(turns, detailed=ask.detailed),
                measure.ratios(turns, ask.systems, ("e2el_ms", "retrieval_ms"), ask.seed) + _means(ask, turns, state),
                measure.checks(turns, state),
                [DROPPED if state is Pages.COLD else KEPT],
            )
        )
    return _joined(parts)


def _means(ask: Ask, turns: Sequence[SystemTurn], state: Pages) -> list[Ratio]:
    """For each dataset, over the pipelines that retrieve after generating, if there are several."""
    names = [each.name for each in ask.pipelines if each.name in GENERATING_FIRST]
    found = []
    for dataset in ask.questions if len(names) > 1 else ():
        keys: list[Key] = [{"pipeline": name, "dataset": dataset, "pages": state.value} for name in names]
        label = {"pipeline": MEAN, "dataset": dataset, "pages": state.value}
        found += measure.mean_ratios(turns, ask.systems, keys, label, ask.seed)
    return found


def breakdown(ask: Ask) -> Outcome:
    """Where the time of a question goes, by pipeline and system."""
    return _simple(ask, _one_by_one(ask, ("pipeline",)), ())


def nprobe(ask: Ask, values: Sequence[int]) -> Outcome:
    """One question at a time, by lists probed."""
    parts = []
    for value in values:
        config = replace(ask.setup.config, nprobe=value)
        probing = replace(ask, setup=replace(ask.setup, config=config))
        parts.append(_simple(probing, _one_by_one(ask, (), nprobe=value), ("e2el_ms", "retrieval_ms")))
    return _joined(parts)


def throughput(ask: Ask, sizes: Sequence[int], at_once: int) -> Outcome:
    """So many questions given together: how many a second are answered. Every turn has other questions."""
    works = []
    for size in sizes:
        for pipeline in ask.pipelines:
            supply = itertools.cycle(questions_of(ask))
            works += [
                Work({"batch_size": size}, pipeline, tuple(itertools.islice(supply, size)), number, at_once=at_once)
                for number in range(ask.repeats)
            ]
    return _simple(ask, works, ("wall_ms",))


def hit_rate(ask: Ask, budgets: Sequence[float]) -> Outcome:
    """Share of the probed lists that are in fast memory at the join, by bytes that lookahead may move.

    Budgets are multiples of the bytes that the question's retrieval probes. Nothing after the join is measured, so
    answers are cut to one token.

    Raises:
        UsageError: the pipeline retrieves more than once, or nothing is predicted for it.
    """
    ask = replace(ask, setup=replace(ask.setup, pages=Pages.COLD, config=replace(ask.setup.config, max_tokens=1)))
    pipeline, *others = ask.pipelines
    if others:
        raise UsageError(
            f"hit-rate is for one pipeline and {len(ask.pipelines)} are named.", remedy="Name one with --pipeline."
        )
    questions = questions_of(ask)
    with (
        Harness.open(ask.setup, (SystemName.FETCH, *ask.systems)) as rig,
        ask.counting("hit-rate", len(questions) * (1 + len(budgets) * len(ask.systems)) + ask.num_warmups) as advance,
    ):
        first = [Work({}, pipeline, (question,)) for question in questions]
        known = take_turns(rig, first, (SystemName.FETCH,), warmups_of(ask), advance)
        works = [
            Work(
                {"budget": budget},
                pipeline,
                turn.work.questions,
                prepare=partial(_limit, rig, only_retrieval(turn, SuiteName.HIT_RATE), budget),
            )
            for turn in known
            for budget in budgets
        ]
        turns = take_turns(rig, works, ask.systems, (), advance)
        systems = {system.value: rig.systems[system].configuration for system in ask.systems}
    notes = [
        DROPPED,
        "Answers are cut to one token: nothing after the join is measured.",
        "budget: bytes that lookahead may move, as a multiple of the bytes that the question's retrieval "
        "probes; what there is no time for is not moved whatever the budget.",
    ]
    turns.sort(key=lambda turn: turn.work.key["budget"])
    return Outcome(systems, measure.cells(turns, detailed=ask.detailed), [], measure.checks(turns, Pages.COLD), notes)


def only_retrieval(turn: SystemTurn, suite: SuiteName) -> AskResult:
    """The answer of a turn that wrote, then retrieved once.

    Raises:
        TeleragError: it could not be answered.
        UsageError: it retrieved more than once, or the pipeline writes nothing before.
    """
    if turn.errors:
        raise TeleragError(f"'{turn.work.questions[0]:.60}' cannot be answered: {turn.errors[0]}")
    answered, name = turn.answers[0], turn.work.pipeline.name
    if len(answered.retrievals) != 1 or name == PipelineName.NAIVE:
        raise UsageError(
            f"{suite} is for pipelines that write, then retrieve once, "
            f"and {name} has {len(answered.retrievals)} retrievals.",
            remedy="Use --pipeline hyde, subquestion or self_rag.",
        )
    return answered


def _limit(rig: Harness, answered: AskResult, budget: float, system: System) -> None:
    """Let lookahead move so much, and tell the one that knows the query what it will be."""
    assert system.retriever is not None
    system.retriever.budget_bytes = round(budget * answered.joins[0].bytes_wanted)
    if isinstance(system.retriever, Perfect):
        system.retriever.known = rig.setup.opened.embedder.encode_queries(answered.retrievals[0].queries)


def _simple(ask: Ask, works: Sequence[Work], metrics: Sequence[str]) -> Outcome:
    """Works as they are, from the state of the pages that was asked for."""
    turns, systems = _turns(ask, ask.setup, works)
    state = ask.setup.pages
    return Outcome(
        systems,
        measure.cells(turns, detailed=ask.detailed),
        measure.ratios(turns, ask.systems, metrics, ask.seed),
        measure.checks(turns, state),
        [DROPPED if state is Pages.COLD else KEPT],
    )


def _turns(ask: Ask, setup: Setup, works: Sequence[Work]) -> tuple[list[SystemTurn], dict[str, dict[str, Any]]]:
    with Harness.open(setup, ask.systems) as rig:
        if setup.pages is Pages.WARM:
            rig.warm()
        warmups = warmups_of(ask)
        with ask.counting("turns", (len(works) + len(warmups)) * len(ask.systems)) as advance:
            turns = take_turns(rig, works, ask.systems, warmups, advance)
        return turns, {name.value: system.configuration for name, system in rig.systems.items()}


def warmups_of(ask: Ask) -> list[Work]:
    """The first questions, by the first pipeline: models, threads and pages of the arena."""
    pipeline = ask.pipelines[0]
    questions = next(iter(ask.questions.values()))[: ask.num_warmups]
    return [Work({}, pipeline, (question,)) for question in questions]


def _measured(ask: Ask) -> Iterator[tuple[str, Sequence[str]]]:
    """Each dataset's questions, without those for warming up."""
    for dataset, questions in ask.questions.items():
        yield dataset, questions[ask.num_warmups :]


def questions_of(ask: Ask) -> list[str]:
    """Those of all datasets."""
    return [question for _dataset, questions in _measured(ask) for question in questions]


def _one_by_one(ask: Ask, axes: Sequence[str], **fixed: Any) -> list[Work]:
    """Every question alone, by every pipeline, as often as is asked for.

    Args:
        ask: what was asked.
        axes: which of ``pipeline`` and ``dataset`` tell the works apart.
        fixed: the key's other entries.
    """
    works = []
    for dataset, questions in _measured(ask):
        for pipeline in ask.pipelines:
            place = {"pipeline": pipeline.name, "dataset": dataset}
            key = {axis: place[axis] for axis in axes} | fixed
            works += [
                Work(key, pipeline, (question,), number) for number in range(ask.repeats) for question in questions
            ]
    return works


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """Parts of one suite, one after the other."""
    systems = {name: configuration for part in parts for name, configuration in part.systems.items()}
    checks: dict[str, Check] = {}
    for check in itertools.chain.from_iterable(part.checks for part in parts):
        before = checks.get(check.name)
        if before and before.says != check.says:
            check = Check(check.name, check.held and before.held, f"{before.says} {check.says}")
        checks[check.name] = check
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return Outcome(
        systems,
        [cell for part in parts for cell in part.cells],
        [each for part in parts for each in part.ratios],
        list(checks.values()),
        notes,
    )
