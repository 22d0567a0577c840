"""The suite of cache policies: the same retrievals over arenas that are never emptied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.bench import page_cache
from telerag_cli.bench.answering import Ask, Outcome, only_retrieval, questions_of, warmups_of
from telerag_cli.bench.measure import Work, take_turns
from telerag_cli.bench.results import Cell, Key, Ratio
from telerag_cli.bench.statistics import ratio, short, summary
from telerag_cli.bench.suites import Pages, SuiteName, SystemName
from telerag_cli.bench.systems import Harness, Setup
from telerag_cli.config import CacheKind
from telerag_cli.engine.opening import open_retriever
from telerag_cli.engine.tier_plan import plan_tier
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import available_bytes
from telerag_cli.units import format_bytes


@dataclass(frozen=True)
class _Cached:
    """A cache policy and its share, with an arena of its own."""

    policy: CacheKind
    fraction: float
    retriever: Retriever


@dataclass(frozen=True)
class _Asked:
    """What one question's retrieval was given."""

    ahead: FloatArray
    query: FloatArray
    bytes_wanted: int


Place = tuple[float, float, str]
"""Skew, cache fraction and policy."""


def cache(
    ask: Ask,
    policies: Sequence[CacheKind],
    fractions: Sequence[float],
    budget: float,
    window_s: float | None,
    skews: Sequence[float] = (0.0,),
) -> Outcome:
    """Retrievals one after the other over arenas that are never emptied, by policy, share kept for hot lists, and skew.

    The LLM writes each question's texts once; then every policy has the same questions, the same queries, and the same
    time between them. Lookahead is by the question, and may move ``budget`` times the bytes probed. Arenas are emptied
    only where another skew begins.

    Args:
        ask: what was asked.
        policies: what is compared.
        fractions: shares of the arena for hot lists, for policies that keep lists by a share.
        budget: bytes that lookahead may move, as a multiple of those probed.
        window_s: seconds for lookahead before each retrieval; by default the median of what the LLM takes.
        skews: see `sequence`.

    Raises:
        ResourceError: the arenas do not fit the memory together.
        UsageError: several pipelines are named, or one that retrieves more than once.
    """
    setup = replace(ask.setup, pages=Pages.COLD, config=replace(ask.setup.config, max_tokens=1))
    pipeline, *others = ask.pipelines
    if others:
        raise UsageError(
            f"cache is for one pipeline and {len(ask.pipelines)} are named.", remedy="Name one with --pipeline."
        )
    questions = questions_of(ask)
    # Only hotness keeps lists by a share; the others are measured once.
    wanted = [
        (policy, fraction)
        for policy in policies
        for fraction in (fractions if policy is CacheKind.HOTNESS else fractions[:1])
    ]
    with (
        ask.counting("cache", len(questions) * (1 + len(wanted) * len(skews)) + ask.num_warmups) as advance,
        ExitStack() as undo,
    ):
        with Harness.open(setup, (SystemName.FETCH,)) as rig:
            works = [Work({}, pipeline, (question,)) for question in questions]
            known = [
                only_retrieval(turn, SuiteName.CACHE)
                for turn in take_turns(rig, works, (SystemName.FETCH,), warmups_of(ask), advance)
            ]
        if window_s is None:
            window_s = statistics.median(answered.timings["llm_s"] - answered.stages[-1].took_s for answered in known)
        embedder = setup.opened.embedder
        asked = [
            _Asked(
                embedder.encode_queries([question]),
                embedder.encode_queries(answered.retrievals[0].queries),
                answered.joins[0].bytes_wanted,
            )
            for question, answered in zip(questions, known, strict=True)
        ]
        plans = [plan_tier(setup.opened.index, replace(setup.config, cache=policy)) for policy, _fraction in wanted]
        if (needed := sum(plan.ram_bytes for plan in plans)) > (free := available_bytes()):
            raise ResourceError(
                f"{len(plans)} arenas take {format_bytes(needed)} and {format_bytes(free)} are free.",
                remedy="Lower --fast-memory, or name fewer --cache-fraction.",
            )
        arenas = []
        for (policy, fraction), plan in zip(wanted, plans, strict=True):
            base = undo.enter_context(closing(open_retriever(setup.opened.index, plan, setup.config)))
            arenas.append(
                _Cached(policy, fraction, Retriever(base.index, rig.coarse, base.tier, cache_fraction=fraction))
            )
        reports: dict[Place, list[JoinReport]] = {}
        distinct: dict[float, int] = {}
        for skew in skews:
            order = sequence(len(asked), skew, ask.seed)
            distinct[skew] = len(set(order))
            for each in arenas:
                each.retriever.tier.forget()
            for number, place in enumerate(order):
                page_cache.drop(setup.opened.index.paths.lists)
                for each in arenas[number % len(arenas) :] + arenas[: number % len(arenas)]:
                    each.retriever.budget_bytes = round(budget * asked[place].bytes_wanted)
                    report = _retrieve(each.retriever, asked[place], setup, window_s)
                    reports.setdefault((skew, each.fraction, each.policy.value), []).append(report)
                    advance(1)
        configurations = {
            each.policy.value: {
                "what": f"telerag, cache policy {each.policy.value}",
                "lookahead": "question",
                "tier": plan.name,
                "arena_bytes": each.retriever.tier.arena_bytes,
                "budget": budget,
                "window_s": round(window_s, 3),
            }
            for each, plan in zip(arenas, plans, strict=True)
        }
    cells = [
        Cell(policy, _key(skew, fraction), {**_joins(found), "distinct_questions": distinct[skew]})
        for (skew, fraction, policy), found in reports.items()
    ]
    notes = [
        f"Retrievals alone: {window_s:.2f} s for lookahead before each, without the LLM, which wrote the texts before. "
        "Arenas start empty and are emptied only where another skew begins; what each holds is what its policy kept.",
        "skew: 0 is each question once, in order; above it, as many questions are drawn with putting back, "
        "the r-th of them with a probability in proportion to r to the power of minus the skew.",
        "cache_fraction has a meaning for hotness only; the others were measured once.",
    ]
    return Outcome(configurations, cells, list(_cache_ratios(reports, ask.seed)), [], notes)


