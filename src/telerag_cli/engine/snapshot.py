"""An engine's state in numbers, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from telerag_cli.engine.engine import Engine
from telerag_cli.llm.batcher import Stats


@dataclass(frozen=True)
class Snapshot:
    """What an engine is doing and has done; a generator that cannot tell shows 0, except for its slots."""

    slots: int
    """Requests that the LLM serves at once."""
    running: int
    """Requests with a slot."""
    waiting: int
    """Requests without one yet."""
    computed_tokens: int
    """Prompt tokens computed since the start."""
    cached_tokens: int
    """Prompt tokens since the start that were cached from another request."""
    written_tokens: int
    """Tokens written since the start."""
    arena_bytes: int
    resident_bytes: int
    moving_bytes: int
    """Room reserved for lists on their way."""
    lists_resident: int
    lists_moving: int
    references: int
    """Uses of lists by running queries."""
    rounds: int
    """Prefetches that have not ended."""


@runtime_checkable
class _Counting(Protocol):
    """A generator that knows what it does."""

    def stats(self) -> Stats:
        """What goes on now."""


def snapshot(engine: Engine) -> Snapshot:
    """The state now, from any thread. It takes some microseconds, and moments of two parts may differ by as much."""
    generator, retriever = engine.generator, engine.retriever
    stats = generator.stats() if isinstance(generator, _Counting) else None
    tier = retriever.tier
    held = tier.occupancy()
    return Snapshot(
        slots=generator.parallel,
        running=stats.running if stats else 0,
        waiting=stats.waiting if stats else 0,
        computed_tokens=stats.computed_tokens if stats else 0,
        cached_tokens=stats.cached_tokens if stats else 0,
        written_tokens=stats.written_tokens if stats else 0,
        arena_bytes=tier.arena_bytes,
        resident_bytes=held.resident_bytes,
        moving_bytes=held.moving_bytes,
        lists_resident=held.lists_resident,
        lists_moving=held.lists_moving,
        references=held.references,
        rounds=retriever.prefetches,
    )
