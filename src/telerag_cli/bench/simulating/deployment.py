"""Many replicas in simulated time: micro-batches given out by the product's own dispatcher, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import simpy
from simpy.events import ProcessGenerator

from telerag_cli.bench.simulating.clocks import Busy
from telerag_cli.bench.simulating.rates import Host, Rates
from telerag_cli.bench.simulating.replica import Replica, SharedHost, Tier
from telerag_cli.bench.simulating.work import Question
from telerag_cli.config import PlacementName
from telerag_cli.engine.dispatch import Dispatcher, ReplicaState
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.placement import make_placement
from telerag_cli.index.artifact import Index


class Bottleneck(StrEnum):
    """What would have to be faster, or more, for a batch to end sooner."""

    LLM = "LLM"
    LINK = "link"
    SLOW_TIER = "shared slow tier"
    SCORING = "scoring"
    SHARED_SCORING = "shared scoring"
    SCHEDULER = "scheduler"
    IMBALANCE = "imbalance"
    QUESTIONS = "not enough questions"


@dataclass(frozen=True)
class Used:
    """Shares of the time, on average over replicas or hosts."""

    llm: float
    """An LLM wrote."""
    link: float
    """A link moved lists, for lookahead too."""
    awaiting: float
    """Nothing but lists on their way kept a retrieval from going on."""
    slow_tier: float
    """Of the bytes that a host's slow tier could give, those that links took."""
    scoring: float
    """Embedding and scoring."""
    shared_scoring: float
    """Of the bytes that a host could score, those that were; 0 where that has no limit."""
    scheduler: float
    """The dispatcher was deciding."""
    idle: float
    """A replica had no question."""


SATURATED = 0.8
"""Share of its time from which on something shared is said to be what others wait for."""


@dataclass(frozen=True)
class Deployment:
    """What is simulated."""

    index: Index
    """Nothing of it is read but how long its lists are."""
    replicas: int
    rates: Rates
    """Of each replica."""
    host: Host
    tier: Tier
    placement: PlacementName = PlacementName.CACHE_AWARE
    at_once: int = 1
    """Questions that a replica answers at once."""
    cut_s: float = 0.0
    """What the one scheduler takes for each question until it is in a micro-batch: embedding it, above all."""
    assign_s: float = 0.0
    """What it takes to give out a micro-batch."""
    handing_s: float = 0.0
    """From there to the replica."""


@dataclass(frozen=True)
class Simulated:
    """What came of it. Seconds are simulated."""

    replicas: int
    hosts: int
    took_s: float
    """Until the last answer."""
    answered_s: tuple[float, ...]
    """When each question was answered, in the order of the questions."""
    bottleneck: Bottleneck
    used: Used
    micro_batches: tuple[int, ...]
    """By replica."""
    lists_wanted: int
    lists_hit: int
    bytes_wanted: int
    bytes_moved: int
    bytes_missed: int
    bytes_linked: int
    """That passed any link."""

    @property
    def questions_per_s(self) -> float:
        """Throughput."""
        return len(self.answered_s) / self.took_s

    @property
    def hit_share(self) -> float:
        """Of the lists probed, in fast memory when the query came."""
        return self.lists_hit / self.lists_wanted if self.lists_wanted else 0.0


Groups = Sequence[Sequence[int]]
"""Places of the questions of each micro-batch, in order."""


def simulate(deployment: Deployment, questions: Sequence[Question], batches: Sequence[Groups]) -> Simulated:
    """Answer questions.

    Args:
        deployment: by what.
        questions: numbered from 0 in their order.
        batches: those that the scheduler looks at together, cut into micro-batches; each question once.

    Raises:
        UsageError: an arena is smaller than the largest list.
    """
    assert sorted(place for groups in batches for group in groups for place in group) == list(range(len(questions)))
    return _Run(deployment, questions, batches).result()


