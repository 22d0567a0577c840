"""An engine's state in numbers, for those who watch it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from telerag_cli.engine.engine import Engine
from telerag_cli.llm.batcher import Stats
from telerag_cli.tiers.residency import Occupancy


@dataclass(frozen=True)
class Snapshot(Stats, Occupancy):
    """What an engine is doing and has done; a generator that cannot tell shows 0, except for its slots."""

    slots: int
    """Requests that the LLM serves at once."""
    arena_bytes: int
    rounds: int
    """Prefetches that have not ended."""


@runtime_checkable
class _Counting(Protocol):
    """A generator that knows what it does."""

    def stats(self) -> Stats:
        """What goes on now."""


def snapshot(engine: Engine) -> Snapshot:
    """The state now, from any thread. It takes some microseconds, and moments of two parts may differ by as much."""
    generator, tier = engine.generator, engine.retriever.tier
    stats = generator.stats() if isinstance(generator, _Counting) else Stats(0, 0, 0, 0, 0)
    return Snapshot(
        **asdict(stats),
        **asdict(tier.occupancy()),
        slots=generator.parallel,
        arena_bytes=tier.arena_bytes,
        rounds=engine.retriever.prefetches,
    )
