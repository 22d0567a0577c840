"""Continuous batching: which tokens of which requests are computed next, and in which slot. Policy and accounting only.

A slot holds the computed tokens of one sequence. Requests join and leave between steps; prompts are read in chunks
beside those that are being answered; a beginning that a slot holds already is taken over instead of computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from telerag_cli.errors import TeleragError

MIN_SHARED = 16
"""Tokens from which on taking over a beginning, or waiting for one, beats computing it."""
_COMPARED = 64
"""Tokens that are compared at a time."""


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one slot that are computed in a step."""

    slot: int
    start: int
    """Position of the first of them, which is how many tokens the slot holds."""
    tokens: Sequence[int]
    wants_output: bool
    """Whether the token after the last of them is to be chosen."""


class Decoder(Protocol):
    """What computes. It knows how many tokens each slot holds, and goes through neighbouring slots together."""

    can_cut: bool
    """Whether a slot can be cut back to a part of its tokens other than none."""

    def decode(self, parts: Sequence[Part]) -> Sequence[Any]:
        """Compute parts, in ascending order of slots; raises TeleragError.

        Returns:
            What the next token is chosen from, for each part that wants it, in order; valid until the next call.
        """

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Replace the target slot's tokens by the first ``tokens`` of the source."""

    def cut(self, slot: int, tokens: int) -> None:
        """Keep the first ``tokens`` of a slot."""

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""


class Task(Protocol):
    """A request as the batcher sees it. How it ended is told once: by `end`, `fail` or `drop`; by then its slot is free."""

    @property
    def prompt(self) -> list[int]:
        """At least one token."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""

    def begin(self, cached_tokens: int) -> None:
        """It has a slot, in which so many tokens of its prompt are computed already."""

    def sample(self, output: Any) -> int | None:
        """The next token, chosen from the decoder's output; None if the text is complete. It does not raise."""

    def end(self) -> None:
        """Its text is complete."""

    def fail(self, error: Exception) -> None:
        """It cannot be answered."""

    def drop(self) -> None:
        """It was cancelled, and holds nothing any more."""


@dataclass(eq=False)
class Slot:
    """A sequence's place."""

    number: int
    tokens: list[int] = field(default_factory=list)
    """Computed; they stay when the task ends, for whoever begins alike."""
    pending: list[int] = field(default_factory=list)
    """To be computed next: what is left of the prompt, or the token chosen last."""
    task: Task | None = None
    reading: bool = False
    """Whether the pending tokens are the prompt's."""
    admitted: int = 0
    """When the task came, in ticks of the batcher's clock."""
    used: int = 0
    """When somebody last had use for its tokens."""


@dataclass
class Counts:
    """What was done so far, in tokens."""

    computed_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """Prompt tokens that were there already."""
    written: int = 0
    """Tokens chosen and to be computed in their turn, so all but the last of a text."""