class _Run:
    def __init__(self, deployment: Deployment, questions: Sequence[Question], batches: Sequence[Groups]) -> None:
        self._deployment = deployment
        self._questions = questions
        self._batches = list(batches)
        self._size = max(len(group) for groups in batches for group in groups)
        self._env = env = simpy.Environment()
        per_host = deployment.host.replicas
        self._hosts = [
            SharedHost(env, deployment.host, deployment.rates) for _ in range(-(-deployment.replicas // per_host))
        ]
        self._replicas = [
            Replica(env, number, deployment.index, deployment.rates, deployment.tier, self._hosts[number // per_host])
            for number in range(deployment.replicas)
        ]
        self._dispatcher = Dispatcher(deployment.index.list_bytes, make_placement(deployment.placement))
        self._under_way: list[list[MicroBatch]] = [[] for _ in self._replicas]
        self._said = [replica.resident for replica in self._replicas]
        """What each held when it answered last."""
        self._members = [0] * deployment.replicas
        """Questions under way, by replica."""
        self._cut = 0
        """Micro-batches made so far."""
        self._answered_s: dict[int, float] = {}
        self._scheduling = Busy(env)
        self._freed = env.event()

    def result(self) -> Simulated:
        """Run it to its end."""
        self._env.run(self._env.process(self._schedule()))
        took_s = max(self._answered_s.values())
        for replica in self._replicas:
            replica.check_integrity()
        used = self._used(took_s)
        counts = [replica.counts for replica in self._replicas]
        return Simulated(
            replicas=len(self._replicas),
            hosts=len(self._hosts),
            took_s=took_s,
            answered_s=tuple(self._answered_s[number] for number in range(len(self._questions))),
            bottleneck=self._bottleneck(used),
            used=used,
            micro_batches=tuple(replica.micro_batches for replica in self._replicas),
            **{
                name: sum(getattr(each, name) for each in counts)
                for name in ("lists_wanted", "lists_hit", "bytes_wanted", "bytes_moved", "bytes_missed", "bytes_linked")
            },
        )

    def _schedule(self) -> ProcessGenerator:
        """Make micro-batches and give them out until all are answered, as `telerag_cli.engine.batch` does it."""
        running: list[simpy.Event] = []
        cutting: simpy.Process | None = None
        while True:
            if cutting is not None and cutting.triggered:
                cutting = None
            # One batch is looked at as soon as what waits no longer fills the replicas.
            if cutting is None and self._batches and self._dispatcher.waiting < len(self._replicas):
                cutting = self._env.process(self._make(self._batches.pop(0)))
            if self._dispatcher.waiting and any(state.free > 0 for state in self._states()):
                for number, batch in self._dispatcher.assign(self._states()):
                    self._under_way[number].append(batch)
                    self._members[number] += len(batch.members)
                    self._scheduling.enter()
                    yield self._env.timeout(self._deployment.assign_s)
                    self._scheduling.leave()
                    running.append(self._env.process(self._run(number, batch)))
                continue
            if not self._dispatcher.waiting and not self._batches and cutting is None:
                break
            self._freed = self._env.event()
            yield self._env.any_of([self._freed, *([cutting] if cutting else [])])
        yield self._env.all_of(running)

    def _make(self, groups: Groups) -> ProcessGenerator:
        self._scheduling.enter()
        yield self._env.timeout(self._deployment.cut_s * sum(map(len, groups)))
        self._scheduling.leave()
        self._dispatcher.add(
            MicroBatch(
                number=self._cut + number,
                members=tuple(group),
                lists=np.logical_or.reduce([self._questions[place].likely for place in group]),
            )
            for number, group in enumerate(groups)
        )
        self._cut += len(groups)

    def _states(self) -> list[ReplicaState]:
        return [
            ReplicaState(number, (self._deployment.at_once - members) // self._size, replica.resident, tuple(under_way))
            for number, (replica, members, under_way) in enumerate(
                zip(self._replicas, self._members, self._under_way, strict=True)
            )
        ]

    def _run(self, number: int, batch: MicroBatch) -> ProcessGenerator:
        yield self._env.timeout(self._deployment.handing_s)
        members = [self._questions[place] for place in batch.members]
        yield self._env.process(self._replicas[number].run(members, lambda question: self._note(number, question)))
        self._under_way[number].remove(batch)

    def _note(self, replica: int, question: int) -> None:
        assert question not in self._answered_s, "a question was answered twice"
        self._answered_s[question] = self._env.now
        self._members[replica] -= 1
        self._said[replica] = self._replicas[replica].resident
        if not self._freed.triggered:
            self._freed.succeed()

    def _used(self, took_s: float) -> Used:
        def share(parts: Sequence[Busy]) -> float:
            return float(np.mean([part.total_s for part in parts])) / took_s

        replicas, hosts = self._replicas, self._hosts
        return Used(
            llm=share([replica.llm.writing for replica in replicas]),
            link=share([replica.moving for replica in replicas]),
            awaiting=share([replica.awaiting for replica in replicas]),
            slow_tier=float(np.mean([host.slow.used_share(took_s) for host in hosts])),
            scoring=share([replica.scoring for replica in replicas]),
            shared_scoring=float(np.mean([host.scoring.used_share(took_s) if host.scoring else 0.0 for host in hosts])),
            scheduler=share([self._scheduling]),
            idle=max(1.0 - share([replica.answering for replica in replicas]), 0.0),
        )

    def _bottleneck(self, used: Used) -> Bottleneck:
        """The part that most of the time went to; if it is shared and others wait for it, what is shared."""
        few = self._cut < len(self._replicas)
        shares = {
            Bottleneck.LLM: used.llm,
            Bottleneck.LINK: used.awaiting,
            Bottleneck.SCORING: used.scoring,
            Bottleneck.SCHEDULER: used.scheduler,
            Bottleneck.QUESTIONS if few else Bottleneck.IMBALANCE: used.idle,
        }
        most = max(shares, key=shares.__getitem__)
        short_s = sum(host.slow.short_s for host in self._hosts)
        if most is Bottleneck.LINK and short_s > sum(host.slow.busy_s for host in self._hosts) / 2:
            return Bottleneck.SLOW_TIER
        if most is Bottleneck.SCORING and used.shared_scoring >= SATURATED:
            return Bottleneck.SHARED_SCORING
        return most
