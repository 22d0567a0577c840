"""One replica in simulated time: its LLM, link, arena and the thread that retrieves.

What is moved, kept, evicted and found is decided by the product's own `Prefetcher`, `FastTier` and `Residency`;
what a text waits for in the LLM, by its own `Batcher`. Here are only the clocks, and the way of a join without its
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy
from simpy.events import ProcessGenerator

from telerag_cli.arrays import BoolArray, FloatArray, IntArray
from telerag_cli.bench.simulating.clocks import Busy, Device
from telerag_cli.bench.simulating.llm import Llm
from telerag_cli.bench.simulating.rates import Host, Rates
from telerag_cli.bench.simulating.work import Ahead, Call, Follow, Lookup, Question, Text
from telerag_cli.config import CacheKind
from telerag_cli.engine.refinement_embedder import ALLOWANCE_S, SHARE
from telerag_cli.engine.retrieval import MAX_SEARCHES
from telerag_cli.errors import TeleragError
from telerag_cli.index.artifact import Index
from telerag_cli.prefetch.order import PATIENT_CHECKPOINTS, due
from telerag_cli.prefetch.prefetcher import Prefetch, Prefetcher
from telerag_cli.retrieval.join import RETRY_S
from telerag_cli.tiers.tier import FastTier, size_arena
from telerag_cli.tiers.transport import Arrived, Move


@dataclass(frozen=True)
class Tier:
    """The fast memory of each replica."""

    arena_bytes: int
    depth: int
    """Moves under way at once."""
    cache: CacheKind = CacheKind.FREQUENCY
    cache_fraction: float = 0.5
    budget_bytes: int | None = None
    """That lookahead may move in one round."""


@dataclass
class Counts:
    """Of lists and bytes, summed over retrievals."""

    lists_wanted: int = 0
    lists_hit: int = 0
    bytes_wanted: int = 0
    bytes_moved: int = 0
    """By lookahead."""
    bytes_missed: int = 0
    """Neither there nor on their way when the query came."""
    bytes_linked: int = 0
    """That passed the link, whoever asked for them."""


class SharedHost:
    """What the replicas of one machine share, as clocks."""

    def __init__(self, env: simpy.Environment, host: Host, rates: Rates) -> None:
        self.slow = Device(env, host.slow_bytes_per_s, rates.link_bytes_per_s)
        self.scoring = Device(env, host.scored_bytes_per_s) if np.isfinite(host.scored_bytes_per_s) else None


class Link:
    """A `Transport`: moves in turn, some at a time, over what the replicas of a host share."""

    note: str | None = None

    def __init__(
        self, env: simpy.Environment, rates: Rates, depth: int, slow: Device, moving: Busy, writing: Callable[[], bool]
    ) -> None:
        self.depth = depth
        self._env = env
        self._rates = rates
        self._slow = slow
        self._moving = moving
        self._writing = writing
        self._waiting: simpy.Store = simpy.Store(env)
        self.bytes_moved = 0
        env.process(self._work())

    def submit(self, moves: Sequence[Move], arrived: Arrived) -> None:
        """See `Transport`."""
        for start in range(0, len(moves), self.depth):
            self._moving.enter()
            self._waiting.put((moves[start : start + self.depth], arrived))

    def close(self) -> None:
        """See `Transport`."""

    def _work(self) -> ProcessGenerator:
        while True:
            moves, arrived = yield self._waiting.get()
            nbytes = sum(move.nbytes for move in moves)
            slowed = self._rates.beside_llm if self._writing() else 1.0
            yield self._env.timeout(len(moves) * self._rates.transfer_s)
            yield self._slow.serve(nbytes / slowed)
            self.bytes_moved += nbytes
            self._moving.leave()
            arrived(moves, None)


class _NoScorer:
    """A `Scorer` of nothing: only the tier's own table is kept."""

    def __init__(self, nlist: int) -> None:
        self.table = np.zeros((nlist, 3), np.uint64)

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """Never called: the simulated join counts what it would score."""
        raise AssertionError("there is nothing to be scored")

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class _Rounds:
    """The lookahead of one question that has not been retrieved from."""

    begun: list[Prefetch] = field(default_factory=list)
    wanted: bool = True
    """Whether what has not begun yet still should."""


@dataclass(frozen=True, eq=False)
class _Asked:
    lookup: Lookup
    rounds: Sequence[Prefetch]
    done: simpy.Event


