"""``telerag bench``: suites that compare systems side by side, and what is made of their results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telerag_cli.bench.suites import Pages, SuiteName, SystemName
from telerag_cli.cli import console
from telerag_cli.cli.bench_options import WORK, BenchOptions, ResultOptions, dataset_name, show
from telerag_cli.cli.bench_report import compare, report
from telerag_cli.cli.guard import guarded
from telerag_cli.cli.keeping import metadata_of, result_path
from telerag_cli.cli.options import expanded, one
from telerag_cli.config import CacheKind, Lookahead, PipelineName, PlacementName, ReplicaConfig, ScheduleName
from telerag_cli.errors import UsageError
from telerag_cli.pipelines.registry import make_pipeline

if TYPE_CHECKING:
    from telerag_cli.bench.answering import Ask, Outcome
    from telerag_cli.engine.opening import Prepared

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure, side by side with other systems: each suite stands for a figure of the paper, and its help says which.",
)

PagesOption = Annotated[
    Pages,
    typer.Option(
        help="Page cache and arenas when a question comes: emptied, or as earlier questions left them.",
        rich_help_panel=WORK,
    ),
]

LOOKAHEADS = (SystemName.FETCH, SystemName.QUESTION, SystemName.REFINED)
ALL = tuple(PipelineName)
HYDE = (PipelineName.HYDE,)


def latency(
    asking: BenchOptions,
    keeping: ResultOptions,
    pages: Annotated[
        list[Pages] | None,
        typer.Option(
            help="Page cache and arenas when a question comes: emptied, or as earlier questions left them; repeatable.  "
            "\\[default: cold]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
) -> None:
    """Latency of single questions by pipeline and dataset: the paper's main comparison."""
    from telerag_cli.bench.answering import latency as measure

    systems = (SystemName.FAISS_ONDISK, *LOOKAHEADS, SystemName.LLM_ONLY)
    states = list(dict.fromkeys(pages or [Pages.COLD]))
    _answering(SuiteName.LATENCY, asking, keeping, systems, ALL, Pages.COLD, lambda ask: measure(ask, states))


def breakdown(asking: BenchOptions, keeping: ResultOptions, pages: PagesOption = Pages.COLD) -> None:
    """Where the time goes, stage by stage: the paper's breakdown of latency."""
    from telerag_cli.bench.answering import breakdown as measure

    systems = (SystemName.FAISS_ONDISK, SystemName.FETCH, SystemName.REFINED)
    _answering(SuiteName.BREAKDOWN, asking, keeping, systems, ALL, pages, measure)


