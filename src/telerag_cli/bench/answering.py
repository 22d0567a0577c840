"""The suites that answer questions: each is a list of works, and what is made of the turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from telerag_cli.bench import measure, page_cache
from telerag_cli.bench.measure import SystemTurn, Work, take_turns
from telerag_cli.bench.results import Check, Key, Outcome, Ratio
from telerag_cli.bench.suites import Pages, SuiteName, SystemName
from telerag_cli.bench.systems import Harness, Perfect, Setup, System
from telerag_cli.config import EngineConfig, PipelineName
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.opening import OpenedIndex
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.files import checksum
from telerag_cli.pipelines.base import Pipeline

GENERATING_FIRST = (
    PipelineName.HYDE,
    PipelineName.SUBQUESTION,
    PipelineName.ITERATIVE,
    PipelineName.ITER_RETGEN,
    PipelineName.FLARE,
)
"""Pipelines whose queries are written by the LLM: those that lookahead by the text so far is for."""
WHOLE_AND_RETRIEVAL = ("e2el_ms", "retrieval_ms")
MEAN = "mean of those that retrieve after generating"
STATES = {
    Pages.COLD: f"Cold: {page_cache.HOW} Arenas are emptied, and the LLM forgets its prompts.",
    Pages.WARM: "Warm: the index file is read once before, and what page cache and arenas hold stays from question to "
    "question.",
}


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

    @property
    def warmups(self) -> list[Work]:
        """The first questions, by the first pipeline: for models, threads and pages of the arena."""
        questions = next(iter(self.questions.values()))[: self.num_warmups]
        return [Work({}, self.pipelines[0], (question,)) for question in questions]

    @property
    def measured(self) -> list[str]:
        """The questions of all datasets, without those for warming up."""
        return [question for questions in self.questions.values() for question in questions[self.num_warmups :]]

    def only_pipeline(self, suite: SuiteName) -> Pipeline:
        """Return the pipeline of a suite that takes one; raises UsageError if several are named."""
        pipeline, *others = self.pipelines
        if others:
            raise UsageError(
                f"{suite} is for one pipeline and {len(self.pipelines)} are named.", remedy="Name one with --pipeline."
            )
        return pipeline


def settings_of(opened: OpenedIndex, config: EngineConfig, llm: str, **extent: Any) -> dict[str, Any]:
    """Return what was the same for all systems; ``extent`` is how much was asked, by the names of results."""
    index, trace = opened.index, config.replay
    manifest = index.manifest
    return {
        "index": {
            "name": index.paths.root.name,
            "lists_bytes": int(index.list_bytes.sum()),
            "ntotal": manifest.ntotal,
            "nlist": manifest.nlist,
            "dimension": manifest.dimension,
            "storage": manifest.storage.value,
            "metric": manifest.metric.value,
        },
        "llm": llm,
        "generation": "real" if trace is None else f"replayed from {trace.name} ({checksum(trace)})",
        "embedder": opened.embedder.info.model,
        **extent,
        "k": config.k,
        "nprobe": config.nprobe,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "fast_memory_bytes": config.fast_memory_bytes,
    }


def latency(ask: Ask, pages: Sequence[Pages]) -> Outcome:
    """One question at a time: pipelines x datasets, from cold, or warm."""
    parts = []
    for state in pages:
        works = _one_by_one(ask, ("pipeline", "dataset"), pages=state.value)
        turns, outcome = _measured(replace(ask, setup=replace(ask.setup, pages=state)), works, WHOLE_AND_RETRIEVAL)
        outcome.ratios.extend(_means(ask, turns, state))
        parts.append(outcome)
    return _joined(parts)


def _means(ask: Ask, turns: Sequence[SystemTurn], state: Pages) -> list[Ratio]:
    """For each dataset, over the pipelines that retrieve after generating, if there are several."""
    names = [each.name for each in ask.pipelines if each.name in GENERATING_FIRST]
    found = []
    for dataset in ask.questions if len(names) > 1 else ():
        keys: list[Key] = [{"pipeline": name, "dataset": dataset, "pages": state.value} for name in names]
        found += measure.mean_ratios(turns, ask.systems, keys, keys[0] | {"pipeline": MEAN}, ask.seed)
    return found


def breakdown(ask: Ask) -> Outcome:
    """Where the time of a question goes, by pipeline and system."""
    return _measured(ask, _one_by_one(ask, ("pipeline",)), ())[1]


def nprobe(ask: Ask, values: Sequence[int]) -> Outcome:
    """One question at a time, by lists probed."""
    parts = []
    for value in values:
        setup = replace(ask.setup, config=replace(ask.setup.config, nprobe=value))
        works = _one_by_one(ask, (), nprobe=value)
        parts.append(_measured(replace(ask, setup=setup), works, WHOLE_AND_RETRIEVAL)[1])
    return _joined(parts)


def throughput(ask: Ask, sizes: Sequence[int], at_once: int) -> Outcome:
    """So many questions given together: how many a second are answered. Every turn has other questions."""
    works = []
    for size in sizes:
        for pipeline in ask.pipelines:
            supply = itertools.cycle(ask.measured)
            works += [
                Work({"batch_size": size}, pipeline, tuple(itertools.islice(supply, size)), number, at_once=at_once)
                for number in range(ask.repeats)
            ]
    return _measured(ask, works, ("wall_ms",))[1]


def hit_rate(ask: Ask, budgets: Sequence[float]) -> Outcome:
    """Share of the probed lists that are in fast memory at the join, by bytes that lookahead may move.

    Budgets are multiples of the bytes that the question's retrieval probes. Nothing after the join is measured, so
    answers are cut to one token.

    Raises:
        UsageError: the pipeline retrieves more than once, or nothing is predicted for it.
    """
    pipeline = ask.only_pipeline(SuiteName.HIT_RATE)
    setup = replace(ask.setup, pages=Pages.COLD, config=replace(ask.setup.config, max_tokens=1))
    total = len(ask.measured) * (1 + len(budgets) * len(ask.systems)) + ask.num_warmups
    with Harness.open(setup, (SystemName.FETCH, *ask.systems)) as rig, ask.counting("hit-rate", total) as advance:
        first = [Work({}, pipeline, (question,)) for question in ask.measured]
        known = take_turns(rig, first, (SystemName.FETCH,), ask.warmups, advance)
        works = [
            Work({"budget": budget}, pipeline, turn.work.questions, prepare=partial(_limit, rig, answered, budget))
            for turn in known
            for answered in [only_retrieval(turn, SuiteName.HIT_RATE)]
            for budget in budgets
        ]
        turns = take_turns(rig, works, ask.systems, (), advance)
        systems = {system.value: rig.systems[system].configuration for system in ask.systems}
    notes = [
        STATES[Pages.COLD],
        "Answers are cut to one token: nothing after the join is measured.",
        "budget: bytes that lookahead may move, as a multiple of the bytes that the question's retrieval "
        "probes; what there is no time for is not moved whatever the budget.",
    ]
    turns.sort(key=lambda turn: turn.work.key["budget"])
    return Outcome(systems, measure.cells(turns, detailed=ask.detailed), [], measure.checks(turns, Pages.COLD), notes)


def only_retrieval(turn: SystemTurn, suite: SuiteName) -> AskResult:
    """Return the answer of a turn that wrote, then retrieved once.

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
    """Let lookahead move so much, and give the system that knows the query what it will be."""
    assert system.retriever is not None
    system.retriever.budget_bytes = round(budget * answered.joins[0].bytes_wanted)
    if isinstance(system.retriever, Perfect):
        system.retriever.known = rig.setup.opened.embedder.encode_queries(answered.retrievals[0].queries)


