"""Who answers many questions: the engine of this process, or replicas."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from telerag_cli.cli import console
from telerag_cli.config import NONE, EngineConfig, ReplicaConfig
from telerag_cli.errors import UsageError
from telerag_cli.setting import AUTO
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from telerag_cli.distributed.replicas import Remote
    from telerag_cli.engine.admission import Worker
    from telerag_cli.engine.scheduler import Scheduler
    from telerag_cli.tracing import Tracer


@contextlib.contextmanager
def open_workers(
    config: EngineConfig, replicas: ReplicaConfig, tracer: Tracer
) -> Iterator[tuple[list[Worker], Scheduler]]:
    """What answers questions, and what puts them together; closed at the end.

    Raises:
        UsageError: options contradict each other.
        TeleragError: a part cannot be opened.
    """
    from telerag_cli.cli.reporting import ConsoleReporter
    from telerag_cli.engine.admission import Local
    from telerag_cli.engine.engine import Engine
    from telerag_cli.engine.scheduler import Scheduler, scheduled

    if not _alone(replicas):
        with _open_replicas(config, replicas, tracer) as opened:
            yield opened
        return
    with Engine.open(config, reporter=ConsoleReporter(), tracer=tracer) as engine:
        schedule = scheduled(
            replicas, engine.concurrency, engine.retriever.tier.arena_bytes, engine.retriever.index, engine.nprobe
        )
        yield [Local(engine, engine.concurrency)], Scheduler.over(engine, schedule)


def _alone(replicas: ReplicaConfig) -> bool:
    """Whether this process answers by itself: nothing of Ray is needed then."""
    if replicas.ray_address is not None:
        return False
    count = replicas.replica_count
    if count is None:
        import torch

        count = max(torch.cuda.device_count(), 1)
    return count == 1


@contextlib.contextmanager
def _open_replicas(
    config: EngineConfig, replicas: ReplicaConfig, tracer: Tracer
) -> Iterator[tuple[list[Worker], Scheduler]]:
    for flag, given in (
        ("--trace", tracer.enabled),
        ("--explain", config.explain),
        (f"--profile {config.profile}", config.profile not in (AUTO, NONE)),
    ):
        if given:
            raise UsageError(
                f"{flag} is for one process, and --replicas is {replicas.replicas}.", remedy="Leave one of them out."
            )

    from telerag_cli.distributed.replicas import check_memory, open_replicas, open_share
    from telerag_cli.distributed.session import joined
    from telerag_cli.engine.opening import open_index
    from telerag_cli.engine.scheduler import Scheduler, scheduled
    from telerag_cli.index.artifact import Index
    from telerag_cli.index.scoring import Coarse
    from telerag_cli.retrieval.retriever import search_depth
    from telerag_cli.system import available_bytes

    index, count = Index.open(config.index), replicas.replica_count
    _k, nprobe = search_depth(index, config)
    if replicas.ray_address is None and count:
        check_memory(index, config, count, available_bytes())
    # Questions are embedded here to put them together; on the processor, because the GPUs are the replicas'.
    opened = open_index(index, config.embedder, "cpu")
    coarse = Coarse(index.centroids, index.manifest.metric)

    with joined(replicas.ray_address) as cluster, contextlib.ExitStack() as ended:
        with console.progress("opening replicas", count) as opening:
            made = open_replicas(partial(open_share, config), count, cluster, index.manifest.nlist, opening)
            workers = ended.enter_context(made)
        _show(workers)
        at_once = min(replica.at_once for replica in workers)
        arena_bytes = min(replica.about.arena_bytes for replica in workers)
        schedule = scheduled(replicas, at_once, arena_bytes, index, nprobe)
        yield (
            list(workers),
            Scheduler(schedule, opened.embedder, coarse.nearest, index.list_bytes, nprobe, len(workers)),
        )


def _show(replicas: list[Remote]) -> None:
    """What each replica is."""
    rows = [
        (str(number), about.host, str(about.pid), about.tier, format_bytes(about.arena_bytes), str(each.at_once))
        for number, each in enumerate(replicas)
        for about in (each.about,)
    ]
    console.table("Replicas", ("number", "machine", "process", "tier", "arena", "questions at once"), rows)
    for note in dict.fromkeys(note for each in replicas for note in each.about.notes):
        console.warn(note)
