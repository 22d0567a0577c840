"""``telerag bench scaling``: replicas that run on this machine, and more of them simulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.bench.suites import SuiteName
from telerag_cli.cli import console
from telerag_cli.cli.bench_options import BenchOptions, ResultOptions, show
from telerag_cli.cli.keeping import metadata_of, result_path
from telerag_cli.cli.options import (
    BatchSizeOption,
    LookaheadOption,
    MicroBatchOption,
    PlacementOption,
    ScheduleOption,
    tier_options,
)
from telerag_cli.config import DEFAULT_BATCH_SIZE, GeneratorKind, Lookahead, PipelineName, PlacementName, ScheduleName
from telerag_cli.errors import UsageError
from telerag_cli.pipelines.registry import make_pipeline

if TYPE_CHECKING:
    from telerag_cli.bench.answering import Outcome
    from telerag_cli.bench.calibrating import Calibration
    from telerag_cli.bench.scaling import Batch, Extent, Fleet, Recorded
    from telerag_cli.cli.opening import Prepared
    from telerag_cli.distributed.replicas import Recipe
    from telerag_cli.distributed.session import Cluster
    from telerag_cli.engine.scheduler import Schedule
    from telerag_cli.index.artifact import Index

_WHAT = "How many replicas"
DEFAULT_REPLICAS = (1, 2)
DEFAULT_SIMULATED = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_AT_ONCE = 8


def scaling(
    asking: BenchOptions,
    keeping: ResultOptions,
    replicas: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Replicas that really run, side by side on this machine; repeatable.  \\[default: 1, 2]",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    simulate: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Replicas to simulate; repeatable. Those that really run are simulated besides.  \\[default: 1, 2, 4, 8, 16, 32, 64]",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    simulate_only: Annotated[
        bool,
        typer.Option(
            "--simulate-only",
            help="Run no replicas; nothing says then whether the simulation is right.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    replicas_per_host: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Replicas that share a simulated machine; as many are measured side by side on this one.  "
            "\\[default: the most that really run]",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompts_per_replica: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions of a simulated batch for each replica, where that is more than --num-prompts.  "
            "\\[default: --num-prompts for as many as really run]",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions that each replica answers at once.", rich_help_panel=_WHAT)
    ] = DEFAULT_AT_ONCE,
    lookahead: LookaheadOption = Lookahead.REFINED,
    schedule: ScheduleOption = ScheduleName.SIMILAR,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    micro_batch: MicroBatchOption = None,
    placement: PlacementOption = PlacementName.CACHE_AWARE,
) -> None:
    """Questions answered a second by replicas: some measured, more of them simulated: the paper's scaling over several GPUs.

    One batch is recorded first; then rates are measured in a replica's share of this machine, then the replicas answer
    the batch, and last it is simulated. Simulated figures are of the system 'simulated' wherever they are shown.
    """
    if asking.system:
        raise UsageError(
            "--system has no part in bench scaling, whose systems are replicas and simulated ones.",
            remedy="Leave it out; --simulate-only runs no replicas.",
        )
    if simulate_only and replicas:
        raise UsageError("--replicas has no part in --simulate-only.", remedy="Leave one of them out.")
    names = asking.pipeline or [PipelineName.HYDE]
    if len(names) > 1:
        raise UsageError(
            f"bench scaling is for one pipeline and {len(names)} are named.", remedy="Name one with --pipeline."
        )
    noted = metadata_of(keeping.metadata)
    path = result_path(keeping.result_dir, keeping.result_filename, f"{SuiteName.SCALING}.json")
    if not asking.dataset:
        raise UsageError(
            "bench scaling needs questions and none are named.",
            remedy="Give --dataset FILE, or the NAME of a prepared dataset.",
        )
    with console.stdout_reserved():
        from telerag_cli.bench.recording import keep

        started = keep(SuiteName.SCALING)
        measured = () if simulate_only else replicas or DEFAULT_REPLICAS
        extent = _extent(asking, measured, simulate, replicas_per_host, prompts_per_replica)
        batch = _batch(asking)
        made, recipe = _prepared(asking, names[0], lookahead, concurrency)
        _check_memory(made.opened.index, recipe, extent)
        how = _schedule(made, concurrency, schedule, placement, batch_size, micro_batch)
        found = _measure(made, recipe, how, extent, batch, detailed=keeping.save_detailed)
        result = started.done(found, _settings(made, recipe, extent, batch), noted)
    show(result, keeping, path)


def _extent(
    asking: BenchOptions,
    measured: Sequence[int],
    simulated: Sequence[int] | None,
    per_host: int | None,
    prompts: int | None,
) -> Extent:
    """How many, by what was said and left out."""
    from telerag_cli.bench.scaling import Extent

    most = max(measured, default=1)
    return Extent(
        measured=tuple(dict.fromkeys(measured)),
        simulated=tuple(dict.fromkeys((*measured, *(simulated or DEFAULT_SIMULATED)))),
        per_host=per_host or most,
        prompts_per_replica=prompts or -(-asking.num_prompts * len(asking.dataset or ()) // most),
        repeats=asking.repeats,
        seed=asking.seed,
    )


def _batch(asking: BenchOptions) -> Batch:
    """The questions, each once.

    Raises:
        UsageError: none is left for measuring.
    """
    from telerag_cli.bench.scaling import Batch
    from telerag_cli.datasets.questions import load_questions

    warmups: list[str] = []
    questions: list[str] = []
    for name in asking.dataset or ():
        texts = [
            each.text for each in load_questions(name, limit=asking.num_warmups + asking.num_prompts, seed=asking.seed)
        ]
        warmups = warmups or texts[: asking.num_warmups]
        questions += texts[asking.num_warmups :]
    if not questions:
        raise UsageError(
            f"All {len(warmups)} questions are for warming up.", remedy="Lower --num-warmups, or name a larger dataset."
        )
    return Batch(tuple(warmups), tuple(dict.fromkeys(questions)))


def _prepared(
    asking: BenchOptions, pipeline: PipelineName, lookahead: Lookahead, concurrency: int
) -> tuple[Prepared, Recipe]:
    """What answers in this process, planned and shown, and the same as a replica opens it."""
    from telerag_cli.cli.opening import Answering, Searching, prepare
    from telerag_cli.distributed.replicas import Recipe
    from telerag_cli.engine.llm_plan import LlmOptions

    llm = LlmOptions(
        GeneratorKind.LLAMA,
        asking.model,
        asking.hf_repo,
        None,
        asking.ctx_size,
        asking.n_gpu_layers,
        asking.threads,
        replay=asking.trace and asking.trace.resolve(),
    )
    tier = tier_options(asking.tier, asking.device, asking.fast_memory, asking.gpu_memory, asking.require_pinned)
    made = prepare(Searching(asking.index, asking.embedder, tier, asking.k, asking.nprobe), llm, concurrency)
    settings = Answering(llm, concurrency, lookahead, asking.max_tokens).settings(made.k, made.nprobe)
    return made, Recipe(
        asking.index.resolve(), asking.embedder, tier, llm, settings, make_pipeline(pipeline), concurrency
    )


def _measure(
    made: Prepared, recipe: Recipe, schedule: Schedule, extent: Extent, batch: Batch, *, detailed: bool
) -> Outcome:
    """Record, calibrate, run, simulate."""
    from telerag_cli.bench.scaling import Simulator, handing_s, measure_turns, outcome
    from telerag_cli.distributed.session import joined

    recorded = _record(made, recipe, schedule, batch)
    with contextlib.ExitStack() as ended:
        # Ray's own processes run while rates are measured, as they do while replicas answer.
        cluster = ended.enter_context(joined()) if extent.measured else None
        calibrations = _calibrate(made, recipe, extent, batch)
        turns = []
        if cluster:
            with console.progress("answering", len(extent.measured) * extent.repeats, unit="runs") as advance:
                turns = measure_turns(extent, _Opening(made, recipe, schedule, cluster), batch, advance)
    simulator = Simulator(made.opened.index, recorded, calibrations, extent, recipe.tier.cache, handing_s(turns))
    with console.progress("simulating", len(extent.simulated), unit="deployments") as advance:
        simulated = {}
        for count in extent.simulated:
            simulated[count] = simulator.run(count)
            advance(1)
    return outcome(turns, simulated, simulator, len(batch.questions), detailed=detailed)


def _schedule(
    made: Prepared, at_once: int, name: ScheduleName, placement: PlacementName, batch_size: int, micro_batch: int | None
) -> Schedule:
    """As the scheduler takes it; the same for any number of replicas."""
    from telerag_cli.engine.scheduler import Schedule, fitted

    arena_bytes = made.tier.gpu_bytes or made.tier.ram_bytes
    wish = Schedule(name, placement, batch_size)
    return fitted(wish, micro_batch, at_once, arena_bytes, made.opened.index.list_bytes, made.nprobe)


def _check_memory(index: Index, recipe: Recipe, extent: Extent) -> None:
    from telerag_cli.distributed.replicas import check_memory
    from telerag_cli.system import available_bytes

    check_memory(index, recipe.tier, max((*extent.calibrated, *extent.measured)), available_bytes())


def _record(made: Prepared, recipe: Recipe, schedule: Schedule, batch: Batch) -> Recorded:
    """Answer the batch in this process, and close the LLM and the arena again."""
    from telerag_cli.bench.scaling import record
    from telerag_cli.engine.assemble import open_engine

    assert made.llm
    console.say(f"Recording {len(batch.questions)} questions in this process.")
    engine = open_engine(made.opened, made.llm.open, made.tier, recipe.settings, progress=console.progress)
    with contextlib.closing(engine):
        return record(engine, recipe.pipeline, made.llm.concurrency, schedule, batch)


def _calibrate(made: Prepared, recipe: Recipe, extent: Extent, batch: Batch) -> dict[int, Calibration]:
    """Rates by the number of replicas side by side."""
    import os

    import torch

    from telerag_cli.bench.calibrating import Kind, calibrate
    from telerag_cli.distributed.replicas import share_of
    from telerag_cli.distributed.session import Cluster
    from telerag_cli.llm.llama_model import CHUNK, GPU_CHUNK

    on_gpu = recipe.llm.n_gpu_layers != 0
    kind = Kind(GPU_CHUNK if on_gpu else CHUNK, llm_apart=on_gpu != (made.tier.gpu is not None))
    # The texts of a recording play no part in how fast a model is.
    plain = replace(recipe, llm=replace(recipe.llm, replay=None))
    machine = Cluster(1, len(os.sched_getaffinity(0)), torch.cuda.device_count(), local=True)
    found = {}
    with console.progress("calibrating", None, unit="figures") as advance:
        for count in extent.calibrated:
            _count, share = share_of(machine, count)
            found[count] = calibrate(plain, share, count, kind, batch.questions, advance)
    return found


class _Opening:
    """Opens replicas on this machine; see `OpenFleet`."""

    def __init__(self, made: Prepared, recipe: Recipe, schedule: Schedule, cluster: Cluster) -> None:
        from telerag_cli.index.scoring import Coarse

        self._made = made
        self._recipe = recipe
        self._schedule = schedule
        self._cluster = cluster
        index = made.opened.index
        self._coarse = Coarse(index.centroids, index.manifest.metric)

    @contextlib.contextmanager
    def __call__(self, replicas: int) -> Iterator[Fleet]:
        from telerag_cli.bench import page_cache
        from telerag_cli.bench.scaling import Fleet
        from telerag_cli.distributed.replicas import open_replicas
        from telerag_cli.engine.scheduler import Scheduler

        opened, nprobe = self._made.opened, self._recipe.settings.nprobe

        page_cache.drop(opened.index.paths.lists)
        with open_replicas(self._recipe, replicas, self._cluster, opened.index.manifest.nlist) as workers:
            scheduler = Scheduler(
                self._schedule, opened.embedder, self._coarse.nearest, opened.index.list_bytes, nprobe, replicas
            )
            yield Fleet(workers, scheduler)


def _settings(made: Prepared, recipe: Recipe, extent: Extent, batch: Batch) -> dict[str, object]:
    """What was the same for all cells."""
    assert made.llm
    index = made.opened.index
    manifest = index.manifest
    return {
        "index": {
            "name": index.paths.root.name,
            "lists_bytes": int(index.list_bytes.sum()),
            "ntotal": manifest.ntotal,
            "nlist": manifest.nlist,
            "dimension": manifest.dimension,
            "storage": manifest.storage.value,
            "metric": manifest.metric.value,
        },
        "llm": made.llm.name,
        "generation": "real" if recipe.llm.replay is None else f"replayed from {recipe.llm.replay.name}",
        "embedder": made.opened.embedder.info.model,
        "num_prompts": len(batch.questions),
        "num_warmups": len(batch.warmups),
        "repeats": extent.repeats,
        "seed": extent.seed,
        "pipelines": [recipe.pipeline.name],
        "lookahead": recipe.settings.lookahead.value,
        "k": made.k,
        "nprobe": made.nprobe,
        "max_tokens": recipe.settings.max_tokens,
        "temperature": recipe.settings.temperature,
        "questions_at_once": recipe.at_once,
        "tier": made.tier.name,
        "fast_memory_bytes": recipe.tier.fast_memory_bytes,
    }
