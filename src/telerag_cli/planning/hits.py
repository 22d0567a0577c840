"""What lookahead would find: questions replayed against the centroids, with a link of any speed. No bytes move."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, FloatArray, IntArray
from telerag_cli.config import Lookahead
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.errors import ArtifactError
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.planning.formulas import mean_list_bytes
from telerag_cli.planning.profile import HitCurve, HitPoint, IndexFigures, Probed
from telerag_cli.prefetch.order import CHECKPOINTS, PATIENT_CHECKPOINTS, blend, prefetch_depth
from telerag_cli.progress import Advance

BUDGETS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
"""As multiples of the bytes that a query probes."""


@dataclass(frozen=True)
class Replayed:
    """A question, and the text that was searched for in the end."""

    question: str
    text: str


def from_recording(lines: Sequence[dict[str, object]], path: Path) -> list[Replayed]:
    """Return the questions and first queries of what ``telerag run --record`` wrote.

    Raises:
        ArtifactError: none of its lines holds any.
    """
    found = []
    for line in lines:
        match line:
            case {"question": str(question), "retrievals": [{"queries": [str(text), *_]}, *_]}:
                found.append(Replayed(question, text))
    if not found:
        raise ArtifactError(
            f"{path} holds no question with its queries.", remedy="Name what telerag run --record wrote."
        )
    return found


def from_passages(passages: Passages, count: int) -> list[Replayed]:
    """Return passages spread over the index, each with its first sentence as the question."""
    rows = np.linspace(0, len(passages) - 1, min(count, len(passages))).astype(np.int64)
    texts = [passage.text for passage in passages[rows.tolist()]]
    return [Replayed(first_sentence(text), text) for text in texts if text.strip()]


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, at most twelve words of it."""
    sentence = re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]
    return " ".join(sentence.split()[:12])


def index_figures(
    index: Index, encoder: Encoder, replayed: Sequence[Replayed], source: str, nprobe: int, advance: Advance
) -> IndexFigures:
    """Replay questions: bytes probed, and hits by budget for both kinds of lookahead.

    There is at least one question; ``source`` says where they are from. Calls ``advance`` for each.
    """
    coarse = Coarse(index.centroids, index.manifest.metric)
    kinds = (Lookahead.QUESTION, Lookahead.REFINED)
    sums = {kind: np.zeros((len(BUDGETS), 2)) for kind in kinds}
    list_bytes = index.list_bytes.astype(np.float64)
    counts = sorted({nprobe, index.manifest.nlist, *(2**power for power in range(index.manifest.nlist.bit_length()))})
    probed = np.zeros(len(counts))
    for each in replayed:
        query = encoder.encode_queries([each.text])[0]
        ranking = coarse.rank(query)
        probed += np.cumsum(list_bytes[ranking])[np.array(counts) - 1]
        wanted = np.zeros(index.manifest.nlist, np.bool_)
        wanted[ranking[:nprobe]] = True
        for kind in kinds:
            orders = _orders(coarse, encoder, each, nprobe, kind)
            sums[kind] += [_replay(list_bytes, orders, wanted, budget) for budget in BUDGETS]
        advance(1)
    curves = []
    for kind, total in sums.items():
        shares = (total / len(replayed)).tolist()
        points = (HitPoint(budget, hit, moved) for budget, (hit, moved) in zip(BUDGETS, shares, strict=True))
        curves.append(HitCurve(kind.value, tuple(points)))
    means = tuple(map(Probed, counts, (probed / len(replayed)).tolist()))
    mean_bytes = mean_list_bytes(index.list_bytes)
    return IndexFigures(index.manifest.nlist, mean_bytes, nprobe, len(replayed), source, means, tuple(curves))


@dataclass(frozen=True)
class _Order:
    """An order that lookahead follows from some share of the window on."""

    since: float
    patient: bool
    """Followed even when the link has nothing left to move."""
    best: IntArray


def _orders(coarse: Coarse, encoder: Encoder, each: Replayed, nprobe: int, kind: Lookahead) -> list[_Order]:
    refining = kind is Lookahead.REFINED
    question: FloatArray = encoder.embed_approx([each.question])[0]
    rankings = {0.0: coarse.rank(question)}
    if refining:
        words = each.text.split()
        vectors = encoder.embed_approx([" ".join(words[: max(1, round(share * len(words)))]) for share in CHECKPOINTS])
        for share, vector in zip(CHECKPOINTS, vectors, strict=True):
            rankings[share] = coarse.rank(blend(question, vector, share))
    return [
        _Order(share, share in (0.0, *PATIENT_CHECKPOINTS), best[: prefetch_depth(nprobe, share, refining=refining)])
        for share, best in rankings.items()
    ]


def _replay(list_bytes: DoubleArray, orders: Sequence[_Order], wanted: BoolArray, budget: float) -> tuple[float, float]:
    """Return the shares of the probed bytes that are hits and that were moved, with a link of a steady rate."""
    probed_bytes = float(list_bytes[wanted].sum())
    moved = np.zeros(len(list_bytes), np.bool_)
    used, idle = 0.0, False
    for number, order in enumerate(orders):
        until = orders[number + 1].since if number + 1 < len(orders) else 1.0
        if idle and not order.patient:
            used = until * budget * probed_bytes
            continue
        left = until * budget * probed_bytes - used
        rest = order.best[~moved[order.best]]
        ends = np.cumsum(list_bytes[rest])
        count = int(np.searchsorted(ends, left, side="right"))
        moved[rest[:count]] = True
        idle = count == len(rest)
        # What an idle link did not move in its time it does not move later.
        used = until * budget * probed_bytes if idle else used + (float(ends[count - 1]) if count else 0.0)
    if not probed_bytes:
        return 1.0, 0.0
    return float(list_bytes[moved & wanted].sum()) / probed_bytes, float(list_bytes[moved].sum()) / probed_bytes
