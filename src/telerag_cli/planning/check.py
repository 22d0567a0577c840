"""Errors of a run's predictions, by function, from the run's own lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telerag_cli.errors import ArtifactError
from telerag_cli.text import parse_json

AHEAD = ("window_s", "budget_bytes", "bytes_moved", "hit_share", "join_s")


@dataclass(frozen=True)
class PredictionError:
    """Error of one function, over all its predictions in a run."""

    function: str
    kind: str
    """``ahead``: predicted before the text was written; ``given``: from the actual lengths and lists."""
    count: int
    predicted: float
    """Median, in the unit that the function's name ends with."""
    measured: float
    median: float
    """Of the absolute relative errors."""
    worst: float
    bias: float
    """Median of predicted over measured, less 1: above 0, too much was expected."""

    @classmethod
    def of(cls, function: str, kind: str, pairs: list[tuple[float, float]]) -> PredictionError:
        """Summarize pairs of predicted and measured."""
        ratios = [predicted / measured - 1 for predicted, measured in pairs if measured] or [0.0]
        errors = [abs(ratio) for ratio in ratios]
        predicted, measured = (statistics.median(column) for column in zip(*pairs, strict=True))
        median, bias = statistics.median(errors), statistics.median(ratios)
        return cls(function, kind, len(pairs), predicted, measured, median, max(errors), bias)


def prediction_errors(lines: Iterable[bytes], path: Path) -> list[PredictionError]:
    """Return the errors of each function, in the order in which they depend on each other.

    Raises:
        ArtifactError: a line is not of a run, or none holds a prediction.
    """
    order = [("prefill_s", "given"), ("decode_s", "given"), *((name, "ahead") for name in AHEAD), ("join_s", "given")]
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in order}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            for name, kind, predicted, measured in _predictions(parse_json(line)):
                pairs[name, kind].append((predicted, measured))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"{path}:{number} is not a line of a run: {error}.", remedy="Name what telerag run -o wrote."
            ) from error
    if not any(pairs.values()):
        raise ArtifactError(
            f"{path} holds no prediction: the run had no profile, or no lookahead.",
            remedy="Run it again without --profile none and --lookahead off.",
        )
    return [PredictionError.of(*key, found) for key, found in pairs.items() if found]


def _predictions(line: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Yield function, kind, predicted and measured; lines of OpenAI Batch form too, nothing for a failed question."""
    body = line["response"]["body"]["telerag"] if line.get("response") else {} if line.get("error") else line
    for stage in body.get("stages", []):
        if "expected" in stage:
            for name in ("prefill_s", "decode_s"):
                yield name, "given", stage["expected"][name], stage[name]
    for plan in body.get("plan", []):
        for name in AHEAD:
            yield name, "ahead", plan["predicted"][name], plan["measured"][name]
        yield "join_s", "given", plan["join_of_these_lists_s"], plan["measured"]["join_s"]
