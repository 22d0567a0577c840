"""Speed at which the LLM reads and writes, and what it and other work cost each other."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from telerag_cli.llm.base import Generator, Message, Request
from telerag_cli.planning.profile import DecodePoint, LlmRates, Measured, PrefillPoint
from telerag_cli.planning.timing import Effort
from telerag_cli.progress import Advance

WORDS = ("river", "stone", "window", "paper", "garden", "number", "winter", "signal", "market", "copper", "engine")
SHORT_PROMPT = 24
"""Words of a prompt whose reading does not matter."""
LONG_PROMPT = 256
"""Words more, to see what a longer context costs; about twice as many tokens."""
Beside = Callable[[threading.Event, threading.Event], None]
"""Called with events that are set at the first token and at the end."""
_prompts = itertools.count()


def steps_s(came_s: Sequence[float], from_s: float = 0.0) -> list[float]:
    """Return the times between tokens from this moment on, by when each came on ``time.perf_counter``'s clock."""
    return [after - before for before, after in itertools.pairwise(each for each in came_s if each >= from_s)]


def mean_step_s(came_s: Sequence[float]) -> float:
    """Return the mean time between tokens; 0 if there were not two."""
    return float(np.mean(steps_s(came_s) or [0.0]))


def llm_rates(
    generator: Generator, prompts: Sequence[int], widths: Sequence[int], tokens: int, effort: Effort, advance: Advance
) -> LlmRates:
    """Measure prefill by the prompt's length and decoding by width.

    ``prompts`` are lengths in tokens, and those that do not fit the context are left out; ``widths`` are numbers of
    texts written together, at most what the generator writes at once. Both ascend. Each figure takes ``tokens``, and
    then ``advance`` is called.
    """
    prefill, decode = [], []
    for count in (count for count in prompts if count + 2 < generator.context_tokens):
        prefill.append(_prefill(generator, count, effort))
        advance(1)
        if prefill[-1].took_s.value > effort.most_s / 2:
            break  # the next, longer one would take too long
    for width in (width for width in widths if width <= generator.parallel):
        decode.append(_decode(generator, width, tokens, effort))
        advance(1)
    return LlmRates(tuple(prefill), tuple(decode), *_context(generator, tokens, effort))


def write(generator: Generator, tokens: int, beside: Beside | None = None, words: int = SHORT_PROMPT) -> list[float]:
    """Write a text of so many tokens after a prompt of so many words, while ``beside`` runs in a thread of its own.

    Returns when each token came.
    """
    begun, ended = threading.Event(), threading.Event()
    thread = None if beside is None else threading.Thread(target=beside, args=(begun, ended), name="beside")
    came_s: list[float] = []

    def on_text(_text: str, _tokens: int) -> None:
        came_s.append(time.perf_counter())
        begun.set()

    if thread:
        thread.start()
    try:
        asyncio.run(generator.generate(_request(words, tokens), on_text))
    finally:
        begun.set()
        ended.set()
        if thread:
            thread.join()
    return came_s


def _context(generator: Generator, tokens: int, effort: Effort) -> tuple[int, float]:
    """Return the context in which short texts are decoded, and what a token more of it adds to a step."""
    short = generator.count_tokens(_request(SHORT_PROMPT, tokens).messages)
    base = short + tokens // 2
    words = SHORT_PROMPT + min(LONG_PROMPT, (generator.context_tokens - base - tokens) // 3)
    if words <= SHORT_PROMPT:
        return base, 0.0
    more = generator.count_tokens(_request(words, tokens).messages) - short
    pairs = [(write(generator, tokens), write(generator, tokens, words=words)) for _ in range(effort.runs)]
    slopes = [(mean_step_s(longer) - mean_step_s(plain)) / more for plain, longer in pairs]
    return base, max(float(np.median(slopes)), 0.0)


def _prefill(generator: Generator, count: int, effort: Effort) -> PrefillPoint:
    words = count
    # Words are about a token each, and the chat template adds some.
    while words > 1 and (excess := generator.count_tokens(_request(words, 1).messages) - count) > 0:
        words = max(1, words - max(1, excess // 2))
    lengths, took_s = [], []
    for _ in range(effort.runs + 1):
        generation = asyncio.run(generator.generate(_request(words, 1)))
        lengths.append(generation.prompt_tokens - generation.cached_tokens)
        took_s.append(generation.prefill_s)
        if sum(took_s) > effort.most_s:
            break
    return PrefillPoint(round(float(np.median(lengths))), Measured.of(took_s))


def _decode(generator: Generator, width: int, tokens: int, effort: Effort) -> DecodePoint:
    steps: list[float] = []
    began_s = time.perf_counter()
    for _ in range(effort.runs):
        texts = asyncio.run(_together(generator, width, tokens))
        # While all of them are being written: before that, some are being read.
        all_began_s = max((came_s[0] for came_s in texts if came_s), default=0.0)
        for came_s in texts:
            steps += steps_s(came_s, all_began_s)
        if time.perf_counter() - began_s > effort.most_s:
            break
    # Means of eight steps each: a text takes as long as its steps together, and not as their median.
    parts = np.array_split(np.array(steps or [0.0]), max(1, len(steps) // 8))
    return DecodePoint(width, Measured.of([float(part.mean()) for part in parts]))


async def _together(generator: Generator, width: int, tokens: int) -> list[list[float]]:
    texts: list[list[float]] = [[] for _ in range(width)]

    def clock(came_s: list[float]) -> Callable[[str, int], None]:
        return lambda _text, _tokens: came_s.append(time.perf_counter())

    await asyncio.gather(*(generator.generate(_request(SHORT_PROMPT, tokens), clock(came_s)) for came_s in texts))
    return texts


def _request(words: int, tokens: int) -> Request:
    """Make a prompt that begins as no other does, so that nothing of it is cached."""
    number = next(_prompts)
    random = np.random.default_rng(number)
    text = " ".join([str(1000 + number), *(WORDS[i] for i in random.integers(len(WORDS), size=words))])
    return Request([Message("user", text)], tokens, ignore_eos=True)
