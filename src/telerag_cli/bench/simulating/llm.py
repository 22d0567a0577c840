"""An LLM with continuous batching: the product's own batcher over a decoder that only takes time."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import simpy
from simpy.events import ProcessGenerator

from telerag_cli.bench.simulating.clocks import Busy, Device
from telerag_cli.bench.simulating.rates import Rates
from telerag_cli.bench.simulating.work import Text
from telerag_cli.llm.batcher import Batcher, Part

OnPick = Callable[[int], None]
"""Told how many tokens of a text are chosen."""


class _Decoder:
    """A `batcher.Decoder` that notes how long each step would take."""

    can_cut = True

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._lengths = [0] * rates.slots
        self.took_s = 0.0

    def decode(self, parts: Sequence[Part]) -> Sequence[Any]:
        """See `batcher.Decoder`."""
        contexts, reading = [], []
        for part in parts:
            count = len(part.tokens)
            if count == 1 and part.wants_output:
                contexts.append(part.start)
            else:
                reading.append((part.start, count))
            self._lengths[part.slot] = part.start + count
        self.took_s += self._rates.step_s(contexts, reading)
        return [None for part in parts if part.wants_output]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See `batcher.Decoder`."""
        assert tokens <= self._lengths[source]
        self._lengths[target] = tokens

    def cut(self, slot: int, tokens: int) -> None:
        """See `batcher.Decoder`."""
        self._lengths[slot] = min(self._lengths[slot], tokens)

    def length(self, slot: int) -> int:
        """See `batcher.Decoder`."""
        return self._lengths[slot]


class _Job:
    """A `batcher.Task`: a text that ends when so many tokens are chosen."""

    cancelled = False

    def __init__(
        self, text: Text, prompt: list[int], done: simpy.Event, told: list[Callable[[], object]], on_pick: OnPick
    ) -> None:
        self.prompt = prompt
        self._text = text
        self._done = done
        self._told = told
        self._on_pick = on_pick
        self._count = 0

    def begin(self, cached_tokens: int) -> None:
        """See `batcher.Task`."""

    def sample(self, _output: Any) -> int | None:
        """See `batcher.Task`. What follows from it comes when the step is over."""
        self._count += 1
        count = self._count
        self._told.append(lambda: self._on_pick(count))
        return None if count >= self._text.picks else 0

    def end(self) -> None:
        """See `batcher.Task`."""
        self._told.append(self._done.succeed)

    def fail(self, error: Exception) -> None:
        """See `batcher.Task`."""
        raise error

    def drop(self) -> None:
        """See `batcher.Task`; nobody cancels here."""
        raise AssertionError


class Llm:
    """Writes texts on a device that others may use too."""

    def __init__(self, env: simpy.Environment, rates: Rates, device: Device, moving: Busy) -> None:
        """Begin with nothing to do.

        Args:
            env: the clock.
            rates: how fast it is.
            device: what it runs on.
            moving: whether lists are moved, which slows it.
        """
        self._env = env
        self._rates = rates
        self._device = device
        self._moving = moving
        self._decoder = _Decoder(rates)
        self._batcher = Batcher(self._decoder, rates.slots, rates.chunk)
        self._told: list[Callable[[], object]] = []
        self._called = env.event()
        self._own = itertools.count(1)
        self.writing = Busy(env)
        env.process(self._work())

    def write(self, text: Text, on_pick: OnPick = lambda _count: None) -> simpy.Event:
        """Happens when the text is written."""
        done = self._env.event()
        # What is common to a stage's prompts is one number for all of them; the rest is nobody else's.
        common, own = _number(text.stage), next(self._own)
        shared = min(text.common_tokens, text.prompt_tokens - 1)
        prompt = [common] * shared + [own] * (text.prompt_tokens - shared)
        self._batcher.submit(_Job(text, prompt, done, self._told, on_pick))
        if not self._called.triggered:
            self._called.succeed()
        return done

    def _work(self) -> ProcessGenerator:
        while True:
            if self._batcher.idle:
                self._called = self._env.event()
                yield self._called
            self.writing.enter()
            while not self._batcher.idle:
                self._decoder.took_s = 0.0
                self._batcher.step()
                slowed = self._rates.decoding_slowed if self._moving.now else 1.0
                yield self._device.serve(self._decoder.took_s * slowed)
                told, self._told[:] = list(self._told), []
                for tell in told:
                    tell()
            self.writing.leave()


def _number(stage: str) -> int:
    """Of a stage, below all that are a prompt's own; the same in every run."""
    return -1 - int.from_bytes(hashlib.sha256(stage.encode()).digest()[:6], "big")
