"""Which lists to move, in what order. Pure functions of vectors and integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray

CHECKPOINTS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Shares of the expected text at which it is embedded again. Source: the measurement by scripts/lookahead_study.py: on
a busy link each one is worth a point or more of the probed lists, wherever the others lie."""

PATIENT_CHECKPOINTS = (0.3, 0.6, 0.9)
"""Those of them that count when the link has nothing left to move: each embedding takes some milliseconds from the LLM,
and a later order is better. The first stands early because texts often end before it was expected. Same source."""


def interleave(rankings: Sequence[IntArray]) -> IntArray:
    """One order for rankings of one length: everyone's first choice, then everyone's second, each list once."""
    if len(rankings) == 1:
        return rankings[0]
    everyone = np.stack(rankings, axis=1).ravel()
    _lists, first = np.unique(everyone, return_index=True)
    merged: IntArray = everyone[np.sort(first)]
    return merged


def text_weight(fraction: float) -> float:
    """How much the text written so far counts against the question, by the share of it that is written.

    Source: the measurement by scripts/lookahead_study.py, which hardly changes for weights 0.1 to either side. The best
    weight of each single question, known beforehand, would find one or two points more.
    """
    return float(np.interp(fraction, (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), (0.0, 0.4, 0.57, 0.8, 0.95, 1.0)))


def prefetch_depth(nprobe: int, fraction: float, *, refining: bool) -> int:
    """How far down an order moving is worth it, in lists, for a query that will probe ``nprobe``.

    A move takes some time from an LLM that decodes on the same cores, and a miss takes more at the join, so what is
    unlikely to be probed is better left. An order made from little of the text (its ``fraction``) is only a start when
    later orders follow (``refining``), which will rank better what ranks low in it. A late order is so good that what
    ranks behind ``nprobe`` is what it misses. The numbers are a choice between bytes and hits, measured by
    scripts/lookahead_study.py.
    """
    return math.ceil(nprobe * (0.5 + 1.2 * fraction)) if refining else 2 * nprobe


def due(fraction: float, before: float, checkpoints: Sequence[float]) -> bool:
    """Whether a checkpoint was passed since the text was last looked at, when ``before`` of it was written."""
    return any(before < checkpoint <= fraction for checkpoint in checkpoints)


def blend(question: FloatArray, text: FloatArray, fraction: float) -> FloatArray:
    """The weighted mean of question and text when ``fraction`` of the text is written, with the text's length.

    All are embeddings of shape (dimension,).
    """
    weight = text_weight(fraction)
    mixed = (1 - weight) * question + weight * text
    norm = float(np.linalg.norm(mixed))
    scaled: FloatArray = (mixed * (float(np.linalg.norm(text)) / norm) if norm else text).astype(np.float32)
    return scaled