def nprobe(
    asking: BenchOptions,
    keeping: ResultOptions,
    values: Annotated[
        list[int] | None,
        typer.Option(
            "--values",
            min=1,
            help="Lists probed; repeatable, in place of --nprobe.  \\[default: 64, 128, 256, 512]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    pages: PagesOption = Pages.COLD,
) -> None:
    """Latency by lists probed: the paper's sensitivity to nprobe."""
    from telerag_cli.bench.answering import nprobe as measure

    systems = (SystemName.FAISS_ONDISK, SystemName.FETCH, SystemName.REFINED)
    chosen = values or [64, 128, 256, 512]
    _answering(
        SuiteName.NPROBE, asking, keeping, systems, HYDE, pages, lambda ask: measure(ask, chosen), nprobes=chosen
    )


def hit_rate(
    asking: BenchOptions,
    keeping: ResultOptions,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            help="Bytes that lookahead may move, as a multiple of those probed; repeatable.  "
            "\\[default: 0.25, 0.5, 0.75, 1, 1.3, 1.6]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
) -> None:
    """Lists in fast memory when the query comes, by bytes that may be moved before: the paper's hit rate by budget."""
    from telerag_cli.bench.answering import hit_rate as measure

    systems = (SystemName.QUESTION, SystemName.REFINED, SystemName.PERFECT)
    chosen = budget or [0.25, 0.5, 0.75, 1.0, 1.3, 1.6]
    _answering(SuiteName.HIT_RATE, asking, keeping, systems, HYDE, Pages.COLD, lambda ask: measure(ask, chosen))


def throughput(
    asking: BenchOptions,
    keeping: ResultOptions,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Questions given together; repeatable. Each is tried --repeats times, with other questions.  "
            "\\[default: 1, 4, 8]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of them, answered at once; the rest wait for the scheduler.  \\[default: all, at most 8]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    pages: PagesOption = Pages.COLD,
) -> None:
    """Questions answered a second, by how many are given together: the paper's throughput by batch size."""
    from telerag_cli.bench.answering import throughput as measure

    systems = (SystemName.FAISS_ONDISK, SystemName.FETCH, SystemName.ARRIVAL, SystemName.REFINED)
    sizes = batch_size or [1, 4, 8]
    at_once = concurrency or min(8, max(sizes))
    _answering(
        SuiteName.THROUGHPUT,
        asking,
        keeping,
        systems,
        HYDE,
        pages,
        lambda ask: measure(ask, sizes, at_once),
        concurrency=at_once,
    )


def cache(
    asking: BenchOptions,
    keeping: ResultOptions,
    policy: Annotated[
        list[CacheKind] | None,
        typer.Option(
            help="What stays in the arena between questions; repeatable.  \\[default: all]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    cache_fraction: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the arena kept for hot lists; repeatable.  \\[default: 0.5, 0, 0.25, 0.75]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            min=0.0, help="Bytes that lookahead may move, as a multiple of those probed.", rich_help_panel=WORK
        ),
    ] = 0.5,
    window: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds for lookahead before each retrieval.  \\[default: what the LLM takes]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    skew: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=10.0,
            help="Which questions are asked: 0 for each once, in order; above it, as many drawn with putting back by a Zipf law "
            "of this exponent; repeatable.  \\[default: 0]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
) -> None:
    """What is left of earlier questions, by cache policy and share: the paper's ablation of the cache."""
    from telerag_cli.bench.caching import cache as measure

    if asking.system:
        raise UsageError(
            "--system has no part in bench cache, whose systems are cache policies.", remedy="Name them with --policy."
        )
    policies = list(dict.fromkeys(policy or CacheKind))
    fractions = list(dict.fromkeys(cache_fraction or [0.5, 0.0, 0.25, 0.75]))
    skews = list(dict.fromkeys(skew or [0.0]))
    _answering(
        SuiteName.CACHE,
        asking,
        keeping,
        (SystemName.FETCH,),
        HYDE,
        Pages.COLD,
        lambda ask: measure(ask, policies, fractions, budget, window, skews),
    )


def scaling(
    asking: BenchOptions,
    keeping: ResultOptions,
    replicas: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Replicas side by side on this machine; repeatable.  \\[default: 1, 2]",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions that each replica answers at once.", rich_help_panel=WORK)
    ] = 8,
    lookahead: Annotated[Lookahead, one("lookahead")] = Lookahead.REFINED,
    schedule: Annotated[ScheduleName, one("schedule", ReplicaConfig)] = ScheduleName.SIMILAR,
    batch_size: Annotated[int, one("batch_size", ReplicaConfig)] = 64,
    micro_batch: Annotated[int | None, one("micro_batch", ReplicaConfig)] = None,
    placement: Annotated[PlacementName, one("placement", ReplicaConfig)] = PlacementName.CACHE_AWARE,
) -> None:
    """Questions answered per second by several replicas on this machine: the paper's scaling over several GPUs."""
    if asking.system:
        raise UsageError(
            "--system cannot be combined with bench scaling, which measures replicas.", remedy="Leave it out."
        )
    names = asking.pipeline or [PipelineName.HYDE]
    if len(names) > 1:
        raise UsageError(
            f"bench scaling takes one pipeline and {len(names)} are named.", remedy="Name one with --pipeline."
        )
    noted = metadata_of(keeping.metadata)
    path = result_path(keeping.result_dir, keeping.result_filename, f"{SuiteName.SCALING}.json")
    questions = _questions(SuiteName.SCALING, asking)
    counts = tuple(dict.fromkeys(replicas or (1, 2)))
    with console.stdout_reserved():
        from telerag_cli.bench.recording import keep, settings_of
        from telerag_cli.bench.replicas import scaling as measure
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.distributed.replicas import Recipe, check_memory
        from telerag_cli.engine.opening import prepare
        from telerag_cli.engine.scheduler import scheduled
        from telerag_cli.system import available_bytes

        started = keep(SuiteName.SCALING)
        config = replace(asking.config(concurrency), pipeline=names[0], lookahead=lookahead)
        made = prepare(config, ConsoleReporter())
        index, name = made.opened.index, names[0]
        config = replace(config, k=made.k, nprobe=made.nprobe)
        check_memory(index, config, max(counts), available_bytes())
        wish = ReplicaConfig(schedule=schedule, placement=placement, batch_size=batch_size, micro_batch=micro_batch)
        how = scheduled(wish, concurrency, made.tier.gpu_bytes or made.tier.ram_bytes, index, made.nprobe)
        warmups = next(iter(questions.values()))[: asking.num_warmups]
        measured = [text for texts in questions.values() for text in texts[asking.num_warmups :]]
        with console.progress("answering", len(counts) * asking.repeats, unit="runs") as advance:
            outcome = measure(
                made.opened,
                Recipe(config),
                how,
                counts,
                warmups,
                measured,
                repeats=asking.repeats,
                seed=asking.seed,
                detailed=keeping.save_detailed,
                advance=advance,
            )
        same = settings_of(
            made.opened,
            config,
            questions,
            asking.trace,
            lookahead=lookahead.value,
            questions_at_once=concurrency,
            **_extent(asking, made, [name.value], questions),
        )
        result = started.done(outcome, same, noted)
    show(result, keeping, path)