def sequence(count: int, skew: float, seed: int) -> list[int]:
    """In which order questions 0 to ``count`` - 1 are asked.

    Args:
        count: how many there are, and how many are asked.
        skew: 0 for each once, in order; above it, the exponent of the Zipf law by which they are drawn, with putting
            back, the first being the most frequent.
        seed: of the draw.
    """
    if skew == 0:
        return list(range(count))
    weights = np.arange(1, count + 1) ** -float(skew)
    drawn: list[int] = np.random.default_rng(seed).choice(count, count, p=weights / weights.sum()).tolist()
    return drawn


def _key(skew: float, fraction: float) -> Key:
    return {"skew": skew, "cache_fraction": fraction}


def _retrieve(retriever: Retriever, asked: _Asked, setup: Setup, window_s: float) -> JoinReport:
    k, nprobe = setup.depth
    begun = retriever.prefetch(asked.ahead, nprobe)
    time.sleep(window_s)
    return retriever.search(asked.query, k, nprobe, begun).report


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


def _cache_ratios(reports: Mapping[Place, Sequence[JoinReport]], seed: int) -> Iterator[Ratio]:
    """No cache by each policy, question by question."""
    none = {skew: found for (skew, _fraction, policy), found in reports.items() if policy == CacheKind.NONE.value}
    for (skew, fraction, policy), found in reports.items():
        if skew in none and policy != CacheKind.NONE.value:
            pairs = [(one.join_s, other.join_s) for one, other in zip(none[skew], found, strict=True)]
            yield ratio(_key(skew, fraction), CacheKind.NONE.value, policy, "join_ms", pairs, seed=seed)