def _measured(ask: Ask, works: Sequence[Work], metrics: Sequence[str]) -> tuple[list[SystemTurn], Outcome]:
    """Have all systems do the works, and compare them by some metrics."""
    state = ask.setup.pages
    with Harness.open(ask.setup, ask.systems) as rig:
        if state is Pages.WARM:
            rig.warm()
        with ask.counting("turns", (len(works) + len(ask.warmups)) * len(ask.systems)) as advance:
            turns = take_turns(rig, works, ask.systems, ask.warmups, advance)
        systems = {name.value: system.configuration for name, system in rig.systems.items()}
    cells = measure.cells(turns, detailed=ask.detailed)
    ratios = measure.ratios(turns, ask.systems, metrics, ask.seed)
    return turns, Outcome(systems, cells, ratios, measure.checks(turns, state), [STATES[state]])


def _one_by_one(ask: Ask, axes: Sequence[str], **fixed: Any) -> list[Work]:
    """Every question alone, by every pipeline, as often as is asked for.

    ``axes`` says which of ``pipeline`` and ``dataset`` tell the works apart, and ``fixed`` is the rest of their key.
    """
    works = []
    for dataset, questions in ask.questions.items():
        for pipeline in ask.pipelines:
            place = {"pipeline": pipeline.name, "dataset": dataset}
            key = {axis: place[axis] for axis in axes} | fixed
            works += [
                Work(key, pipeline, (question,), number)
                for number in range(ask.repeats)
                for question in questions[ask.num_warmups :]
            ]
    return works


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """Parts of one suite, one after the other."""
    whole = Outcome({}, [])
    checks: dict[str, Check] = {}
    for part in parts:
        whole.systems.update(part.systems)
        whole.cells.extend(part.cells)
        whole.ratios.extend(part.ratios)
        whole.notes.extend(note for note in part.notes if note not in whole.notes)
        for check in part.checks:
            before = checks.get(check.name)
            if before and before.says != check.says:
                check = Check(check.name, check.held and before.held, f"{before.says} {check.says}")
            checks[check.name] = check
    whole.checks.extend(checks.values())
    return whole
