"""The suite of replicas: the same questions answered by different numbers of replicas on this machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from telerag_cli.bench import measure, page_cache
from telerag_cli.bench.measure import SystemTurn, Work, outcomes_of, turn_of
from telerag_cli.bench.results import Outcome
from telerag_cli.bench.statistics import ratio, short
from telerag_cli.bench.suites import Pages
from telerag_cli.config import EngineConfig
from telerag_cli.distributed.replicas import open_replicas, open_share
from telerag_cli.distributed.session import joined
from telerag_cli.engine.opening import OpenedIndex
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.errors import TeleragError
from telerag_cli.index.scoring import Coarse
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.progress import Advance

REPLICAS, ONE = "replicas", "one replica"


def scaling(
    opened: OpenedIndex,
    config: EngineConfig,
    schedule: Schedule,
    counts: Sequence[int],
    warmups: Sequence[str],
    questions: Sequence[str],
    *,
    repeats: int,
    seed: int,
    detailed: bool,
    advance: Advance,
) -> Outcome:
    """Have each number of replicas answer all questions at once, each time with empty arenas; the order rotates.

    Raises:
        TeleragError: replicas cannot be opened, or answer none of the questions for warming up.
    """
    index, nprobe = opened.index, config.nprobe or 1
    coarse = Coarse(index.centroids, index.manifest.metric)
    turns: list[SystemTurn] = []
    with joined() as cluster, asyncio.Runner() as runner:
        for repeat in range(repeats):
            first = repeat % len(counts)
            for count in (*counts[first:], *counts[:first]):
                page_cache.drop(index.paths.lists)
                left = page_cache.share(index.paths.lists)
                work = Work({"replicas": count}, make_pipeline(config.pipeline), tuple(questions), repeat)
                with open_replicas(partial(open_share, config), count, cluster, index.manifest.nlist) as workers:
                    scheduler = Scheduler(schedule, opened.embedder, coarse.nearest, index.list_bytes, nprobe, count)
                    warm = replace(work, questions=tuple(text for text in warmups for _ in workers))
                    ready = turn_of(REPLICAS, warm, runner.run(outcomes_of(workers, scheduler, warm.questions)), 0.0)
                    if ready.errors and not ready.answers:
                        raise TeleragError(f"No replica can answer '{warmups[0]:.60}': {ready.errors[0]}")
                    began_s = time.perf_counter()
                    outcomes = runner.run(outcomes_of(workers, scheduler, work.questions))
                    turns.append(turn_of(REPLICAS, work, outcomes, time.perf_counter() - began_s, left))
                advance(1)
    cells = measure.cells(turns, detailed=detailed)
    one = {turn.work.number: turn.wall_ms for turn in turns if turn.work.key["replicas"] == 1}
    alone = next((cell.values["request_throughput"] for cell in cells if cell.key["replicas"] == 1), None)
    ratios = []
    for cell in cells:
        count = cell.key["replicas"]
        if alone and count > 1:
            cell.values["speedup"] = short(cell.values["request_throughput"] / alone)
            cell.values["efficiency_share"] = short(cell.values["speedup"] / count)
            pairs = [(one[turn.work.number], turn.wall_ms) for turn in turns if turn.work.key["replicas"] == count]
            ratios.append(ratio(cell.key, ONE, REPLICAS, "wall_ms", pairs, seed=seed))
    # All turns answer the same questions, whatever the number of replicas.
    same = [replace(turn, work=replace(turn.work, key={}, number=0)) for turn in turns]
    configuration = {
        "what": "Ray actors on this machine, each with an LLM, an arena and a share of the cores",
        "schedule": schedule.name.value,
        "placement": schedule.placement.value,
        "micro_batch": schedule.micro_batch,
        "batch_size": schedule.batch_size,
    }
    notes = ["efficiency: throughput over that of one replica, divided by the number of replicas."]
    return Outcome({REPLICAS: configuration}, cells, ratios, measure.checks(same, Pages.COLD), notes)
