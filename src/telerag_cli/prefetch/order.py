"""Which lists to move, in what order. Pure functions of vectors and integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray

CHECKPOINTS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Shares of the expected text at which it is embedded again. Source: the measurement by scripts/lookahead_study.py: on a busy
link each one is worth a point or more of the probed lists, wherever the others lie."""

PATIENT_CHECKPOINTS = (0.3, 0.6, 0.9)
"""Those of them that count when the link has nothing left to move: each embedding takes some milliseconds from the LLM, and a
later order is better. The first stands early because texts often end before they were expected to. Same source."""


def interleave(rankings: Sequence[IntArray]) -> IntArray:
    """One order for several queries: everyone's first choice, then everyone's second, each list once.

    Args:
        rankings: for each query its lists, best first, all of the same length.

    Returns:
        The distinct lists in order of their best rank, ties by query.
    """
    if len(rankings) == 1:
        return rankings[0]
    everyone = np.stack(rankings, axis=1).ravel()
    _lists, first = np.unique(everyone, return_index=True)
    merged: IntArray = everyone[np.sort(first)]
    return merged


def text_weight(fraction: float) -> float:
    """How much the text written so far counts against the question, by the share of it that is written.

    Nothing at the start, over half at a quarter of the text, nearly all of it from three quarters on, linear between.
    Source: the measurement by scripts/lookahead_study.py, which hardly changes for weights 0.1 to either side. The best
        weight
    of each single question, known beforehand, would find one or two points more.
    """
    return float(np.interp(fraction, (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), (0.0, 0.4, 0.57, 0.8, 0.95, 1.0)))


def prefetch_depth(nprobe: int, fraction: float, *, refining: bool) -> int:
    """How far down an order moving is worth it, in lists.

    A move takes some time from an LLM that decodes on the same cores, and a miss takes more at the join, so what is
    unlikely to be probed is better left. An early order is only a start when refinement follows: what ranks low in it
    will be ranked better by a later one, unless the text ends before it was expected to. A late order is so good that
    what ranks behind ``nprobe`` is what it misses. The numbers are a choice between bytes and hits, measured by
    scripts/lookahead_study.py.

    Args:
        nprobe: lists that the query will probe.
        fraction: share of the expected text that the order is made from, 0 for the question alone.
        refining: whether later orders will follow.
    """
    return math.ceil(nprobe * (0.5 + 1.2 * fraction)) if refining else 2 * nprobe


def due(fraction: float, before: float, checkpoints: Sequence[float]) -> bool:
    """Whether one of the checkpoints was passed since the text was last looked at, when ``before`` of it was written."""
    return any(before < checkpoint <= fraction for checkpoint in checkpoints)


def blend(question: FloatArray, text: FloatArray, fraction: float) -> FloatArray:
    """The lookahead query when ``fraction`` of the text is written.

    Args:
        question: embedding of the question, shape (dimension,).
        text: embedding of the text so far, shape (dimension,).
        fraction: share of the expected text that is written, 0 to 1.

    Returns:
        Their weighted mean, of the text's length, shape (dimension,).
    """
    weight = text_weight(fraction)
    mixed = (1 - weight) * question + weight * text
    norm = float(np.linalg.norm(mixed))
    scaled: FloatArray = (mixed * (float(np.linalg.norm(text)) / norm) if norm else text).astype(np.float32)
    return scaled
