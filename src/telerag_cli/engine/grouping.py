"""Which queries run together, and in what order. Pure functions of vectors and integers."""

from __future__ import annotations

import numpy as np

from telerag_cli.arrays import DoubleArray, FloatArray, IntArray

FADING = 0.65
"""What sharing with the previous micro-batch is worth, as a share of sharing within one; with the one before that, its
square, and so on. Source: docs/scheduling.md; little changes from 0.5 to 0.8."""
HORIZON = 4
"""Micro-batches to either side that count when queries change places; fading leaves little beyond."""
TOGETHER = 64
"""Queries among which any two may change places. Looking at more of them at once takes longer than it is worth."""
MOST = 4096
"""Queries compared with each other at once, which takes the square of it in memory (64 MiB)."""
LEAST_GAIN = 1e-6
"""Smallest gain for which two queries change places, in cosines; less is rounding."""


def arrival(count: int, size: int) -> list[IntArray]:
    """Micro-batches in order of arrival: places 0 to ``count - 1``, ``size`` at a time."""
    assert size > 0
    return _cut(np.arange(count, dtype=np.int64), size)


def similar(vectors: FloatArray, size: int, before: FloatArray | None = None) -> list[IntArray]:
    """Micro-batches of similar queries, in an order in which each is similar to those before it.

    Lists stay in the arena between micro-batches, so the order is worth as much as the grouping. A walk over the
    queries takes what is nearest to all it took before, the longer ago the less; then queries change places as long as
    that helps. Unlike greedy seeding (TeleRAG, arXiv 2502.20969) it leaves no micro-batch of leftovers, nor does it
    jump from one topic to another.

    ``vectors`` are of the queries, shape (n, dimension): what `likely` makes, or else their embeddings. ``before`` are
    those of some micro-batches that ran last, oldest first: the walk goes on from there.

    Returns:
        The places of each micro-batch; each place once, and all micro-batches but the last have ``size``.
    """
    assert size > 0
    most = max(1, MOST // size) * size
    batches: list[IntArray] = []
    for start in range(0, len(vectors), most):
        some = vectors[start : start + most]
        ran = before[-HORIZON * size :] if before is not None else vectors[:0]
        near = _cosines(np.concatenate([ran, some]))
        order = _change_places(near, _walk(near, len(ran), size), len(ran), size)
        batches += [start + batch for batch in _cut(order, size)]
        before = some[order]
    return batches


def likely(ranked: IntArray, nprobe: int, list_bytes: IntArray) -> FloatArray:
    """What `similar` should compare: the lists that each query will probably probe.

    The product of two rows is about the bytes that both will probe. Compared by it, queries share more than compared by
    their embeddings (docs/scheduling.md).

    ``ranked`` are the lists nearest to each query, best first, shape (n, depth); a depth of 4 ``nprobe`` is enough.
    ``list_bytes`` has shape (nlist,).

    Returns:
        Shape (n, nlist): for each list, the root of its bytes, less the lower it ranks.
    """
    chance = 1 / (1 + (np.arange(ranked.shape[1]) / nprobe) ** 2)
    vectors: FloatArray = np.zeros((len(ranked), len(list_bytes)), np.float32)
    worth = chance * np.sqrt(list_bytes)[ranked]
    np.put_along_axis(vectors, ranked, worth.astype(np.float32), 1)
    return vectors


def _cut(places: IntArray, size: int) -> list[IntArray]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _cosines(vectors: FloatArray) -> FloatArray:
    """Cosine of each pair, shape (n, n); 0 for a zero vector."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1)
    near: FloatArray = (unit @ unit.T).astype(np.float32)
    return near


def _walk(near: FloatArray, ran: int, size: int) -> IntArray:
    """An order of the queries from place ``ran`` on, numbered from 0; those before ran already, oldest first."""
    count = len(near) - ran
    if ran:
        age = 1 + (ran - 1 - np.arange(ran)) // size
        memory: FloatArray = (FADING ** age.astype(np.float64)).astype(np.float32) @ near[:ran, ran:]
    else:
        # An outlier is a good end of a walk. One that begins in the middle must come back for what it left on one side.
        memory = near[int(near.sum(1).argmin())].copy() if count else near[0:0].ravel()
    order: IntArray = np.empty(count, np.int64)
    for step in range(count):
        best = int(memory.argmax())
        order[step] = best
        memory += near[ran + best, ran:]
        memory[best] = -np.inf
        if (step + 1) % size == 0:
            memory *= np.float32(FADING)
    return order


def _change_places(near: FloatArray, order: IntArray, ran: int, size: int) -> IntArray:
    """Let any two queries of a window change places while that brings similar ones nearer; windows overlap by half."""
    sequence = np.concatenate([np.arange(ran), ran + order])
    # Micro-batches that ran have negative numbers, the latest -1.
    batch = np.concatenate([-1 - (ran - 1 - np.arange(ran)) // size, np.arange(len(order)) // size])
    half = max(1, TOGETHER // size // 2)
    last = int(batch[-1]) + 1 if len(order) else 0
    for first in range(0, max(last - half, 1), half):
        end = min(first + 2 * half, last)
        inside = np.flatnonzero((batch >= first) & (batch < end))
        around = np.flatnonzero((batch >= first - HORIZON) & (batch < end + HORIZON))
        beside = np.setdiff1d(around, inside, assume_unique=True)
        slots = np.arange(first, end)
        mine, others = sequence[inside], sequence[beside]
        pull = near[np.ix_(mine, others)] @ _closeness(batch[beside, None] - slots)
        places = _improve(
            near[np.ix_(mine, mine)].astype(np.float64), batch[inside] - first, _closeness(slots[:, None] - slots), pull
        )
        sequence[inside] = mine[np.argsort(places, kind="stable")]
    settled: IntArray = sequence[ran:] - ran
    return settled


def _closeness(apart: IntArray) -> DoubleArray:
    """The share that counts of the similarity of two queries in micro-batches this far apart."""
    worth: DoubleArray = np.where(np.abs(apart) <= HORIZON, FADING ** np.abs(apart).astype(np.float64), 0.0)
    return worth


def _improve(near: DoubleArray, places: IntArray, closeness: DoubleArray, pull: DoubleArray) -> IntArray:
    """Exchange the two queries that gain most by it, until none do.

    ``near`` are the cosines, shape (n, n); ``places`` the micro-batch of each query, shape (n,); ``closeness`` that of
    two micro-batches, shape (m, m); ``pull`` what each query has from those outside in each micro-batch, shape (n, m).

    Returns:
        The micro-batch of each query, each as often as before, shape (n,).
    """
    everyone = np.arange(len(places))
    places = places.copy()
    near[everyone, everyone] = 0.0
    member = np.zeros((len(places), len(closeness)))
    member[everyone, places] = 1.0
    pull = near @ member @ closeness + pull
    pulled = pull[:, places]  # what one would have in the place of the other
    apart = closeness[places][:, places]
    for _ in range(4 * len(places)):  # never needed, but rounding must not keep it going
        own = pulled[everyone, everyone]
        gain = pulled + pulled.T
        gain -= own[:, None]
        gain -= own
        gain -= 2 * near * (closeness[0, 0] - apart)  # each counted itself as a neighbour in the other's place
        one, other = divmod(int(gain.argmax()), len(places))
        if gain[one, other] <= LEAST_GAIN:
            break
        pull += (near[:, one] - near[:, other])[:, None] * (closeness[places[other]] - closeness[places[one]])
        places[one], places[other] = places[other], places[one]
        pulled = pull[:, places]
        apart[[one, other]] = apart[[other, one]]
        apart[:, [one, other]] = apart[:, [other, one]]
    return places
