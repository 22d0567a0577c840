"""Who answers many questions: this process, or replicas; and how the questions are put together. The same for every command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from telerag_cli.cli import console
from telerag_cli.cli.opening import AUTO, NONE, Answering, Planned, Searching, open_answering
from telerag_cli.cli.options import (
    BatchSizeOption,
    MaxWaitOption,
    MicroBatchOption,
    PlacementOption,
    ReplicasOption,
    ScheduleOption,
)
from telerag_cli.cli.ray_options import RayAddressOption
from telerag_cli.config import DEFAULT_BATCH_SIZE, DEFAULT_MAX_WAIT_S, PlacementName, ScheduleName, parse_bytes
from telerag_cli.errors import UsageError

if TYPE_CHECKING:
    from telerag_cli.distributed.replicas import Remote
    from telerag_cli.engine.scheduler import Schedule, Scheduler
    from telerag_cli.engine.workers import Worker
    from telerag_cli.index.artifact import Index
    from telerag_cli.pipelines.base import Pipeline
    from telerag_cli.tracing import Tracer


@dataclass(frozen=True)
class Together:
    """Options about many questions."""

    schedule: ScheduleOption = ScheduleName.SIMILAR
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE
    micro_batch: MicroBatchOption = None
    max_wait: MaxWaitOption = DEFAULT_MAX_WAIT_S

    def wish(self) -> Schedule:
        """What is asked for, with micro-batches not fitted yet."""
        from telerag_cli.engine.scheduler import Schedule

        return Schedule(self.schedule, batch_size=self.batch_size, max_wait_s=self.max_wait)

    def made(self, at_once: int, arena_bytes: int, index: Index, nprobe: int) -> Schedule:
        """As the scheduler takes it."""
        from telerag_cli.engine.scheduler import fitted

        return fitted(self.wish(), self.micro_batch, at_once, arena_bytes, index.list_bytes, nprobe)


@dataclass(frozen=True)
class SchedulingOptions(Together):
    """Options about many questions and many replicas."""

    placement: PlacementOption = PlacementName.CACHE_AWARE
    replicas: ReplicasOption = "1"
    ray_address: RayAddressOption = None

    @property
    def count(self) -> int | None:
        """Of replicas; None for one on each GPU.

        Raises:
            UsageError: it is no number.
        """
        if self.replicas == AUTO:
            return None
        if not self.replicas.isdecimal() or int(self.replicas) < 1:
            raise UsageError(
                f"--replicas is '{self.replicas}', which is neither a number from 1 nor auto.",
                remedy="Write 2 or auto.",
            )
        return int(self.replicas)

    @property
    def alone(self) -> bool:
        """Whether this process answers by itself: nothing of Ray is needed then."""
        return self.ray_address is None and (self.count == 1 or (self.count is None and _gpus_of_this_machine() <= 1))

    def wish(self) -> Schedule:
        """See `Together`."""
        return replace(super().wish(), placement=self.placement)


@contextlib.contextmanager
def open_workers(
    searching: Searching,
    answering: Answering,
    scheduling: SchedulingOptions,
    pipeline: Pipeline,
    tracer: Tracer,
    planned: Planned,
) -> Iterator[tuple[list[Worker], Scheduler]]:
    """What answers questions, and what puts them together; closed at the end.

    Raises:
        UsageError: options contradict each other.
        TeleragError: a part cannot be opened.
    """
    if not scheduling.alone:
        with _open_replicas(searching, answering, scheduling, pipeline, tracer, planned) as opened:
            yield opened
        return
    from telerag_cli.engine.scheduler import Scheduler
    from telerag_cli.engine.workers import Local

    with open_answering(searching, answering, tracer, planned=planned) as (engine, at_once):
        tier = engine.retriever.tier
        schedule = scheduling.made(at_once, tier.arena_bytes, engine.retriever.index, engine.settings.nprobe)
        yield [Local(engine, at_once, pipeline)], Scheduler.over(engine, schedule)


@contextlib.contextmanager
def _open_replicas(
    searching: Searching,
    answering: Answering,
    scheduling: SchedulingOptions,
    pipeline: Pipeline,
    tracer: Tracer,
    planned: Planned,
) -> Iterator[tuple[list[Worker], Scheduler]]:
    for flag, given in (
        ("--trace", tracer.enabled),
        ("--explain", planned.explain),
        (f"--profile {planned.profile}", planned.profile not in (AUTO, NONE)),
    ):
        if given:
            raise UsageError(
                f"{flag} is of one process, and --replicas is {scheduling.replicas}.", remedy="Leave one of them out."
            )

    from telerag_cli.distributed.replicas import Recipe, check_memory, open_replicas
    from telerag_cli.distributed.session import joined
    from telerag_cli.engine.assemble import default_k, default_nprobe, open_index
    from telerag_cli.engine.scheduler import Scheduler
    from telerag_cli.index.artifact import Index
    from telerag_cli.index.scoring import Coarse
    from telerag_cli.retrieval.retriever import check_search
    from telerag_cli.system import available_bytes

    index = Index.open(searching.index)
    k, nprobe = searching.k or default_k(index), searching.nprobe or default_nprobe(index)
    check_search(index, k, nprobe)
    budget = None if planned.prefetch_budget is None else parse_bytes(planned.prefetch_budget)
    settings = answering.settings(k, nprobe)
    recipe = Recipe(
        searching.index.resolve(),
        searching.embedder,
        searching.tier,
        answering.llm,
        settings,
        pipeline,
        answering.concurrency,
        searching.rescore,
        budget,
    )
    if scheduling.ray_address is None and scheduling.count:
        check_memory(index, searching.tier, scheduling.count, available_bytes())
    # Questions are embedded here to put them together; on the processor, because the GPUs are the replicas'.
    opened = open_index(index, searching.embedder, "cpu")
    coarse = Coarse(index.centroids, index.manifest.metric)

    with joined(scheduling.ray_address) as cluster, contextlib.ExitStack() as ended:
        with console.progress("opening replicas", scheduling.count) as opening:
            made = open_replicas(recipe, scheduling.count, cluster, index.manifest.nlist, opening)
            replicas = ended.enter_context(made)
        _show(replicas)
        schedule = scheduling.made(
            min(replica.at_once for replica in replicas),
            min(replica.about.arena_bytes for replica in replicas),
            index,
            nprobe,
        )
        yield (
            list(replicas),
            Scheduler(schedule, opened.embedder, coarse.nearest, index.list_bytes, nprobe, len(replicas)),
        )


def _show(replicas: list[Remote]) -> None:
    """What each replica is."""
    from telerag_cli.config import format_bytes

    rows = [
        (
            str(number),
            each.about.host,
            str(each.about.pid),
            each.about.tier,
            format_bytes(each.about.arena_bytes),
            str(each.at_once),
        )
        for number, each in enumerate(replicas)
    ]
    console.table("Replicas", ("number", "machine", "process", "tier", "arena", "questions at once"), rows)
    for note in dict.fromkeys(note for each in replicas for note in each.about.notes):
        console.warn(note)


def _gpus_of_this_machine() -> int:
    import torch

    return torch.cuda.device_count()