class Replica:
    """Answers the questions of the micro-batches that it is given."""

    def __init__(
        self, env: simpy.Environment, number: int, index: Index, rates: Rates, tier: Tier, host: SharedHost
    ) -> None:
        """Begin with an empty arena.

        Args:
            env: the clock.
            number: its own.
            index: whose lists are moved; nothing of it is read but how long they are.
            rates: how fast it is.
            tier: its fast memory.
            host: what it shares with others.

        Raises:
            UsageError: the arena is smaller than the largest list.
        """
        self.number = number
        self._env = env
        self._rates = rates
        self._tier_options = tier
        self._host = host
        self._processor = Device(env, 1.0)
        self.moving, self.awaiting, self.scoring, self.answering = Busy(env), Busy(env), Busy(env), Busy(env)
        on = Device(env, 1.0) if rates.llm_apart else self._processor
        self.llm = Llm(env, rates, on, self.moving)
        self._link = Link(env, rates, tier.depth, host.slow, self.moving, lambda: self.llm.writing.now)
        arena = size_arena(index, tier.arena_bytes, "--fast-memory")
        self._tier = FastTier(index, arena, self._link, _NoScorer(index.manifest.nlist), cache=tier.cache)
        self._prefetcher = Prefetcher(self._tier)
        self._nlist = index.manifest.nlist
        self._asked: simpy.Store = simpy.Store(env)
        self._sketches = _Sketches(env, self._processor, rates.sketch_s)
        self._counts = Counts()
        self.micro_batches = 0
        env.process(self._retrieve())

    @property
    def counts(self) -> Counts:
        """What was found and moved so far."""
        self._counts.bytes_linked = self._link.bytes_moved
        return self._counts

    @property
    def resident(self) -> BoolArray:
        """Lists in the arena or on their way, shape (nlist,)."""
        mask: BoolArray = ~self._tier.absent()
        return mask

    def check_integrity(self) -> None:
        """Assert the invariants of the arena's accounting."""
        self._tier.check_integrity()

    def run(self, questions: Sequence[Question], answered: Callable[[int], None]) -> ProcessGenerator:
        """Answer a micro-batch.

        Args:
            questions: its members.
            answered: told the number of each when it is answered.
        """
        self.answering.enter()
        self.micro_batches += 1
        ahead = [_Rounds() for _ in questions]
        first = [
            (rounds, step)
            for rounds, question in zip(ahead, questions, strict=True)
            if question.steps and isinstance(step := question.steps[0], Ahead) and step.with_others
        ]
        if first:
            self._begin(first)
        members = [
            self._env.process(self._question(question, rounds, answered, began=any(rounds is one for one, _ in first)))
            for question, rounds in zip(questions, ahead, strict=True)
        ]
        yield self._env.all_of(members)
        self.answering.leave()

    def _question(
        self, question: Question, rounds: _Rounds, answered: Callable[[int], None], *, began: bool
    ) -> ProcessGenerator:
        for place, step in enumerate(question.steps):
            if isinstance(step, Ahead):
                if not (began and place == 0):
                    self._env.process(self._begin_alone(rounds, step))
            else:
                yield self._env.all_of([self._call(call, rounds) for call in step])
            if not isinstance(step, Ahead) and any(isinstance(call, Lookup) for call in step):
                rounds = _Rounds()
        for begun in rounds.begun:
            begun.end()
        rounds.wanted = False
        answered(question.number)

    def _call(self, call: Call, rounds: _Rounds) -> simpy.Event:
        if isinstance(call, Text):
            return self.llm.write(call, self._follower(call, rounds))
        rounds.wanted = False
        asked = _Asked(call, tuple(rounds.begun), self._env.event())
        self._asked.put(asked)
        return asked.done

    def _begin(self, together: Sequence[tuple[_Rounds, Ahead]]) -> None:
        """Lookahead for several at once; to the cache they are one round."""
        kept = self._tier.new_round(self._tier_options.cache_fraction)
        orders, depth = [step.order for _rounds, step in together], together[0][1].prefetch_depth
        started = self._prefetcher.start(orders, depth, depth, kept, self._tier_options.budget_bytes)
        for (rounds, _step), prefetch in zip(together, started, strict=True):
            rounds.begun.append(prefetch)

    def _begin_alone(self, rounds: _Rounds, step: Ahead) -> ProcessGenerator:
        yield self._processor.serve(self._rates.sketch_s)
        if rounds.wanted:
            self._begin([(rounds, step)])

    def _follower(self, text: Text, rounds: _Rounds) -> Callable[[int], None]:
        """Has lookahead follow the text at its checkpoints."""
        if not text.follows:
            return lambda _count: None
        following = _Following(rounds)

        def picked(count: int) -> None:
            if count >= text.picks:
                following.ended = True
            elif passed := [follow for follow in text.follows if follow.at_tokens == count]:
                following.newest = passed[-1]
                self._sketches.submit(following)

        return picked

    def _retrieve(self) -> ProcessGenerator:
        """One retrieval after the other; what is asked while one runs is the next."""
        while True:
            batch: list[_Asked] = [(yield self._asked.get())]
            while self._asked.items and len(batch) < MAX_SEARCHES:
                batch.append((yield self._asked.get()))
            queries = sum(len(asked.lookup.probes) for asked in batch)
            self.scoring.enter()
            yield self._processor.serve(queries * self._rates.query_s)
            self.scoring.leave()
            yield from self._join(batch, queries)
            for asked in batch:
                asked.done.succeed()

    def _join(self, batch: Sequence[_Asked], queries: int) -> ProcessGenerator:
        tier, counts = self._tier, self._counts
        rounds = [each for asked in batch for each in asked.rounds]
        for each in rounds:
            each.stop()
        if not rounds:
            tier.new_round(self._tier_options.cache_fraction)
        self.scoring.enter()
        yield self._processor.serve(queries * self._rates.join_s)
        self.scoring.leave()
        times = np.bincount(
            np.concatenate([probes for asked in batch for probes in asked.lookup.probes]), minlength=self._nlist
        )
        wanted: IntArray = np.flatnonzero((times > 0) & (tier.list_bytes > 0))
        came: simpy.Store = simpy.Store(self._env)

        def told(lists: Sequence[int], error: TeleragError | None) -> None:
            assert error is None
            came.put(list(lists))

        pinned = tier.pin(wanted.tolist(), told, move=not self._rates.in_place_bytes_per_s)
        missed = pinned.started + pinned.absent
        for asked in batch:
            own = np.unique(np.concatenate(asked.lookup.probes))
            own = own[tier.list_bytes[own] > 0]
            gone = np.isin(own, missed)
            counts.lists_wanted += len(own)
            counts.lists_hit += len(own) - int(np.isin(own, missed + pinned.coming).sum())
            counts.bytes_wanted += int(tier.list_bytes[own].sum())
            counts.bytes_missed += int(tier.list_bytes[own[gone]].sum())
        counts.bytes_moved += sum(each.bytes_moved for each in rounds)
        absent, in_place = self._share(pinned.absent)
        beside = self._env.process(self._score(in_place, times, self._rates.in_place_bytes_per_s)) if in_place else None
        coming = len(pinned.coming) + len(pinned.started)
        here = list(pinned.hits)
        while here or coming or absent:
            if absent:
                more = tier.pin(absent, told)
                absent = more.absent
                here += more.hits
                coming += len(more.coming) + len(more.started)
                if absent and not coming and not here:
                    yield self._env.timeout(RETRY_S)  # all room is taken by what is on its way for others
            if here:
                yield self._env.process(self._score(here, times, self._rates.scored_bytes_per_s))
                tier.release(here)
                here = []
            elif coming:
                self.awaiting.enter()
                here = yield came.get()
                self.awaiting.leave()
                while came.items:
                    here += yield came.get()
                coming -= len(here)
        if beside is not None:
            yield beside
        tier.used(wanted)
        for each in rounds:
            each.end()

    def _share(self, absent: list[int]) -> tuple[list[int], list[int]]:
        """What the link moves of the misses, and what is scored in place: as both are fast, so that they end together."""
        link, place = self._rates.link_bytes_per_s, self._rates.in_place_bytes_per_s
        if not place or not absent:
            return absent, []
        ends = np.cumsum(self._tier.list_bytes[absent])
        count = int(np.searchsorted(ends, ends[-1] * link / (link + place), side="right"))
        return absent[:count], absent[count:]

    def _score(self, lists: Sequence[int], times: IntArray, rate: float) -> ProcessGenerator:
        """Score lists for the queries that probe them, on this replica's processor and in what the host shares."""
        queries = 1 + self._rates.another_query * (times[list(lists)] - 1)
        nbytes = float((self._tier.list_bytes[list(lists)] * queries).sum())
        self.scoring.enter()
        waits = [self._processor.serve(nbytes / rate)]
        if self._host.scoring is not None:
            waits.append(self._host.scoring.serve(nbytes))
        yield self._env.all_of(waits)
        self.scoring.leave()


