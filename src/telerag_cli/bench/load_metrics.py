"""Arithmetic of a load: when requests arrive, and what vLLM's fields say of the answers. Pure functions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from telerag_cli.arrays import DoubleArray
from telerag_cli.errors import UsageError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
"""In vLLM's words and order."""
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
"""Those that a request has one of."""
DEFAULT_PERCENTILES = (50.0, 90.0, 99.0)
ARRIVAL_STREAM = 0
"""See `load_prompts.ORDER_STREAM`."""


@dataclass(frozen=True)
class Answer:
    """What came of one request. Times count from the moment it was sent."""

    sent_s: float
    """By `time.perf_counter`."""
    latency_s: float
    """Until the last event of the stream, or until it failed."""
    text_s: tuple[float, ...]
    """When pieces of text came."""
    text: str
    input_tokens: int | None
    """By the server's usage; None if it sent none."""
    usage_tokens: int | None
    """Tokens of the answer by the server's usage; None if it sent none."""
    error: str = ""
    """Why it failed; empty if the answer is whole."""

    @property
    def output_tokens(self) -> int:
        """By the usage, or else the pieces of text, which is fewer if a server sends several tokens at a time."""
        return len(self.text_s) if self.usage_tokens is None else self.usage_tokens

    @property
    def ttft_s(self) -> float:
        """Time to the first text; for an empty answer, to its end."""
        return self.text_s[0] if self.text_s else self.latency_s

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Times between one piece of text and the next."""
        return tuple(later - earlier for earlier, later in zip(self.text_s, self.text_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None if there is none."""
        tokens = self.output_tokens
        return (self.latency_s - self.ttft_s) / (tokens - 1) if tokens > 1 else None


@dataclass(frozen=True)
class Wanted:
    """Which figures are made."""

    metrics: tuple[str, ...] = tuple(METRICS)
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    """By metric, the most that a good request may have."""

    @classmethod
    def parse(cls, metrics: str, percentiles: str, goodput: Sequence[str]) -> Wanted:
        """From ``ttft,e2el``, ``50,99.9`` and ``ttft:500`` or ``"ttft:500 e2el:3000"``.

        Raises:
            UsageError: a metric is none, or a number is none or out of its range.
        """
        names = tuple(name.strip() for name in metrics.split(",") if name.strip())
        for name in names:
            _known(name, METRICS, "--percentile-metrics")
        shares = tuple(_number(text, "--metric-percentiles", 100.0) for text in percentiles.split(",") if text.strip())
        limits: dict[str, float] = {}
        for pair in " ".join(goodput).replace(",", " ").split():
            name, colon, limit = pair.partition(":")
            if not colon:
                raise UsageError(
                    f"--goodput has '{pair}', which is no METRIC:MILLISECONDS.", remedy="Write it like ttft:500."
                )
            _known(name, GOODPUT_METRICS, "--goodput")
            limits[name] = _number(limit, "--goodput", math.inf)
        return cls(names, shares, limits)


def _known(name: str, names: Sequence[str] | Mapping[str, str], option: str) -> None:
    if name not in names:
        raise UsageError(f"{option} has '{name}', which is none of {', '.join(names)}.", remedy="Correct it.")