class Batcher:
    """Requests in slots. Not safe for threads: one owns it."""

    def __init__(self, decoder: Decoder, slots: int, chunk: int) -> None:
        """Start with empty slots.

        Args:
            decoder: what computes, with that many slots, all empty.
            slots: requests at a time.
            chunk: prompt tokens in a step, of all requests together: what those being answered wait for at most.
        """
        self._decoder = decoder
        self._chunk = chunk
        self._slots = [Slot(number) for number in range(slots)]
        self._waiting: list[Task] = []
        self._clock = itertools.count(1)
        self.counts = Counts()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._busy()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._busy())

    def submit(self, task: Task) -> None:
        """Take a request on."""
        self._waiting.append(task)

    def step(self) -> None:
        """Compute one batch: a token of every answer, and a chunk of the prompts."""
        self._drop_cancelled()
        self._admit()
        shares = self._shares()
        if not shares:
            return
        slots = [self._slots[number] for number in sorted(shares)]
        parts = [_part(slot, shares[slot.number]) for slot in slots]
        try:
            outputs = iter(self._decoder.decode(parts))
        except TeleragError as error:
            self._fail(slots, error)
            return
        for slot, part in zip(slots, parts, strict=True):
            self._note_computed(slot, part)
            if part.wants_output:
                self._write(slot, next(outputs))

    def fail_all(self, error: Exception) -> None:
        """End every request with this error, without a word to the decoder: it may be the one that is broken."""
        tasks = [*self._waiting, *(slot.task for slot in self._busy() if slot.task)]
        self._waiting = []
        for slot in self._slots:
            slot.task, slot.pending, slot.tokens = None, [], []
        for task in tasks:
            task.fail(error)

    def forget(self) -> None:
        """Drop the tokens kept in slots that are free, so that what comes is computed whole."""
        for slot in self._slots:
            if slot.task is None:
                self._keep(slot, 0)

    def check_integrity(self) -> None:
        """Assert that slots, requests and decoder agree."""
        held = [slot.task for slot in self._slots if slot.task]
        assert len({id(task) for task in (*held, *self._waiting)}) == len(held) + len(self._waiting)
        for slot in self._slots:
            assert (slot.task is None) == (not slot.pending), f"slot {slot.number}: pending without a task"
            assert self._decoder.length(slot.number) == len(slot.tokens), f"slot {slot.number}: decoder differs"
            if slot.task and slot.reading:
                assert slot.tokens + slot.pending == slot.task.prompt

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.task]

    def _drop_cancelled(self) -> None:
        for task in [task for task in self._waiting if task.cancelled]:
            self._waiting.remove(task)
            task.drop()
        for slot in self._slots:
            if slot.task and slot.task.cancelled:
                task, slot.task, slot.pending = slot.task, None, []
                task.drop()

    def _admit(self) -> None:
        """Give slots to those who wait, first come first served; who waits for a beginning may be overtaken."""
        for task in list(self._waiting):
            free = [slot for slot in self._slots if slot.task is None]
            if not free:
                return
            source, shared = self._longest_beginning(task.prompt)
            if self._is_being_read(task.prompt, shared):
                continue
            self._waiting.remove(task)
            self._seat(task, self._choose_slot(free, source, shared), source, shared)

    def _longest_beginning(self, prompt: list[int]) -> tuple[Slot, int]:
        """The slot that holds most of a prompt's beginning, a free one of equals, and how much, or 0 if too little.

        One token of the prompt is always left to compute, because the next is chosen from its output.
        """
        held = [(_alike(slot.tokens, prompt), slot) for slot in self._slots]
        shared, source = max(held, key=lambda pair: (pair[0], pair[1].task is None))
        return source, shared if self._decoder.can_cut and shared >= MIN_SHARED else 0

    def _is_being_read(self, prompt: list[int], shared: int) -> bool:
        """Whether somebody is computing a longer common beginning than there is.

        Be it by one token: many may wait, and it will be there as soon as one of them could compute it.
        """
        return self._decoder.can_cut and any(
            _alike(slot.task.prompt, prompt) >= max(shared + 1, MIN_SHARED)
            for slot in self._slots
            if slot.task and slot.reading
        )

    def _choose_slot(self, free: Sequence[Slot], source: Slot, shared: int) -> Slot:
        """The source itself, if little is lost; else one that leaves the busy ones dense, and the longest unused of these.

        Each gap among the busy slots costs the decoder another pass over the weights in every step. Moving a sequence
        into a gap later would cost whatever the gap holds, which is dearer.
        """
        if source.task is None and shared and 2 * shared >= len(source.tokens):
            return source
        busy = {slot.number for slot in self._busy()}
        return min(
            free,
            key=lambda slot: (
                _runs(busy | {slot.number}),
                slot is source and bool(shared),
                slot.used if slot.tokens else 0,
                slot.number,
            ),
        )

    def _seat(self, task: Task, slot: Slot, source: Slot, shared: int) -> None:
        """Give a slot to a task, with the first ``shared`` tokens of the source in it."""
        if shared and slot is not source:
            self._decoder.copy(source.number, slot.number, shared)
            slot.tokens = source.tokens[:shared]
        else:
            self._keep(slot, shared)
        now = next(self._clock)
        source.used = now if shared else source.used
        slot.used = slot.admitted = now
        slot.task, slot.reading, slot.pending = task, True, task.prompt[shared:]
        self.counts.cached_tokens += shared
        task.begin(shared)

    def _shares(self) -> dict[int, int]:
        """How many of its pending tokens each slot computes now: one of an answer, and a chunk of all prompts together.

        Half of the chunk is for the prompt that came first, so that it ends; the others share in order of what they
        have left, so that a short one does not wait for long ones.
        """
        shares = {slot.number: 1 for slot in self._slots if slot.task and not slot.reading}
        reading = sorted((slot for slot in self._busy() if slot.reading), key=lambda slot: slot.admitted)
        if reading:
            first, room = reading[0], self._chunk
            reserved = min(len(first.pending), room // 2)
            for slot in sorted(reading[1:], key=lambda slot: len(slot.pending)):
                shares[slot.number] = min(len(slot.pending), room - reserved)
                room -= shares[slot.number]
            shares[first.number] = min(len(first.pending), room)
        return {number: share for number, share in shares.items() if share}

    def _note_computed(self, slot: Slot, part: Part) -> None:
        slot.tokens += part.tokens
        del slot.pending[: len(part.tokens)]
        if slot.reading:
            self.counts.computed_tokens += len(part.tokens)

    def _write(self, slot: Slot, output: Any) -> None:
        """Have the next token chosen; if there is none, the slot is free."""
        task = slot.task
        assert task
        slot.reading = False
        token = task.sample(output)
        if token is None:
            slot.task = None
            task.end()
        else:
            self.counts.written += 1
            slot.pending = [token]

    def _fail(self, slots: Iterable[Slot], error: Exception) -> None:
        for slot in slots:
            task, slot.task, slot.pending = slot.task, None, []
            self._keep(slot, 0)  # how far it came is unknown
            if task:
                task.fail(error)

    def _keep(self, slot: Slot, tokens: int) -> None:
        """Cut a slot. The decoder is always told: after a failure it may hold what is not noted."""
        self._decoder.cut(slot.number, tokens)
        del slot.tokens[tokens:]


def _part(slot: Slot, count: int) -> Part:
    return Part(slot.number, len(slot.tokens), slot.pending[:count], count == len(slot.pending))


def _alike(held: list[int], prompt: list[int]) -> int:
    """How many tokens of a prompt, without its last, others begin with too."""
    end = min(len(held), len(prompt) - 1)
    start = 0
    # Slices are compared in C.
    while start < end and held[start : start + _COMPARED] == prompt[start : start + _COMPARED]:
        start += _COMPARED
    while start < end and held[start] == prompt[start]:
        start += 1
    return min(start, end)


def _runs(numbers: set[int]) -> int:
    """How many runs of neighbours the numbers form."""
    return sum(number - 1 not in numbers for number in numbers)
