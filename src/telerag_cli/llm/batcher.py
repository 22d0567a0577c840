"""Continuous batching: which tokens of which requests are computed next, and in which slot. Policy and accounting only.

A slot holds the computed tokens of one sequence. Requests join and leave between steps; prompts are prefilled in chunks
beside those that are being answered; a prefix that a slot holds already is reused instead of computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

MIN_SHARED = 16
"""Tokens from which on reusing a prefix, or waiting for one, beats computing it."""
_COMPARED = 64
"""Tokens that are compared at a time."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one slot that are computed in a step."""

    slot: int
    start: int
    """Position of the first of them, which is how many tokens the slot holds."""
    tokens: Sequence[int]
    wants_output: bool
    """Whether the token after the last of them is to be sampled."""


@dataclass(frozen=True)
class Stats:
    """What goes on, and what was done since the start."""

    running: int
    """Requests with a slot."""
    waiting: int
    computed_tokens: int
    """Prompt tokens that were computed."""
    cached_tokens: int
    """Prompt tokens that had been computed for another request."""
    written_tokens: int
    """All but the last of each text."""


class Decoder(Protocol):
    """What computes. It knows how many tokens each slot holds, and decodes neighbouring slots together."""

    can_cut: bool
    """Whether a slot can be cut back to a prefix that is not empty."""

    def decode(self, chunks: Sequence[Chunk]) -> Sequence[Any]:
        """Compute chunks, in ascending order of slots; what it raises fails those that it is raised for alone.

        Returns:
            What the next token is sampled from, for each chunk that wants it, in order; valid until the next call.
        """

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Replace the target slot's tokens by the first ``tokens`` of the source."""

    def cut(self, slot: int, tokens: int) -> None:
        """Keep the first ``tokens`` of a slot."""

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""


class BatchRequest(Protocol):
    """A request as the batcher sees it. It ends once, and its slot is free by then."""

    @property
    def prompt(self) -> list[int]:
        """At least one token."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""

    def begin(self, cached_tokens: int) -> None:
        """It has a slot, which holds so many tokens of its prompt."""

    def sample(self, output: Any) -> int | None:
        """The next token, sampled from the decoder's output; None if the text is complete. It does not raise."""

    def end(self, error: Exception | None = None) -> None:
        """Its text is complete, it was cancelled, or it cannot be answered, by this error."""


@dataclass(eq=False)
class Slot:
    """A sequence's place."""

    number: int
    tokens: list[int] = field(default_factory=list)
    """Computed; they stay when the request ends, for later ones with the same prefix."""
    pending: list[int] = field(default_factory=list)
    """To be computed next: what is left of the prompt, or the token sampled last."""
    request: BatchRequest | None = None
    prefilling: bool = False
    """Whether the pending tokens are the prompt's."""
    admitted: int = 0
    """When the request came, in ticks of the batcher's clock."""
    last_used: int = 0
    """When its tokens were last of use."""