def _number(text: str, option: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        wanted = f"a number from 0 to {most:g}" if most < math.inf else "a number of 0 or more"
        raise UsageError(f"{option} has '{text}', which is not {wanted}.", remedy="Correct it.")
    return value


def arrivals_s(count: int, rate: float, burstiness: float, seed: int) -> DoubleArray:
    """When requests are sent, in seconds from the start: vLLM's arrivals.

    The times between them are gamma distributed with shape ``burstiness`` and mean ``1 / rate``: 1 is a Poisson
    process, less comes in bursts, more is more even, infinity is a clock. As in vLLM they are stretched a little so
    that the last request comes at ``count / rate``, for the offered rate to be the one asked for whatever the seed.

    Args:
        count: requests.
        rate: of requests a second; infinity sends all at once.
        burstiness: above 0.
        seed: decides the draws.

    Returns:
        (count,) ascending.
    """
    if math.isinf(rate):
        return np.zeros(count)
    if math.isinf(burstiness):
        return np.arange(1, count + 1) / rate
    draw = np.random.default_rng((seed, ARRIVAL_STREAM))
    times: DoubleArray = np.cumsum(draw.gamma(burstiness, 1 / (rate * burstiness), count))
    # A very small burstiness can draw nothing but zeros.
    return times * (count / rate / times[-1]) if times[-1] else times


def figures(answers: Sequence[Answer], duration_s: float, wanted: Wanted) -> dict[str, Any]:
    """What came in a time, in vLLM's fields.

    ``max_concurrent_requests`` is the most that were under way at one moment; vLLM counts those that share a second.
    ``max_output_tokens_per_s`` is, as in vLLM, of the best whole second; a piece of text counts as its share of the
    answer's tokens, and not as one. A figure of which nothing was measured is left out: percentiles if no answer has
    the metric, tokens of prompts if the server does not tell them.

    Args:
        answers: of all requests that ended, those that failed too.
        duration_s: from the start to the last end.
        wanted: which of them are made.
    """
    whole = [answer for answer in answers if not answer.error]
    output_tokens = sum(answer.output_tokens for answer in whole)
    values: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(whole),
        "failed": len(answers) - len(whole),
        "total_output_tokens": output_tokens,
        "request_throughput": len(whole) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "max_output_tokens_per_s": best_second_tokens(whole),
        "max_concurrent_requests": most_at_once(answers),
    }
    inputs = [answer.input_tokens for answer in whole if answer.input_tokens is not None]
    if len(inputs) == len(whole):
        values["total_input_tokens"] = sum(inputs)
        values["total_token_throughput"] = (sum(inputs) + output_tokens) / duration_s
    if wanted.goodput_ms:
        good = sum(is_good(answer, wanted.goodput_ms) for answer in whole)
        values["request_goodput"] = good / duration_s
    for metric in wanted.metrics:
        values |= spread(metric, samples_ms(metric, whole), wanted.percentiles)
    return values


def samples_ms(metric: str, answers: Sequence[Answer]) -> list[float]:
    """All values of a metric; for ``itl`` those of all answers together."""
    match metric:
        case "ttft":
            found = [answer.ttft_s for answer in answers]
        case "tpot":
            found = [answer.tpot_s for answer in answers if answer.tpot_s is not None]
        case "itl":
            found = [gap for answer in answers for gap in answer.itl_s]
        case _:
            found = [answer.latency_s for answer in answers]
    return [1e3 * value for value in found]


def spread(metric: str, values_ms: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """``mean_``, ``median_``, ``std_`` and ``pXX_`` of a metric; nothing of no values."""
    if not values_ms:
        return {}
    found = {"mean": np.mean(values_ms), "median": np.median(values_ms), "std": np.std(values_ms)}
    found |= {f"p{share:g}": np.percentile(values_ms, share) for share in percentiles}
    return {f"{name}_{metric}_ms": float(value) for name, value in found.items()}


def is_good(answer: Answer, limits_ms: Mapping[str, float]) -> bool:
    """Whether an answer keeps all limits; one of a single token has a ``tpot`` of 0."""
    has = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.latency_s}
    return all(1e3 * has[metric] <= limit for metric, limit in limits_ms.items())


def most_at_once(answers: Sequence[Answer]) -> int:
    """Requests under way at one moment, at most; one that begins as another ends is not at once with it."""
    changes = [(answer.sent_s, 1) for answer in answers]
    changes += [(answer.sent_s + answer.latency_s, -1) for answer in answers]
    running = most = 0
    for _at_s, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def best_second_tokens(answers: Sequence[Answer]) -> float:
    """Tokens that came in the best of the seconds counted from the first sending."""
    if not answers:
        return 0.0
    start_s = min(answer.sent_s for answer in answers)
    tokens: defaultdict[int, float] = defaultdict(float)
    for answer in answers:
        # Mostly 1; with speculation or a busy server a piece has several tokens.
        each = answer.output_tokens / len(answer.text_s) if answer.text_s else 0.0
        for at_s in answer.text_s:
            tokens[int(answer.sent_s + at_s - start_s)] += each
    return max(tokens.values(), default=0.0)
