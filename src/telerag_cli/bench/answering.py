"""The suites that answer questions: each is a list of works, and what is made of the turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from telerag_cli.bench import measure, page_cache
from telerag_cli.bench.measure import Turn, Work, take_turns
from telerag_cli.bench.results import Cell, Check, Key, Ratio
from telerag_cli.bench.statistics import ratio, short, summary
from telerag_cli.bench.suites import Pages, SystemName
from telerag_cli.bench.systems import Perfect, Rig, Setup, System
from telerag_cli.config import CacheKind, format_bytes
from telerag_cli.engine.assemble import open_retriever
from telerag_cli.engine.engine import Answered
from telerag_cli.engine.placement import plan_tier
from telerag_cli.errors import ResourceError, TeleragError, UsageError
from telerag_cli.index.artifact import FloatArray
from telerag_cli.lookahead.retriever import JoinReport, Retriever
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.registry import PipelineName
from telerag_cli.tiers.transport import available_bytes

GENERATING_FIRST = (
    PipelineName.HYDE, PipelineName.SUBQUESTION, PipelineName.ITERATIVE, PipelineName.ITER_RETGEN, PipelineName.FLARE,
)  # fmt: skip
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
    pipelines: Mapping[PipelineName, Pipeline]
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
        parts.append(Outcome(
            systems, measure.cells(turns, detailed=ask.detailed),
            measure.ratios(turns, ask.systems, ("e2el_ms", "retrieval_ms"), ask.seed) + _means(ask, turns, state),
            measure.checks(turns, state), [DROPPED if state is Pages.COLD else KEPT],
        ))  # fmt: skip
    return _joined(parts)


def _means(ask: Ask, turns: Sequence[Turn], state: Pages) -> list[Ratio]:
    """For each dataset, over the pipelines that retrieve after generating, if there are several."""
    names = [name.value for name in ask.pipelines if name in GENERATING_FIRST]
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
        settings = replace(ask.setup.settings, nprobe=value)
        probing = replace(ask, setup=replace(ask.setup, settings=settings))
        parts.append(
            _simple(
                probing,
                _one_by_one(ask, (), nprobe=value),
                ("e2el_ms", "retrieval_ms"),
            )
        )
    return _joined(parts)


def throughput(ask: Ask, sizes: Sequence[int]) -> Outcome:
    """So many questions at once: how many a second are answered. Every turn has other questions."""
    works = []
    for size in sizes:
        for name, pipeline in ask.pipelines.items():
            supply = itertools.cycle(_questions(ask))
            works += [Work({"batch_size": size}, pipeline, name.value, tuple(itertools.islice(supply, size)), number)
                      for number in range(ask.repeats)]  # fmt: skip
    return _simple(ask, works, ("wall_ms",))


def hit_rate(ask: Ask, budgets: Sequence[float]) -> Outcome:
    """Share of the probed lists that are in fast memory at the join, by bytes that lookahead may move.

    Budgets are multiples of the bytes that the question's retrieval probes. Nothing after the join is measured, so answers
    are cut to one token.

    Raises:
        UsageError: the pipeline retrieves more than once, or nothing is predicted for it.
    """
    ask = replace(
        ask, setup=replace(ask.setup, pages=Pages.COLD, settings=replace(ask.setup.settings, max_tokens=1))
    )
    (name, pipeline), *others = ask.pipelines.items()
    if others:
        raise UsageError(
            f"hit-rate is for one pipeline and {len(ask.pipelines)} are named.",
            remedy="Name one with --pipeline.",
        )
    questions = _questions(ask)
    with Rig.open(ask.setup, (SystemName.FETCH, *ask.systems)) as rig, ask.counting(
        "hit-rate", len(questions) * (1 + len(budgets) * len(ask.systems)) + ask.num_warmups
    ) as advance:  # fmt: skip
        first = [Work({}, pipeline, name.value, (question,)) for question in questions]
        known = take_turns(rig, first, (SystemName.FETCH,), _warmups(ask), advance)
        works = [
            Work({"budget": budget}, pipeline, name.value, turn.work.questions, prepare=partial(_limit, rig, _only(turn, name), budget))
            for turn in known for budget in budgets
        ]  # fmt: skip
        turns = take_turns(rig, works, ask.systems, (), advance)
        systems = {system.value: rig.systems[system].configuration for system in ask.systems}
    notes = [
        DROPPED,
        "Answers are cut to one token: nothing after the join is measured.",
        "budget: bytes that lookahead may move, as a multiple of the bytes that the question's retrieval probes; what there is no time for "
        "is not moved whatever the budget.",
    ]  # fmt: skip
    turns.sort(key=lambda turn: turn.work.key["budget"])
    return Outcome(
        systems, measure.cells(turns, detailed=ask.detailed), [], measure.checks(turns, Pages.COLD), notes
    )


def _only(turn: Turn, name: PipelineName) -> Answered:
    """The answer of a turn, if it retrieved once."""
    if turn.errors:
        raise TeleragError(f"'{turn.work.questions[0]:.60}' cannot be answered: {turn.errors[0]}")
    answered = turn.answers[0]
    if len(answered.retrievals) != 1 or name is PipelineName.NAIVE:
        raise UsageError(f"hit-rate is for pipelines that write, then retrieve once, and {name} has {len(answered.retrievals)} retrievals.",
                         remedy="Use --pipeline hyde, subquestion or self_rag.")  # fmt: skip
    return answered


def _limit(rig: Rig, answered: Answered, budget: float, system: System) -> None:
    """Let lookahead move so much, and tell the one that knows the query what it will be."""
    assert system.retriever is not None
    system.retriever.budget_bytes = round(budget * answered.joins[0].bytes_wanted)
    if isinstance(system.retriever, Perfect):
        system.retriever.known = rig.setup.opened.embedder.encode_queries(answered.retrievals[0].queries)


@dataclass(frozen=True)
class _Cached:
    """A cache policy and its share, with an arena of its own."""

    policy: CacheKind
    fraction: float
    retriever: Retriever


def cache(
    ask: Ask, policies: Sequence[CacheKind], fractions: Sequence[float], budget: float, window_s: float | None
) -> Outcome:
    """Retrievals one after the other over arenas that are never emptied, by policy and by the share kept for hot lists.

    The LLM writes each question's texts once; then every policy has the same questions, the same queries, and the same time
    between them. Lookahead is by the question, and may move ``budget`` times the bytes probed.

    Raises:
        ResourceError: the arenas do not fit the memory together.
    """
    setup = replace(ask.setup, pages=Pages.COLD, settings=replace(ask.setup.settings, max_tokens=1))
    name, pipeline = next(iter(ask.pipelines.items()))
    questions = _questions(ask)
    # Only hotness keeps lists by a share; the others are measured once.
    wanted = [
        (policy, fraction)
        for policy in policies
        for fraction in (fractions if policy is CacheKind.HOTNESS else fractions[:1])
    ]
    with (
        ask.counting("cache", len(questions) * (1 + len(wanted)) + ask.num_warmups) as advance,
        ExitStack() as undo,
    ):
        with Rig.open(setup, (SystemName.FETCH,)) as rig:
            works = [Work({}, pipeline, name.value, (question,)) for question in questions]
            known = [
                _only(turn, name)
                for turn in take_turns(rig, works, (SystemName.FETCH,), _warmups(ask), advance)
            ]
        if window_s is None:
            window_s = statistics.median(
                answered.timings["llm_s"] - answered.stages[-1].took_s for answered in known
            )
        plans = [
            plan_tier(setup.opened.index, replace(setup.tier, cache=policy)) for policy, _fraction in wanted
        ]
        if (needed := sum(plan.ram_bytes for plan in plans)) > (free := available_bytes()):
            raise ResourceError(f"{len(plans)} arenas take {format_bytes(needed)} and {format_bytes(free)} are free.",
                                remedy="Lower --fast-memory, or name fewer --cache-fraction.")  # fmt: skip
        arenas = []
        for (policy, fraction), plan in zip(wanted, plans, strict=True):
            base = undo.enter_context(closing(open_retriever(setup.opened.index, plan)))
            arenas.append(
                _Cached(
                    policy, fraction, Retriever(base.index, rig.coarse(), base.tier, cache_fraction=fraction)
                )
            )
        reports: dict[tuple[str, float], list[JoinReport]] = {}
        embedder = setup.opened.embedder
        for number, (question, answered) in enumerate(zip(questions, known, strict=True)):
            ahead, query = (
                embedder.encode_queries([question]),
                embedder.encode_queries(answered.retrievals[0].queries),
            )
            page_cache.drop(setup.opened.index.paths.lists)
            for each in arenas[number % len(arenas) :] + arenas[: number % len(arenas)]:
                each.retriever.budget_bytes = round(budget * answered.joins[0].bytes_wanted)
                report = _retrieve(each.retriever, ahead, query, setup, window_s)
                reports.setdefault((each.policy.value, each.fraction), []).append(report)
                advance(1)
        configurations = {
            each.policy.value: {"what": f"telerag, cache policy {each.policy.value}", "lookahead": "question", "tier": plan.name,
                                "arena_bytes": each.retriever.tier.arena_bytes, "budget": budget, "window_s": round(window_s, 3)}
            for each, plan in zip(arenas, plans, strict=True)
        }  # fmt: skip
    cells = [
        Cell(policy, {"cache_fraction": fraction}, _joins(found))
        for (policy, fraction), found in reports.items()
    ]
    notes = [
        f"Retrievals alone: {window_s:.2f} s for lookahead before each, without the LLM, which wrote the texts before. Arenas start empty "
        "and are never emptied; what each holds is what its policy kept.",
        "cache_fraction has a meaning for hotness only; the others were measured once.",
    ]  # fmt: skip
    return Outcome(configurations, cells, list(_cache_ratios(reports, ask.seed)), [], notes)


def _retrieve(
    retriever: Retriever, ahead: FloatArray, query: FloatArray, setup: Setup, window_s: float
) -> JoinReport:
    nprobe = setup.settings.nprobe
    begun = retriever.begin(ahead, nprobe)
    time.sleep(window_s)
    return retriever.search(query, setup.settings.k, nprobe, begun).report


def _joins(reports: Sequence[JoinReport]) -> dict[str, Any]:
    wanted = sum(report.lists_wanted for report in reports)
    return {
        "completed": len(reports),
        **summary("join_ms", [1e3 * report.join_s for report in reports]),
        "hit_share": short(sum(report.lists_hit for report in reports) / wanted) if wanted else 0.0,
        "bytes_wanted": sum(report.bytes_wanted for report in reports) // len(reports),
        "bytes_moved": sum(report.bytes_moved for report in reports) // len(reports),
        "bytes_missed": sum(report.bytes_missed for report in reports) // len(reports),
    }


def _cache_ratios(reports: Mapping[tuple[str, float], Sequence[JoinReport]], seed: int) -> Iterator[Ratio]:
    """No cache by each policy, question by question."""
    none = next(
        (found for (policy, _fraction), found in reports.items() if policy == CacheKind.NONE.value), []
    )
    for (policy, fraction), found in reports.items():
        if none and policy != CacheKind.NONE.value:
            pairs = [(one.join_s, other.join_s) for one, other in zip(none, found, strict=True)]
            yield ratio(
                {"cache_fraction": fraction}, CacheKind.NONE.value, policy, "join_ms", pairs, seed=seed
            )


def _simple(ask: Ask, works: Sequence[Work], metrics: Sequence[str]) -> Outcome:
    """Works as they are, from the state of the pages that was asked for."""
    turns, systems = _turns(ask, ask.setup, works)
    state = ask.setup.pages
    return Outcome(systems, measure.cells(turns, detailed=ask.detailed), measure.ratios(turns, ask.systems, metrics, ask.seed),
                   measure.checks(turns, state), [DROPPED if state is Pages.COLD else KEPT])  # fmt: skip


def _turns(ask: Ask, setup: Setup, works: Sequence[Work]) -> tuple[list[Turn], dict[str, dict[str, Any]]]:
    with Rig.open(setup, ask.systems) as rig:
        if setup.pages is Pages.WARM:
            rig.warm()
        warmups = _warmups(ask)
        with ask.counting("turns", (len(works) + len(warmups)) * len(ask.systems)) as advance:
            turns = take_turns(rig, works, ask.systems, warmups, advance)
        return turns, {name.value: system.configuration for name, system in rig.systems.items()}


def _warmups(ask: Ask) -> list[Work]:
    """The first questions, by the first pipeline: models, threads and pages of the arena."""
    name, pipeline = next(iter(ask.pipelines.items()))
    questions = next(iter(ask.questions.values()))[: ask.num_warmups]
    return [Work({}, pipeline, name.value, (question,)) for question in questions]


def _measured(ask: Ask) -> Iterator[tuple[str, Sequence[str]]]:
    """Each dataset's questions, without those for warming up."""
    for dataset, questions in ask.questions.items():
        yield dataset, questions[ask.num_warmups :]


def _questions(ask: Ask) -> list[str]:
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
        for name, pipeline in ask.pipelines.items():
            place = {"pipeline": name.value, "dataset": dataset}
            key = {axis: place[axis] for axis in axes} | fixed
            works += [
                Work(key, pipeline, name.value, (question,), number)
                for number in range(ask.repeats)
                for question in questions
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
    return Outcome(systems, [cell for part in parts for cell in part.cells], [each for part in parts for each in part.ratios],
                   list(checks.values()), notes)  # fmt: skip
