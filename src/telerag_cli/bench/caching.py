"""The suite of cache policies: the same retrievals over arenas that are never emptied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import numpy as np

from telerag_cli.bench import page_cache
from telerag_cli.bench.answering import Ask, only_retrieval
from telerag_cli.bench.measure import Work, take_turns
from telerag_cli.bench.results import Cell, Outcome, Ratio
from telerag_cli.bench.statistics import ratio, short, summary
from telerag_cli.bench.suites import Pages, SuiteName, SystemName
from telerag_cli.bench.systems import Harness
from telerag_cli.config import CacheKind
from telerag_cli.engine.memory_plan import plan_tier
from telerag_cli.engine.opening import open_retriever
from telerag_cli.errors import ResourceError
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import available_bytes
from telerag_cli.units import format_bytes

Place = tuple[float, float, CacheKind]
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
    seconds for lookahead between them, by default the median of what the LLM takes. Lookahead is by the question, and
    may move ``budget`` times the bytes probed. Arenas are emptied only where another skew begins, see `sequence`.

    Raises:
        ResourceError: the arenas do not fit the memory together.
        UsageError: several pipelines are named, or one that retrieves more than once.
    """
    pipeline = ask.only_pipeline(SuiteName.CACHE)
    setup = replace(ask.setup, pages=Pages.COLD, config=replace(ask.setup.config, max_tokens=1))
    index, embedder, (k, nprobe) = setup.opened.index, setup.opened.embedder, setup.depth
    # Only hotness keeps lists by a share; the others are measured once.
    wanted = [
        (policy, fraction)
        for policy in policies
        for fraction in (fractions if policy is CacheKind.HOTNESS else fractions[:1])
    ]
    total = len(ask.measured) * (1 + len(wanted) * len(skews)) + ask.num_warmups
    with ask.counting("cache", total) as advance, ExitStack() as undo:
        with Harness.open(setup, (SystemName.FETCH,)) as rig:
            works = [Work({}, pipeline, (question,)) for question in ask.measured]
            turns = take_turns(rig, works, (SystemName.FETCH,), ask.warmups, advance)
        known = [only_retrieval(turn, SuiteName.CACHE) for turn in turns]
        if window_s is None:
            window_s = statistics.median(answered.timings["llm_s"] - answered.stages[-1].took_s for answered in known)
        ahead = [embedder.encode_queries([question]) for question in ask.measured]
        queries = [embedder.encode_queries(answered.retrievals[0].queries) for answered in known]
        plans = [plan_tier(index, replace(setup.config, cache=policy)) for policy, _fraction in wanted]
        if (needed := sum(plan.ram_bytes for plan in plans)) > (free := available_bytes()):
            raise ResourceError(
                f"{len(plans)} arenas take {format_bytes(needed)} and {format_bytes(free)} are free.",
                remedy="Lower --fast-memory, or name fewer --cache-fraction.",
            )
        arenas = []
        for (policy, fraction), plan in zip(wanted, plans, strict=True):
            base = undo.enter_context(closing(open_retriever(index, plan, setup.config)))
            retriever = Retriever(base.index, rig.coarse, base.tier, cache_fraction=fraction)
            arenas.append((policy, fraction, retriever))
        reports: dict[Place, list[JoinReport]] = {}
        distinct: dict[float, int] = {}
        for skew in skews:
            order = sequence(len(known), skew, ask.seed)
            distinct[skew] = len(set(order))
            for _policy, _fraction, retriever in arenas:
                retriever.tier.forget()
            for number, place in enumerate(order):
                page_cache.drop(index.paths.lists)
                first = number % len(arenas)
                for policy, fraction, retriever in arenas[first:] + arenas[:first]:
                    retriever.budget_bytes = round(budget * known[place].joins[0].bytes_wanted)
                    begun = retriever.prefetch(ahead[place], nprobe)
                    time.sleep(window_s)
                    report = retriever.search(queries[place], k, nprobe, begun).report
                    reports.setdefault((skew, fraction, policy), []).append(report)
                    advance(1)
        configurations = {
            policy.value: {
                "what": f"telerag, cache policy {policy.value}",
                "lookahead": "question",
                "tier": plan.name,
                "arena_bytes": retriever.tier.arena_bytes,
                "budget": budget,
                "window_s": round(window_s, 3),
            }
            for (policy, _fraction, retriever), plan in zip(arenas, plans, strict=True)
        }
    cells = [
        Cell(policy.value, _key(place), {**_joins(found), "distinct_questions": distinct[skew]})
        for place, found in reports.items()
        for skew, _fraction, policy in [place]
    ]
    notes = [
        f"Retrievals alone: {window_s:.2f} s for lookahead before each, without the LLM, which wrote the texts before. "
        "Arenas start empty and are emptied only where another skew begins; what each holds is what its policy kept.",
        "skew: 0 is each question once, in order; above it, as many questions are sampled with replacement, "
        "the r-th of them with a probability in proportion to r to the power of minus the skew.",
        "cache_fraction has a meaning for hotness only; the others were measured once.",
    ]
    return Outcome(configurations, cells, list(_ratios(reports, ask.seed)), [], notes)


def sequence(count: int, skew: float, seed: int) -> list[int]:
    """Return the order in which questions 0 to ``count`` - 1 are asked.

    It is each once, in order, for a skew of 0. Above it, as many are sampled with replacement by a Zipf law of this
    exponent, the first being the most frequent.
    """
    if skew == 0:
        return list(range(count))
    weights = np.arange(1, count + 1) ** -float(skew)
    drawn: list[int] = np.random.default_rng(seed).choice(count, count, p=weights / weights.sum()).tolist()
    return drawn


def _key(place: Place) -> dict[str, Any]:
    return {"skew": place[0], "cache_fraction": place[1]}


def _joins(reports: Sequence[JoinReport]) -> dict[str, Any]:
    wanted = sum(report.lists_wanted for report in reports)
    names = ("bytes_wanted", "bytes_moved", "bytes_missed")
    return {
        "completed": len(reports),
        **summary("join_ms", [1e3 * report.join_s for report in reports]),
        "hit_share": short(sum(report.lists_hit for report in reports) / wanted) if wanted else 0.0,
        **{name: sum(getattr(report, name) for report in reports) // len(reports) for name in names},
    }


def _ratios(reports: Mapping[Place, Sequence[JoinReport]], seed: int) -> Iterator[Ratio]:
    """No cache by each policy, question by question."""
    none = {skew: found for (skew, _fraction, policy), found in reports.items() if policy is CacheKind.NONE}
    for place, found in reports.items():
        skew, _fraction, policy = place
        if skew in none and policy is not CacheKind.NONE:
            pairs = [(one.join_s, other.join_s) for one, other in zip(none[skew], found, strict=True)]
            yield ratio(_key(place), CacheKind.NONE.value, policy.value, "join_ms", pairs, seed=seed)