class Batcher:
    """Requests in slots. Not safe for threads: one owns it."""

    def __init__(self, decoder: Decoder, slots: int, prefill_chunk: int) -> None:
        """Start with a decoder of that many slots, all empty.

        ``prefill_chunk`` is in prompt tokens per step, of all requests together; it bounds what the others wait for.
        """
        self._decoder = decoder
        self._prefill_chunk = prefill_chunk
        self._slots = [Slot(number) for number in range(slots)]
        self._waiting: list[BatchRequest] = []
        self._clock = itertools.count(1)
        self._computed_tokens = self._cached_tokens = self._written_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._busy()

    @property
    def stats(self) -> Stats:
        """What goes on now."""
        running, waiting = len(self._busy()), len(self._waiting)
        return Stats(running, waiting, self._computed_tokens, self._cached_tokens, self._written_tokens)

    def submit(self, request: BatchRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def step(self) -> None:
        """Compute one batch: a token of every answer, and a chunk of the prompts."""
        self._abort_cancelled()
        self._admit()
        counts = self._schedule()
        slots = [self._slots[number] for number in sorted(counts)]
        chunks = []
        for slot in slots:
            count = counts[slot.number]
            chunks.append(Chunk(slot.number, len(slot.tokens), slot.pending[:count], count == len(slot.pending)))
        if chunks:
            self._compute(slots, chunks)

    def fail_all(self, error: Exception) -> None:
        """End every request with this error and leave the decoder alone: it may be what is broken."""
        requests = [*self._waiting, *(slot.request for slot in self._busy() if slot.request)]
        self._waiting = []
        for slot in self._slots:
            slot.request, slot.pending, slot.tokens = None, [], []
        for request in requests:
            request.end(error)

    def forget(self) -> None:
        """Drop the tokens kept in free slots, so that what comes is computed whole."""
        for slot in self._slots:
            if slot.request is None:
                self._cut(slot, 0)

    def check_integrity(self) -> None:
        """Assert that slots, requests and decoder agree."""
        held = [slot.request for slot in self._slots if slot.request]
        assert len({id(request) for request in (*held, *self._waiting)}) == len(held) + len(self._waiting)
        for slot in self._slots:
            assert (slot.request is None) == (not slot.pending), f"slot {slot.number}: pending without a request"
            assert self._decoder.length(slot.number) == len(slot.tokens), f"slot {slot.number}: decoder differs"
            if slot.request and slot.prefilling:
                assert slot.tokens + slot.pending == slot.request.prompt

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.request]

    def _abort_cancelled(self) -> None:
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            request.end()
        for slot in self._slots:
            if slot.request and slot.request.cancelled:
                request, slot.request, slot.pending = slot.request, None, []
                request.end()

    def _admit(self) -> None:
        """Give free slots to waiting requests in order; one that waits for a prefix may be overtaken."""
        for request in list(self._waiting):
            free = [slot for slot in self._slots if slot.request is None]
            if not free:
                return
            source, shared = self._longest_prefix(request.prompt)
            if self._is_being_computed(request.prompt, shared):
                continue
            self._waiting.remove(request)
            self._start(request, self._choose_slot(free, source, shared), source, shared)

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot, int]:
        """The slot that holds most of a prompt's prefix, preferably a free one, and how much, or 0 if too little.

        One token of the prompt is always left to compute, because the next is sampled from its output.
        """
        held = [(_common_prefix(slot.tokens, prompt), slot) for slot in self._slots]
        shared, source = max(held, key=lambda pair: (pair[0], pair[1].request is None))
        return source, shared if self._decoder.can_cut and shared >= MIN_SHARED else 0

    def _is_being_computed(self, prompt: list[int], shared: int) -> bool:
        """Whether a longer common prefix than there is now is being prefilled.

        Even if it is longer by one token: many may wait, and it is there as soon as one of them could compute it.
        """
        return self._decoder.can_cut and any(
            _common_prefix(slot.request.prompt, prompt) >= max(shared + 1, MIN_SHARED)
            for slot in self._slots
            if slot.request and slot.prefilling
        )

    def _choose_slot(self, free: Sequence[Slot], source: Slot, shared: int) -> Slot:
        """The source itself if little is lost; else one that keeps the busy slots dense, least recently used first.

        Each gap among the busy slots costs the decoder another pass over the weights in every step. Moving a sequence
        into a gap later would cost whatever the gap holds, which is dearer.
        """
        if source.request is None and shared and 2 * shared >= len(source.tokens):
            return source
        busy = {slot.number for slot in self._busy()}
        return min(
            free,
            key=lambda slot: (
                _runs(busy | {slot.number}),
                slot is source and bool(shared),
                slot.last_used if slot.tokens else 0,
                slot.number,
            ),
        )

    def _start(self, request: BatchRequest, slot: Slot, source: Slot, shared: int) -> None:
        """Give a slot to a request, with the first ``shared`` tokens of the source in it."""
        if shared and slot is not source:
            self._decoder.copy(source.number, slot.number, shared)
            slot.tokens = source.tokens[:shared]
        else:
            self._cut(slot, shared)
        now = next(self._clock)
        source.last_used = now if shared else source.last_used
        slot.last_used = slot.admitted = now
        slot.request, slot.prefilling, slot.pending = request, True, request.prompt[shared:]
        self._cached_tokens += shared
        request.begin(shared)

    def _schedule(self) -> dict[int, int]:
        """How many pending tokens each slot computes now: one of an answer, and a chunk of all prompts together.

        Half of the chunk is for the prompt that came first, so that it ends; the others share in order of what they
        have left, so that a short one does not wait for long ones.
        """
        counts = {slot.number: 1 for slot in self._busy() if not slot.prefilling}
        prefilling = sorted((slot for slot in self._busy() if slot.prefilling), key=lambda slot: slot.admitted)
        if prefilling:
            first, room = prefilling[0], self._prefill_chunk
            reserved = min(len(first.pending), room // 2)
            for slot in sorted(prefilling[1:], key=lambda slot: len(slot.pending)):
                counts[slot.number] = min(len(slot.pending), room - reserved)
                room -= counts[slot.number]
            counts[first.number] = min(len(first.pending), room)
        return {number: count for number, count in counts.items() if count}

    def _compute(self, slots: Sequence[Slot], chunks: Sequence[Chunk]) -> None:
        """Have the chunks of these slots computed and sample. If that fails, each is tried alone: one may be why."""
        try:
            outputs = iter(self._decoder.decode(chunks))
        except Exception as error:
            if len(slots) == 1 or not self._decoder.can_cut:
                self._fail(slots, error)
                return
            for slot in slots:
                self._cut(slot, len(slot.tokens))
            for slot, chunk in zip(slots, chunks, strict=True):
                self._compute([slot], [chunk])
            return
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.tokens += chunk.tokens
            del slot.pending[: len(chunk.tokens)]
            if slot.prefilling:
                self._computed_tokens += len(chunk.tokens)
            if chunk.wants_output:
                self._sample(slot, next(outputs))

    def _sample(self, slot: Slot, output: Any) -> None:
        request = slot.request
        assert request
        slot.prefilling = False
        token = request.sample(output)
        if token is None:
            slot.request = None
            request.end()
        else:
            self._written_tokens += 1
            slot.pending = [token]

    def _fail(self, slots: Iterable[Slot], error: Exception) -> None:
        for slot in slots:
            request, slot.request, slot.pending = slot.request, None, []
            self._cut(slot, 0)  # how far it came is unknown
            if request:
                request.end(error)

    def _cut(self, slot: Slot, tokens: int) -> None:
        """Cut a slot. The decoder is always told: after a failure it may hold more than is noted here."""
        self._decoder.cut(slot.number, tokens)
        del slot.tokens[tokens:]


def _common_prefix(held: list[int], prompt: list[int]) -> int:
    """Length of the common prefix of ``held`` and a prompt without its last token."""
    end = min(len(held), len(prompt) - 1)
    start = 0
    # Slices are compared in C.
    while start < end and held[start : start + _COMPARED] == prompt[start : start + _COMPARED]:
        start += _COMPARED
    while start < end and held[start] == prompt[start]:
        start += 1
    return min(start, end)


def _runs(numbers: set[int]) -> int:
    """Number of runs of consecutive numbers."""
    return sum(number - 1 not in numbers for number in numbers)
