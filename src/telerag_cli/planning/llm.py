"""How fast the LLM reads and writes, and what it and the link cost each other."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from telerag_cli.llm.base import Generator, Message, Request
from telerag_cli.planning.profile import DecodePoint, LlmRates, Measured, PrefillPoint
from telerag_cli.planning.timing import Effort

WORDS = (
    "river",
    "stone",
    "window",
    "paper",
    "garden",
    "number",
    "winter",
    "signal",
    "market",
    "copper",
    "engine",
    "island",
)
SHORT_PROMPT = 24
"""Words of a prompt whose reading does not matter."""
LONG_PROMPT = 256
"""Words more, to see what a longer context costs; about twice as many tokens."""
Beside = Callable[[threading.Event, threading.Event], None]
"""Called with what is set at the first token, and at the end."""
_prompts = itertools.count()


@dataclass(frozen=True)
class Written:
    """When each token of a text came, on the clock of ``time.perf_counter``."""

    came_s: tuple[float, ...]

    @property
    def mean_step_s(self) -> float:
        """Seconds between tokens, on average; 0 if there were not two."""
        steps = self.step_s()
        return float(np.mean(steps)) if steps else 0.0

    def step_s(self, began_s: float = 0.0, ended_s: float = float("inf")) -> list[float]:
        """Seconds between tokens that both came in that time."""
        inside = [moment for moment in self.came_s if began_s <= moment <= ended_s]
        return [after - before for before, after in itertools.pairwise(inside)]


def llm_rates(
    generator: Generator,
    prompts: Sequence[int],
    widths: Sequence[int],
    tokens: int,
    effort: Effort,
    advance: Callable[[int], None],
) -> LlmRates:
    """Prefill by the prompt's length and decoding by width.

    Args:
        generator: the LLM.
        prompts: tokens of prompts, ascending; those that do not fit the context are left out.
        widths: texts written together, ascending; at most what the generator writes at once.
        tokens: to write for each figure.
        effort: how long.
        advance: told of each figure.
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


def write(generator: Generator, tokens: int, beside: Beside | None = None, words: int = SHORT_PROMPT) -> Written:
    """One text of so many tokens, after a prompt of so many words; ``beside`` runs in a thread of its own meanwhile."""
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
    return Written(tuple(came_s))


def _context(generator: Generator, tokens: int, effort: Effort) -> tuple[int, float]:
    """The context that short texts are decoded in, and what a token more of it adds to a step."""
    short = generator.count_tokens(_request(SHORT_PROMPT, tokens).messages)
    base = short + tokens // 2
    words = SHORT_PROMPT + min(LONG_PROMPT, (generator.context_tokens - base - tokens) // 3)
    if words <= SHORT_PROMPT:
        return base, 0.0
    more = generator.count_tokens(_request(words, tokens).messages) - short
    slopes = []
    for _ in range(effort.runs):
        plain, longer = (write(generator, tokens).mean_step_s, write(generator, tokens, words=words).mean_step_s)
        slopes.append((longer - plain) / more)
    return base, max(float(np.median(slopes)), 0.0)


def _prefill(generator: Generator, count: int, effort: Effort) -> PrefillPoint:
    words = count
    # Words are about a token each, and the chat template adds some.
    while words > 1 and generator.count_tokens(_request(words, 1).messages) > count:
        words = max(1, words - max(1, (generator.count_tokens(_request(words, 1).messages) - count) // 2))
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
        texts: list[list[float]] = [[] for _ in range(width)]

        async def together(texts: list[list[float]] = texts) -> None:
            await asyncio.gather(
                *(generator.generate(_request(SHORT_PROMPT, tokens), _clock(came_s)) for came_s in texts)
            )

        asyncio.run(together())
        # While all of them are being written: before that, some are being read.
        all_began_s = max((came_s[0] for came_s in texts if came_s), default=0.0)
        for came_s in texts:
            steps += Written(tuple(came_s)).step_s(began_s=all_began_s)
        if time.perf_counter() - began_s > effort.most_s:
            break
    return DecodePoint(width, Measured.of(_means(steps)))


def _means(steps: Sequence[float]) -> list[float]:
    """Means of eight steps each: a text takes as long as its steps together, and not as their median."""
    if not steps:
        return [0.0]
    parts = np.array_split(np.array(steps), max(1, len(steps) // 8))
    return [float(part.mean()) for part in parts]


def _clock(came_s: list[float]) -> Callable[[str, int], None]:
    return lambda _text, _tokens: came_s.append(time.perf_counter())


def _request(words: int, tokens: int) -> Request:
    """A prompt that begins as no other does, so that nothing of it is known from before."""
    number = next(_prompts)
    random = np.random.default_rng(number)
    text = " ".join([str(1000 + number), *(WORDS[i] for i in random.integers(len(WORDS), size=words))])
    return Request([Message("user", text)], tokens, ignore_eos=True)
