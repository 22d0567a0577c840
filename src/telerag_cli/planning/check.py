"""How right a run's predictions were: per function, from the run's own lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telerag_cli.errors import ArtifactError


@dataclass(frozen=True)
class Error:
    """Of one function, over all its predictions in a run."""

    function: str
    kind: str
    """``ahead``: predicted before the text was written; ``given``: from the lengths and lists that there were."""
    count: int
    predicted: float
    """Median, in the unit that the function's name ends with."""
    measured: float
    median: float
    """Of the relative errors without their sign."""
    worst: float
    bias: float
    """Median of predicted over measured, less 1: above 0, too much was expected."""


AHEAD = ("window_s", "budget_bytes", "bytes_moved", "hit_share", "join_s")


def errors_of(lines: Iterable[bytes], path: Path) -> list[Error]:
    """The errors of each function, in the order in which they depend on each other.

    Raises:
        ArtifactError: a line is no JSON object, or none holds a prediction.
    """
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            for key, pair in _pairs(_body(value)):
                pairs.setdefault(key, []).append(pair)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"{path}:{number} is no line of a run: {error}.", remedy="Name what telerag run -o wrote."
            ) from error
    if not pairs:
        raise ArtifactError(
            f"{path} holds no prediction: the run had no profile, or no lookahead.",
            remedy="Run it again without --profile none and --lookahead off.",
        )
    order = [("prefill_s", "given"), ("decode_s", "given"), *((name, "ahead") for name in AHEAD), ("join_s", "given")]
    return [_error(*key, pairs[key]) for key in order if key in pairs]


def _body(line: dict[str, Any]) -> dict[str, Any]:
    """What a run says of a question, OpenAI Batch lines included; nothing of one that failed."""
    if line.get("response"):
        body: dict[str, Any] = line["response"]["body"]["telerag"]
        return body
    return {} if line.get("error") else line


def _pairs(body: dict[str, Any]) -> Iterator[tuple[tuple[str, str], tuple[float, float]]]:
    for stage in body.get("stages", []):
        if "expected" in stage:
            for name in ("prefill_s", "decode_s"):
                yield (name, "given"), (stage["expected"][name], stage[name])
    for plan in body.get("plan", []):
        for name in AHEAD:
            yield (name, "ahead"), (plan["predicted"][name], plan["measured"][name])
        yield ("join_s", "given"), (plan["join_of_these_lists_s"], plan["measured"]["join_s"])


def _error(function: str, kind: str, pairs: list[tuple[float, float]]) -> Error:
    ratios = [predicted / measured - 1 for predicted, measured in pairs if measured]
    errors = [abs(ratio) for ratio in ratios] or [0.0]
    return Error(
        function,
        kind,
        len(pairs),
        statistics.median(predicted for predicted, _ in pairs),
        statistics.median(measured for _, measured in pairs),
        statistics.median(errors),
        max(errors),
        statistics.median(ratios) if ratios else 0.0,
    )