@dataclass(eq=False)
class _Following:
    """A text that lookahead follows."""

    rounds: _Rounds
    newest: Follow | None = None
    followed: float = 0.0
    ended: bool = False


class _Sketches:
    """The thread that embeds what is written so far, never more than a share of the time; see `RefinementEmbedder`."""

    def __init__(self, env: simpy.Environment, processor: Device, sketch_s: float) -> None:
        self._env = env
        self._processor = processor
        self._sketch_s = sketch_s
        self._waiting: list[_Following] = []
        self._credit_s, self._credited_s = ALLOWANCE_S, 0.0
        self._called = env.event()
        env.process(self._work())

    def submit(self, following: _Following) -> None:
        """Have its newest text embedded; one that waits already keeps its place."""
        if following not in self._waiting:
            self._waiting.append(following)
        if not self._called.triggered:
            self._called.succeed()

    def _work(self) -> ProcessGenerator:
        while True:
            if not self._waiting:
                self._called = self._env.event()
                yield self._called
            earned_s = SHARE * (self._env.now - self._credited_s)
            self._credit_s, self._credited_s = min(self._credit_s + earned_s, ALLOWANCE_S), self._env.now
            if self._credit_s <= 0:
                yield self._env.timeout((1e-4 - self._credit_s) / SHARE)
                continue
            following = self._waiting.pop(0)
            follow, begun = following.newest, following.rounds.begun
            if following.ended or follow is None or not begun or not begun[-1].going:
                continue
            if begun[-1].idle and not due(follow.fraction, following.followed, PATIENT_CHECKPOINTS):
                continue
            following.followed = follow.fraction
            yield self._processor.serve(self._sketch_s)
            self._credit_s -= self._sketch_s
            begun[-1].follow(follow.order, follow.prefetch_depth)
