"""Replicas as Ray actors: each an LLM with an embedder and an arena of its own, on one machine or on many.

Ray starts and places them, restarts one that died and has it do again what it was doing; each answer comes once. The
process that starts them holds an index's centroids and an embedder, to schedule, and no LLM and no lists.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from telerag_cli.arrays import BoolArray, FloatArray
from telerag_cli.config import NONE, EngineConfig, TierConfig
from telerag_cli.distributed.session import Cluster, unwrapped
from telerag_cli.engine.admission import Local
from telerag_cli.engine.engine import AskResult, Engine
from telerag_cli.engine.memory_plan import plan_tier
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.questions import USUAL, AskOptions
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.system import spin_at_barriers
from telerag_cli.units import format_bytes

RETRIES = 1
"""Times that a question is asked again because its replica died; without a bound one could kill it for ever."""


@dataclass(frozen=True)
class Share:
    """What one replica has of its machine."""

    cpus: float
    gpus: int
    on_its_machine: int
    """Replicas that it shares the machine's memory with, itself included."""

    @property
    def threads(self) -> int:
        """Of the LLM, of scoring and of embedding."""
        return max(1, int(self.cpus))


Opens = Callable[[Share], Engine]
"""Opens what a replica answers with. It is pickled, and called where the replica is."""


def open_share(config: EngineConfig, share: Share) -> Engine:
    """Open an engine in its share of a machine; with its first argument bound, it is what `Opens` asks for."""
    spin_at_barriers()
    import faiss
    import torch

    faiss.omp_set_num_threads(share.threads)
    torch.set_num_threads(share.threads)
    config = replace(config, index=config.index.absolute(), threads=config.threads or share.threads, profile=NONE)
    return Engine.open(config, sharers=share.on_its_machine)


@dataclass(frozen=True)
class About:
    """A replica that is ready."""

    host: str
    pid: int
    at_once: int
    arena_bytes: int
    tier: str
    notes: tuple[str, ...]


def share_of(cluster: Cluster, replicas: int | None) -> tuple[int, Share]:
    """Return how many replicas there will be, by default one on each GPU or machine, and what each has.

    Raises:
        UsageError: there are GPUs, and fewer than replicas.
    """
    count = replicas or cluster.gpus or cluster.nodes
    if cluster.gpus and count > cluster.gpus:
        raise UsageError(
            f"--replicas is {count} and the cluster has {cluster.gpus} GPUs.",
            remedy=f"Choose at most {cluster.gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=.",
        )
    cpus = cluster.cpus / count
    # Ray takes whole processors, or parts of one.
    whole = float(int(cpus)) if cpus >= 1 else int(cpus * 1e4) / 1e4
    return count, Share(whole, 1 if cluster.gpus else 0, -(-count // cluster.nodes))


class Replica:
    """The actor: an engine in a process of its own.

    It opens what it needs with its first call, so that what goes wrong then is raised like any other error.
    """

    def __init__(self, opens: Opens, share: Share) -> None:
        self._opens = opens
        self._share = share
        self._batches: WeakValueDictionary[int, MicroBatch] = WeakValueDictionary()
        """Those that have members here."""

    @cached_property
    def _engine(self) -> Engine:
        return self._opens(self._share)

    async def open(self) -> About:
        """Be ready."""
        tier = self._engine.retriever.tier
        host, pid = socket.gethostname(), os.getpid()
        return About(host, pid, self._engine.concurrency, tier.arena_bytes, self._engine.tier_name, tuple(tier.notes))

    async def answer(
        self, number: int, questions: tuple[str, ...], vectors: FloatArray | None, place: int, options: AskOptions
    ) -> tuple[AskResult, bytes]:
        """Answer one question of the micro-batch of this number; also return the residency as bits."""
        worker = Local(self._engine, self._engine.concurrency)
        batch = self._batches.setdefault(number, MicroBatch(questions, vectors, number))
        answered = await worker.answer(batch, place, options)
        return answered, np.packbits(worker.resident()).tobytes()


class Remote:
    """A replica, seen from the driver: a `Worker`."""

    def __init__(self, actor: Any, about: About, nlist: int) -> None:
        self.about = about
        self.at_once = about.at_once
        self._actor = actor
        self._resident: BoolArray = np.zeros(nlist, np.bool_)

    async def answer(self, batch: MicroBatch, place: int, options: AskOptions = USUAL) -> AskResult:
        """See `Worker`."""
        with unwrapped():
            answered, bits = await self._actor.answer.remote(
                batch.number, batch.questions, batch.vectors, place, options
            )
        # As of the last answer, so it is stale by what has moved since: one lookahead at most.
        self._resident = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(self._resident)).astype(np.bool_)
        return answered  # type: ignore[no-any-return]

    def resident(self) -> BoolArray:
        """See `Worker`."""
        return self._resident

    def pid(self) -> int:
        """Return the number of its process now; raises TeleragError if it died and cannot be opened again."""
        about: About = _get(self._actor.open.remote())
        return about.pid


@contextlib.contextmanager
def open_replicas(
    opens: Opens,
    replicas: int | None,
    cluster: Cluster,
    nlist: int,
    opening: Callable[[int], None] = lambda _count: None,
) -> Iterator[list[Remote]]:
    """Open replicas, by default one on each GPU or machine, and end them with the block; ``opening`` counts them.

    Raises:
        UsageError: there cannot be so many.
        TeleragError: one cannot be opened.
    """
    import ray

    count, share = share_of(cluster, replicas)
    actor = ray.remote(Replica).options(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        max_restarts=-1,
        max_task_retries=RETRIES,
        scheduling_strategy="SPREAD",
    )
    actors = [actor.remote(opens, share) for _ in range(count)]
    try:
        coming = [each.open.remote() for each in actors]
        left = list(coming)
        while left:
            (ready,), left = ray.wait(left)
            _get(ready)
            opening(1)
        yield [Remote(each, _get(about), nlist) for each, about in zip(actors, coming, strict=True)]
    finally:
        # Of a cluster that lives on, too: an actor lives as long as somebody may call it.
        for each in actors:
            with contextlib.suppress(Exception):  # it is dead, or Ray is
                ray.kill(each)


def _get(reference: Any) -> Any:
    import ray

    with unwrapped():
        return ray.get(reference)


def check_memory(index: Index, config: TierConfig, replicas: int, free_bytes: int) -> None:
    """Refuse arenas that this machine's memory does not hold together; raises ResourceError."""
    tier = plan_tier(index, config)
    if tier.gpu is None and replicas * tier.ram_bytes > free_bytes:
        arenas, free = format_bytes(tier.ram_bytes), format_bytes(free_bytes)
        raise ResourceError(
            f"{replicas} arenas of {arenas} do not fit: {free} of memory are free.",
            remedy="Choose a smaller --fast-memory, or fewer --replicas.",
        )
