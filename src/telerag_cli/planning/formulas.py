"""Every formula that planning uses, and nothing else. Seconds, bytes, bytes per second.

The terms follow the analysis in TeleRAG (arXiv 2502.20969): what can be prefetched is what the link moves while the LLM
generates, and the retrieval that is left is the coarse search and the larger of what both ends do with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telerag_cli.arrays import IntArray
from telerag_cli.planning.profile import HitCurve, IndexFigures, Joins, LinkPoint, LlmRates, ScoringRate


def transfer_cost_s(points: Sequence[LinkPoint]) -> float:
    """Return what a transfer costs beside its bytes: ``c`` of ``t = c + n / B``, least squares of the relative error.

    Source: the linear model of communication (Hockney 1994), fitted to transfers one at a time. The points are of one
    way, with sizes that differ.
    """
    single = [point for point in points if point.depth == min(each.depth for each in points)]
    nbytes = np.array([point.nbytes for point in single], float)
    took_s = nbytes / np.array([point.bytes_per_s.value for point in single])
    columns = np.stack([np.ones_like(nbytes), nbytes], axis=1) / took_s[:, None]
    (cost_s, _per_byte), *_rest = np.linalg.lstsq(columns, np.ones_like(nbytes), rcond=None)
    return max(float(cost_s), 0.0)


def prefill_s(llm: LlmRates, tokens: float) -> float:
    """Return the time to the first token after a prompt of which so many tokens are not cached.

    Linear between the lengths measured, and beyond the longest at the rate between the last two.
    """
    return _along([(point.tokens, point.took_s.value) for point in llm.prefill], tokens)


def step_s(llm: LlmRates, width: float) -> float:
    """Return the time for one token of each of ``width`` texts: linear between the widths measured."""
    return _along([(point.width, point.step_s.value) for point in llm.decode], width)


def decode_s(llm: LlmRates, tokens: float, width: float, prompt_tokens: float) -> float:
    """Return the time from the first to the last of so many tokens after a prompt, in each of ``width`` texts.

    ``(tokens - 1) * (step_s(width) + width * a * (prompt + tokens / 2 - context))``, where ``a`` is what a token of
    context adds, and ``context`` what there was when the steps were measured: attention is linear in the context.
    """
    longer = prompt_tokens + tokens / 2 - llm.decode_context
    return max(tokens - 1, 0.0) * max(step_s(llm, width) + width * llm.context_step_s * longer, 0.0)


def window_s(prefill: float, decode: float, slowed: float, embedding: float, beginning: float) -> float:
    """Return the time in which lookahead may move lists before the query arrives.

    ``prefill + decode * slowed + embedding - beginning``: all that the LLM does before the retrieval, its decoding as
    slow as moving makes it, and embedding the query; less the approximate embedding of the question, which comes
    before the first list is moved.
    """
    return max(prefill + decode * slowed + embedding - beginning, 0.0)


def budget_bytes(bytes_per_s: float, window: float, most_bytes: float) -> float:
    """Return the bytes that lookahead can move: ``rate * window``, at most what the arena holds or the user allows.

    Source: TeleRAG, arXiv 2502.20969: the prefetch budget is the link's bandwidth times the expected time of
        generation.
    """
    return min(bytes_per_s * window, most_bytes)


def probed_bytes(index: IndexFigures, nprobe: int) -> float:
    """Return the mean bytes of the lists that a query probes, from replayed questions; linear between those measured.

    More than ``nprobe`` times the mean list, because large lists are near more queries.
    """
    return _along([(0, 0.0), *((point.nprobe, point.nbytes) for point in index.probed)], nprobe)


def hit_share(curve: HitCurve, budget: float) -> float:
    """Return the share of probed bytes in fast memory when the query arrives; ``budget`` is over the probed bytes."""
    return min(_along([(0.0, 0.0), *((point.budget, point.hit) for point in curve.points)], budget, beyond=False), 1.0)


def moved_share(curve: HitCurve, budget: float) -> float:
    """Return the bytes that lookahead moves, over the probed bytes as ``budget``; less where no more is worth it."""
    return _along([(0.0, 0.0), *((point.budget, point.moved) for point in curve.points)], budget, beyond=False)


def score_s(rate: ScoringRate, nbytes: float) -> float:
    """Return the time to score so many bytes of lists for one query: ``latency + bytes / rate``; 0 for none."""
    return rate.latency_s + nbytes / rate.bytes_per_s.value if nbytes else 0.0


def scoring_latency_s(few_bytes: float, few_s: float, many_bytes: float, many_s: float) -> float:
    """Return the latency of scoring, ``few_s - few_bytes * (many_s - few_s) / (many_bytes - few_bytes)``.

    It is 0 if more bytes did not take longer.
    """
    if many_bytes <= few_bytes or many_s <= few_s:
        return 0.0
    return max(few_s - few_bytes * (many_s - few_s) / (many_bytes - few_bytes), 0.0)


def join_s(joins: Joins, hit_bytes: float, missed_bytes: float) -> float:
    """Return the time from a query's arrival to its results.

    ``fixed + max(hits, misses) + loss * min(hits, misses)``, with ``hits = bytes / rate`` of what is scored in fast
    memory, and ``misses`` likewise of what is handled otherwise meanwhile. Source: TeleRAG, arXiv 2502.20969, whose
    retrieval is the larger of both; the loss is ours, for ends that share cores and memory, linear in the share missed
    between those measured.
    """
    hits_s, misses_s = hit_bytes / joins.hit_bytes_per_s.value, missed_bytes / joins.missed_bytes_per_s.value
    share = missed_bytes / max(hit_bytes + missed_bytes, 1.0)
    losses = [(point.missed_share, point.loss) for point in joins.losses] or [(0.0, 0.0)]
    loss = _along(losses, share, beyond=False)
    return joins.fixed_s + max(hits_s, misses_s) + loss * min(hits_s, misses_s)


def join_fixed_s(few_s: float, few_bytes: float, many_s: float, many_bytes: float) -> float:
    """Return the ``fixed`` of `join_s` from two joins without misses, as `scoring_latency_s`; 0 for equal sizes."""
    if many_bytes <= few_bytes:
        return 0.0
    return few_s - few_bytes * (many_s - few_s) / (many_bytes - few_bytes)


def overlap_loss(hits_s: float, misses_s: float, both_s: float) -> float:
    """Return the ``loss`` of `join_s` from a join with hits and misses: ``(both - max) / min``, from 0 to 2."""
    shorter_s = min(hits_s, misses_s)
    return min(max((both_s - max(hits_s, misses_s)) / shorter_s, 0.0), 2.0) if shorter_s > 0 else 0.0


def break_even_bytes(link_bytes_per_s: float, arena: ScoringRate, in_place: ScoringRate) -> float:
    """Return the bytes of misses from which moving and scoring is as fast as scoring in place; infinite if never.

    ``(latency_m - latency_p) / (1 / rate_p - 1 / link)``, where ``m`` is scoring what was moved, at least as fast as
    the link, and ``p`` scoring in place.
    """
    moved_s = 1 / min(link_bytes_per_s, arena.bytes_per_s.value)
    gain_s = 1 / in_place.bytes_per_s.value - moved_s
    return max(arena.latency_s - in_place.latency_s, 0.0) / gain_s if gain_s > 0 else float("inf")


def hidden_nprobe(index: IndexFigures, budget: float) -> int:
    """Return the most lists that a budget moves if they are known: the largest n with ``probed_bytes(n) <= budget``."""
    counts = [0, *(point.nprobe for point in index.probed)]
    nbytes = [0.0, *(point.nbytes for point in index.probed)]
    return int(np.interp(budget, nbytes, counts))


def mean_list_bytes(list_bytes: IntArray) -> float:
    """Return the mean size of the lists that are not empty; 0 if all are."""
    filled = list_bytes[list_bytes > 0]
    return float(filled.mean()) if len(filled) else 0.0


def _along(points: Sequence[tuple[float, float]], x: float, *, beyond: bool = True) -> float:
    """Piecewise linear through points in ascending order; beyond the last at its slope, or level."""
    xs, ys = zip(*points, strict=True)
    if beyond and len(points) > 1 and x > xs[-1]:
        return float(ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return float(np.interp(x, xs, ys))