def embed(
    source: Annotated[str, typer.Argument(help="What telerag embed reads.", metavar="SOURCE", show_default=False)],
    keeping: ResultOptions,
    num_prompts: Annotated[int, typer.Option(min=1, help="Passages.", rich_help_panel=WORK)] = 384,
    shortest: Annotated[
        int, typer.Option(min=0, help="Leave out passages of fewer characters.", rich_help_panel=WORK)
    ] = 500,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.", rich_help_panel=WORK)] = 5,
    model: Annotated[
        str | None,
        typer.Option(help="The model.  \\[default: the bundled one]", metavar="NAME|PATH", show_default=False),
    ] = None,
    device: Annotated[str, one("device")] = "auto",
) -> None:
    """Embedding a corpus, against SentenceTransformer.encode with its defaults; not in the paper."""
    from telerag_cli.bench.preparing import embedding

    def measure(advance: Callable[[int], None]) -> tuple[Outcome, dict[str, Any]]:
        return embedding(source, model, device, num_prompts, shortest, repeats, advance)

    _preparing(SuiteName.EMBED, keeping, measure)


def build(
    embeddings: Annotated[
        Path, typer.Argument(help="Embeddings, made by telerag embed.", metavar="EMBEDDINGS", show_default=False)
    ],
    keeping: ResultOptions,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The index to build; replaced if it is there.", metavar="INDEX", show_default=False
        ),
    ],
    nlist: Annotated[int, typer.Option(min=1, help="Lists.", rich_help_panel=WORK)] = 4096,
    memory: Annotated[
        str, typer.Option(help="What building may take, see telerag build-index.", metavar="SIZE", rich_help_panel=WORK)
    ] = "2GiB",
) -> None:
    """Building an index, against Faiss's train and add in memory; not in the paper."""
    from telerag_cli.bench.preparing import building

    def measure(advance: Callable[[int], None]) -> tuple[Outcome, dict[str, Any]]:
        return building(embeddings, output, nlist, memory, advance)

    _preparing(SuiteName.BUILD, keeping, measure)


for _command, _name in (
    (latency, SuiteName.LATENCY),
    (breakdown, SuiteName.BREAKDOWN),
    (nprobe, SuiteName.NPROBE),
    (hit_rate, SuiteName.HIT_RATE),
    (throughput, SuiteName.THROUGHPUT),
    (cache, SuiteName.CACHE),
    (scaling, SuiteName.SCALING),
    (embed, SuiteName.EMBED),
    (build, SuiteName.BUILD),
):
    app.command(_name.value)(guarded(expanded(_command)))
