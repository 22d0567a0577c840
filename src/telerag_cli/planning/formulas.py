"""What a profile says will happen: every formula that planning uses, and nothing else. Seconds, bytes, bytes a second.

The terms follow the analysis in TeleRAG (arXiv 2502.20969): what can be prefetched is what the link moves while the LLM
generates, and the retrieval that is left is the coarse search and the larger of what both ends do with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telerag_cli.planning.profile import HitCurve, IndexFigures, Joins, LinkPoint, LlmRates, Moving, ScoringRate


def transfer_cost_s(points: Sequence[LinkPoint]) -> float:
    """Seconds that a transfer costs beside its bytes: ``c`` of ``t = c + n / B``, least squares of the relative error.

    Source: the linear model of communication (Hockney 1994), fitted to transfers one at a time.

    Args:
        points: of one way, with sizes that differ.
    """
    single = [point for point in points if point.depth == min(each.depth for each in points)]
    nbytes = np.array([point.nbytes for point in single], float)
    took_s = nbytes / np.array([point.bytes_per_s.value for point in single])
    columns = np.stack([np.ones_like(nbytes), nbytes], axis=1) / took_s[:, None]
    (cost_s, _per_byte), *_rest = np.linalg.lstsq(columns, np.ones_like(nbytes), rcond=None)
    return max(float(cost_s), 0.0)


def link_bytes_per_s(moving: Moving, *, decoding: bool) -> float:
    """Rate at which the tier moves lists: as measured, while the LLM writes or while it does not."""
    return (moving.while_decoding if decoding else moving.alone).value


def prefill_s(llm: LlmRates, tokens: float) -> float:
    """Seconds until the first token after a prompt of which so many tokens are not known yet.

    Linear between the lengths measured, and beyond the longest at the rate between the last two.
    """
    return _along([(point.tokens, point.took_s.value) for point in llm.prefill], tokens)


def step_s(llm: LlmRates, width: float) -> float:
    """Seconds for one token of each of ``width`` texts: linear between the widths measured."""
    return _along([(point.width, point.step_s.value) for point in llm.decode], width)


def decode_s(llm: LlmRates, tokens: float, width: float, prompt_tokens: float) -> float:
    """Seconds from the first to the last of so many tokens after a prompt, in each of ``width`` texts.

    ``(tokens - 1) * (step_s(width) + width * a * (prompt + tokens / 2 - context))``, where ``a`` is what a token of
    context adds, and ``context`` what there was when the steps were measured: attention is linear in what it looks back
    on.
    """
    longer = prompt_tokens + tokens / 2 - llm.decode_context
    return max(tokens - 1, 0.0) * max(step_s(llm, width) + width * llm.context_step_s * longer, 0.0)


def window_s(prefill: float, decode: float, slowed: float, embedding: float, beginning: float) -> float:
    """Seconds for which lookahead may move lists before the query is there.

    ``prefill + decode * slowed + embedding - beginning``: all that the LLM does before the retrieval, its decoding as
    slow as moving makes it, and embedding the query; less the sketch of the question, which comes before the first list
    is moved.
    """
    return max(prefill + decode * slowed + embedding - beginning, 0.0)


def budget_bytes(bytes_per_s: float, window: float, most_bytes: float) -> float:
    """Bytes that lookahead can move: ``rate * window``, at most what the arena holds or the user allows.

    Source: TeleRAG, arXiv 2502.20969: the prefetch budget is the link's bandwidth times the expected time of
        generation.
    """
    return min(bytes_per_s * window, most_bytes)


def probed_bytes(index: IndexFigures, nprobe: int) -> float:
    """Bytes of the lists that a query probes, on average over replayed questions; linear between the numbers measured.

    More than ``nprobe`` times the mean list, because large lists are near more queries.
    """
    return _along([(0, 0.0), *((point.nprobe, point.nbytes) for point in index.probed)], nprobe)


def hit_share(curve: HitCurve, budget: float) -> float:
    """Share of the probed bytes in fast memory when the query arrives; ``budget`` as a multiple of the probed bytes."""
    return min(_along([(0.0, 0.0), *((point.budget, point.hit) for point in curve.points)], budget, beyond=False), 1.0)


def moved_share(curve: HitCurve, budget: float) -> float:
    """Bytes that lookahead moves, as ``budget`` a multiple of the probed bytes: less than it where no more is worth moving."""
    return _along([(0.0, 0.0), *((point.budget, point.moved) for point in curve.points)], budget, beyond=False)


def score_s(rate: ScoringRate, nbytes: float) -> float:
    """Seconds to score so many bytes of lists for one query: ``latency + bytes / rate``; nothing for nothing."""
    return rate.latency_s + nbytes / rate.bytes_per_s.value if nbytes else 0.0


def move_s(bytes_per_s: float, nbytes: float) -> float:
    """Seconds to move so many bytes of lists: ``bytes / rate``, the rate being that of whole lists."""
    return nbytes / bytes_per_s


def join_s(joins: Joins, hit_bytes: float, missed_bytes: float) -> float:
    """Seconds from a query's arrival to its results.

    ``fixed + max(hits, misses) + loss * min(hits, misses)``, with ``hits = bytes / rate`` of what is scored in fast
    memory, and ``misses`` likewise of what is dealt with otherwise meanwhile. Source: TeleRAG, arXiv 2502.20969, whose
    retrieval is the larger of both; the loss is ours, for ends that share cores and memory, linear in the share missed
    between those measured.
    """
    hits_s, misses_s = hit_bytes / joins.hit_bytes_per_s.value, missed_bytes / joins.missed_bytes_per_s.value
    share = missed_bytes / max(hit_bytes + missed_bytes, 1.0)
    loss = (
        _along([(point.missed_share, point.loss) for point in joins.losses], share, beyond=False)
        if joins.losses
        else 0.0
    )
    return joins.fixed_s + max(hits_s, misses_s) + loss * min(hits_s, misses_s)


def overlap_loss(hits_s: float, misses_s: float, both_s: float) -> float:
    """The ``loss`` of `join_s` from a join with hits and misses: ``(both - max) / min``, from 0 to 2."""
    shorter_s = min(hits_s, misses_s)
    return min(max((both_s - max(hits_s, misses_s)) / shorter_s, 0.0), 2.0) if shorter_s > 0 else 0.0


def break_even_bytes(link_bytes_per_s: float, arena: ScoringRate, in_place: ScoringRate) -> float:
    """Bytes of misses from which moving and scoring them is as quick as scoring them in place; infinite if it never is.

    ``(latency_m - latency_p) / (1 / rate_p - 1 / link)``, where ``m`` is scoring what was moved, at least as fast as
    the link, and ``p`` scoring in place.
    """
    moved_s = 1 / min(link_bytes_per_s, arena.bytes_per_s.value)
    gain_s = 1 / in_place.bytes_per_s.value - moved_s
    return max(arena.latency_s - in_place.latency_s, 0.0) / gain_s if gain_s > 0 else float("inf")


def hidden_nprobe(index: IndexFigures, budget: float) -> int:
    """The most lists a query may probe so that the budget moves all of them, were they known: ``probed_bytes(n) <= budget``."""
    counts = [0, *(point.nprobe for point in index.probed)]
    nbytes = [0.0, *(point.nbytes for point in index.probed)]
    return int(np.interp(budget, nbytes, counts))


def memory_left_bytes(free_bytes: int, *taken_bytes: int) -> int:
    """What the LLM, the contexts and the tier leave of a memory: ``free - sum(taken)``; below zero if they do not fit."""
    return free_bytes - sum(taken_bytes)


def _along(points: Sequence[tuple[float, float]], x: float, *, beyond: bool = True) -> float:
    """Piecewise linear through points in ascending order; beyond the last at its slope, or level."""
    xs, ys = zip(*points, strict=True)
    if beyond and len(points) > 1 and x > xs[-1]:
        return float(ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return float(np.interp(x, xs, ys))