for _made in (report, compare):
    app.command()(guarded(_made))


def _answering(
    suite: SuiteName,
    asking: BenchOptions,
    keeping: ResultOptions,
    systems: Sequence[SystemName],
    pipelines: Sequence[PipelineName],
    pages: Pages,
    measure: Callable[[Ask], Outcome],
    *,
    nprobes: Sequence[int] = (),
    concurrency: int = 1,
) -> None:
    """Open what answering needs, measure, and keep what was found."""
    noted = metadata_of(keeping.metadata)
    path = result_path(keeping.result_dir, keeping.result_filename, f"{suite}.json")
    questions = _questions(suite, asking)
    with console.stdout_reserved(), contextlib.ExitStack() as opened_here:
        from telerag_cli.bench.answering import Ask
        from telerag_cli.bench.recording import keep, settings_of
        from telerag_cli.bench.systems import Setup
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.engine.opening import prepare
        from telerag_cli.retrieval.retriever import check_search

        started = keep(suite)
        config = asking.config(concurrency)
        made = prepare(config, ConsoleReporter())
        assert made.llm
        for value in nprobes:
            check_search(made.opened.index, made.k, value)
        made.opened.embedder.warm_up(approximate=True)
        generator = opened_here.enter_context(contextlib.closing(made.llm.open()))
        config = replace(config, k=made.k, nprobe=made.nprobe)
        ask = Ask(
            setup=Setup(made.opened, generator, config, pages, reporter=ConsoleReporter()),
            systems=tuple(dict.fromkeys(asking.system or systems)),
            questions=questions,
            pipelines=[make_pipeline(name) for name in asking.pipeline or pipelines],
            num_warmups=asking.num_warmups,
            repeats=asking.repeats,
            seed=asking.seed,
            detailed=keeping.save_detailed,
            counting=console.progress,
        )
        outcome = measure(ask)
        same = settings_of(
            made.opened,
            config,
            questions,
            asking.trace,
            **_extent(asking, made, [pipeline.name for pipeline in ask.pipelines], questions),
        )
        result = started.done(outcome, same, noted)
    show(result, keeping, path)


def _questions(suite: SuiteName, asking: BenchOptions) -> dict[str, list[str]]:
    """The questions of each dataset, those for warming up included."""
    if not asking.dataset:
        raise UsageError(
            f"bench {suite} needs questions and none are named.",
            remedy="Give --dataset FILE, or the NAME of a prepared dataset.",
        )
    from telerag_cli.datasets.questions import load_questions

    count = asking.num_warmups + asking.num_prompts
    return {
        dataset_name(name): [each.text for each in load_questions(name, limit=count, seed=asking.seed)]
        for name in asking.dataset
    }


def _extent(
    asking: BenchOptions, made: Prepared, pipelines: Sequence[str], questions: dict[str, list[str]]
) -> dict[str, Any]:
    """How much was asked, and of what, as settings of a result."""
    assert made.llm
    return {
        "llm": made.llm.name,
        "num_prompts": max(map(len, questions.values())) - asking.num_warmups,
        "num_warmups": asking.num_warmups,
        "repeats": asking.repeats,
        "seed": asking.seed,
        "pipelines": pipelines,
        "fast_memory_bytes": asking.config(1).fast_memory_bytes,
    }


Preparing = Callable[[Callable[[int], None]], "tuple[Outcome, dict[str, Any]]"]
"""Measures, telling of progress; what was found, and what was the same for all systems."""


def _preparing(suite: SuiteName, keeping: ResultOptions, measure: Preparing) -> None:
    """Measure and keep what was found."""
    noted = metadata_of(keeping.metadata)
    path = result_path(keeping.result_dir, keeping.result_filename, f"{suite}.json")
    with console.stdout_reserved():
        from telerag_cli.bench.recording import keep

        started = keep(suite)
        with console.progress(f"bench {suite}", None) as advance:
            outcome, settings = measure(advance)
        result = started.done(outcome, settings, noted)
    show(result, keeping, path)
