"""``telerag bench``: suites that compare systems side by side, and what is made of their results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telerag_cli.bench.suites import Pages, SuiteName, SystemName
from telerag_cli.cli import console
from telerag_cli.cli.bench_options import BenchConfig, BenchOptions, ResultOptions, SharedOptions, work
from telerag_cli.cli.guard import guarded
from telerag_cli.cli.options import Only, expanded, one
from telerag_cli.config import CacheKind, Lookahead, PipelineName, ReplicaConfig
from telerag_cli.errors import UsageError

if TYPE_CHECKING:
    from telerag_cli.bench.answering import Ask
    from telerag_cli.bench.results import Outcome

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure, side by side with other systems: each suite stands for a figure of the paper, "
    "and its help says which.",
)

PAGES = "Page cache and arenas when a question comes: emptied, or as earlier questions left them"
PagesOption = Annotated[Pages, work(f"{PAGES}.")]

LOOKAHEADS = (SystemName.FETCH, SystemName.QUESTION, SystemName.REFINED)
ON_DISK = (SystemName.FAISS_ONDISK, SystemName.FETCH, SystemName.REFINED)
ALL = tuple(PipelineName)
HYDE = (PipelineName.HYDE,)


def latency(
    asking: BenchOptions,
    config: SharedOptions,
    keeping: ResultOptions,
    pages: Annotated[list[Pages] | None, work(f"{PAGES}; repeatable.", default="cold")] = None,
) -> None:
    """Latency of single questions by pipeline and dataset: the paper's main comparison."""
    from telerag_cli.bench.answering import latency as measure

    defaults = (SystemName.FAISS_ONDISK, *LOOKAHEADS, SystemName.LLM_ONLY), ALL
    states = _unique(pages, Pages.COLD)
    _answering(SuiteName.LATENCY, (asking, config, keeping), defaults, lambda ask: measure(ask, states))


def breakdown(
    asking: BenchOptions, config: SharedOptions, keeping: ResultOptions, pages: PagesOption = Pages.COLD
) -> None:
    """Where the time goes, stage by stage: the paper's breakdown of latency."""
    from telerag_cli.bench.answering import breakdown as measure

    _answering(SuiteName.BREAKDOWN, (asking, config, keeping), (ON_DISK, ALL), measure, pages=pages)


def nprobe(
    asking: BenchOptions,
    config: SharedOptions,
    keeping: ResultOptions,
    values: Annotated[
        list[int] | None,
        work("Lists probed; repeatable, in place of --nprobe.", "--values", default="64, 128, 256, 512", min=1),
    ] = None,
    pages: PagesOption = Pages.COLD,
) -> None:
    """Latency by lists probed: the paper's sensitivity to nprobe."""
    from telerag_cli.bench.answering import nprobe as measure

    chosen = _unique(values, 64, 128, 256, 512)
    given = asking, config, keeping
    _answering(SuiteName.NPROBE, given, (ON_DISK, HYDE), lambda ask: measure(ask, chosen), pages=pages, nprobes=chosen)


def hit_rate(
    asking: BenchOptions,
    config: SharedOptions,
    keeping: ResultOptions,
    budget: Annotated[
        list[float] | None,
        work(
            "Bytes that lookahead may move, as a multiple of those probed; repeatable.",
            default="0.25, 0.5, 0.75, 1, 1.3, 1.6",
            min=0.0,
        ),
    ] = None,
) -> None:
    """Lists in fast memory when the query comes, by bytes that may be moved before: the paper's hit rate by budget."""
    from telerag_cli.bench.answering import hit_rate as measure

    defaults = (SystemName.QUESTION, SystemName.REFINED, SystemName.PERFECT), HYDE
    chosen = _unique(budget, 0.25, 0.5, 0.75, 1.0, 1.3, 1.6)
    _answering(SuiteName.HIT_RATE, (asking, config, keeping), defaults, lambda ask: measure(ask, chosen))


def throughput(
    asking: BenchOptions,
    config: SharedOptions,
    keeping: ResultOptions,
    batch_size: Annotated[
        list[int] | None,
        work(
            "Questions given together; repeatable. Each is tried --repeats times, with other questions.",
            default="1, 4, 8",
            min=1,
        ),
    ] = None,
    concurrency: Annotated[
        int | None, work("Of them, answered at once; the rest wait for the scheduler.", default="all, at most 8", min=1)
    ] = None,
    pages: PagesOption = Pages.COLD,
) -> None:
    """Questions answered per second, by how many are given together: the paper's throughput by batch size."""
    from telerag_cli.bench.answering import throughput as measure

    defaults = (SystemName.FAISS_ONDISK, SystemName.FETCH, SystemName.ARRIVAL, SystemName.REFINED), HYDE
    sizes = _unique(batch_size, 1, 4, 8)
    at_once = concurrency or min(8, max(sizes))
    given = asking, config, keeping
    _answering(
        SuiteName.THROUGHPUT,
        given,
        defaults,
        lambda ask: measure(ask, sizes, at_once),
        pages=pages,
        concurrency=at_once,
    )


def cache(
    asking: BenchOptions,
    config: SharedOptions,
    keeping: ResultOptions,
    policy: Annotated[
        list[CacheKind] | None, work("What stays in the arena between questions; repeatable.", default="all")
    ] = None,
    cache_fraction: Annotated[
        list[float] | None,
        work("Share of the arena kept for hot lists; repeatable.", default="0.5, 0, 0.25, 0.75", min=0.0, max=1.0),
    ] = None,
    budget: Annotated[float, work("Bytes that lookahead may move, as a multiple of those probed.", min=0.0)] = 0.5,
    window: Annotated[
        float | None, work("Seconds for lookahead before each retrieval.", default="what the LLM takes", min=0.0)
    ] = None,
    skew: Annotated[
        list[float] | None,
        work(
            "Which questions are asked: 0 for each once, in order; above it, as many sampled with replacement by a "
            "Zipf law of this exponent; repeatable.",
            default="0",
            min=0.0,
            max=10.0,
        ),
    ] = None,
) -> None:
    """What is left of earlier questions, by cache policy and share: the paper's ablation of the cache."""
    from telerag_cli.bench.caching import cache as measure

    if asking.system:
        raise UsageError(
            "--system cannot be combined with bench cache, whose systems are cache policies.",
            remedy="Name them with --policy.",
        )
    policies = _unique(policy, *CacheKind)
    fractions = _unique(cache_fraction, 0.5, 0.0, 0.25, 0.75)
    skews = _unique(skew, 0.0)
    _answering(
        SuiteName.CACHE,
        (asking, config, keeping),
        ((SystemName.FETCH,), HYDE),
        lambda ask: measure(ask, policies, fractions, budget, window, skews),
    )


def scaling(
    asking: BenchOptions,
    config: SharedOptions,
    wish: Annotated[ReplicaConfig, Only("schedule", "batch_size", "micro_batch", "placement")],
    keeping: ResultOptions,
    replicas: Annotated[
        list[int] | None, work("Replicas side by side on this machine; repeatable.", default="1, 2", min=1)
    ] = None,
    concurrency: Annotated[int, work("Questions that each replica answers at once.", min=1)] = 8,
    lookahead: Annotated[Lookahead, one("lookahead")] = Lookahead.REFINED,
) -> None:
    """Questions answered per second by several replicas on this machine: the paper's scaling over several GPUs."""
    if asking.system:
        raise UsageError(
            "--system cannot be combined with bench scaling, which measures replicas.", remedy="Leave it out."
        )
    (name, *others) = asking.pipeline or HYDE
    if others:
        raise UsageError(
            f"bench scaling takes one pipeline and {1 + len(others)} are named.", remedy="Name one with --pipeline."
        )
    counts = _unique(replicas, 1, 2)
    questions = asking.questions(SuiteName.SCALING)

    def measured() -> tuple[Outcome, dict[str, Any]]:
        from telerag_cli.bench.answering import settings_of
        from telerag_cli.bench.replicas import scaling as measure
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.distributed.replicas import check_memory
        from telerag_cli.engine.opening import prepare
        from telerag_cli.engine.scheduler import scheduled
        from telerag_cli.system import available_bytes

        wanted = replace(config.opened(asking, concurrency), pipeline=name, lookahead=lookahead)
        made = prepare(wanted, ConsoleReporter())
        assert made.llm
        shared = replace(wanted, k=made.k, nprobe=made.nprobe)
        index = made.opened.index
        check_memory(index, shared, max(counts), available_bytes())
        how = scheduled(wish, concurrency, made.tier.gpu_bytes or made.tier.ram_bytes, index, made.nprobe)
        warmups = next(iter(questions.values()))[: asking.num_warmups]
        rest = [text for texts in questions.values() for text in texts[asking.num_warmups :]]
        with console.progress("answering", len(counts) * asking.repeats, unit="runs") as advance:
            outcome = measure(
                made.opened,
                shared,
                how,
                counts,
                warmups,
                rest,
                repeats=asking.repeats,
                seed=asking.seed,
                detailed=keeping.save_detailed,
                advance=advance,
            )
        same = settings_of(made.opened, shared, made.llm.name, **asking.extent(questions, [name]))
        return outcome, same | {"lookahead": lookahead.value, "questions_at_once": concurrency}

    _keep(SuiteName.SCALING, keeping, measured)


def embed(
    source: Annotated[str, typer.Argument(help="What telerag embed reads.", metavar="SOURCE", show_default=False)],
    keeping: ResultOptions,
    num_prompts: Annotated[int, work("Passages.", min=1)] = 384,
    shortest: Annotated[int, work("Leave out passages of fewer characters.", min=0)] = 500,
    repeats: Annotated[int, work("Pairs of runs.", min=1)] = 5,
    model: Annotated[
        str | None,
        typer.Option(help="The model.  \\[default: the bundled one]", metavar="NAME|PATH", show_default=False),
    ] = None,
    device: Annotated[str, one("device")] = "auto",
) -> None:
    """Embedding a corpus, against SentenceTransformer.encode with its defaults; not in the paper."""

    def measured() -> tuple[Outcome, dict[str, Any]]:
        from telerag_cli.bench.preparing import embedding

        with console.progress("bench embed", None) as advance:
            return embedding(source, model, device, num_prompts, shortest, repeats, advance)

    _keep(SuiteName.EMBED, keeping, measured)


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
    nlist: Annotated[int, work("Lists.", min=1)] = 4096,
    memory: Annotated[str, work("Memory that building may take, see telerag build-index.", metavar="SIZE")] = "2GiB",
) -> None:
    """Building an index, against Faiss's train and add in memory; not in the paper."""

    def measured() -> tuple[Outcome, dict[str, Any]]:
        from telerag_cli.bench.preparing import building

        with console.progress("bench build", None) as advance:
            return building(embeddings, output, nlist, memory, advance)

    _keep(SuiteName.BUILD, keeping, measured)


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of results.", metavar="DIR", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for report.md and the plots; made if needed.  \\[default: DIR]",
            metavar="OUT",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write report.md and plots of all results in a folder; needs the extra bench."""
    from telerag_cli.bench import report as reports

    with console.progress("Drawing", None, unit="files") as advance:
        written = reports.write(folder, output or folder, advance)
    for path in written:
        console.emit(str(path))


def compare(
    first: Annotated[
        Path,
        typer.Argument(help="A result, or a folder of them: what to compare with.", metavar="A", show_default=False),
    ],
    second: Annotated[
        Path, typer.Argument(help="Another of the same suite, or such a folder.", metavar="B", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what changed between two results, or two folders of them, and what is only noise."""
    from telerag_cli.bench import compare as comparing
    from telerag_cli.bench.wording import plain

    comparisons, alone = comparing.compare_paths(first, second)
    if alone:
        console.warn(f"Only one side has {', '.join(alone)}.")
    if as_json:
        console.emit_json({"comparisons": list(map(asdict, comparisons)), "unmatched": alone}, indent=2)
        return
    for comparison in comparisons:
        # Above the tables, which may be narrower than their titles.
        if comparison.differences:
            console.emit(f"{comparison.title}: not the same in A and B")
            rows = [[each["name"], plain(each["a"]), plain(each["b"])] for each in comparison.differences]
            console.table("", ("setting", "A", "B"), rows, data=True)
        console.emit(comparison.title)
        table = comparing.table(comparison)
        console.table("", table.columns, table.rows, data=True)


for _suite in (latency, breakdown, nprobe, hit_rate, throughput, cache, scaling, embed, build):
    app.command(_suite.__name__.replace("_", "-"))(guarded(expanded(_suite)))
for _command in (report, compare):
    app.command()(guarded(_command))


def _unique(chosen: Sequence[Any] | None, *defaults: Any) -> tuple[Any, ...]:
    """What was chosen, each once, or the defaults."""
    return tuple(dict.fromkeys(chosen or defaults))


def _answering(
    suite: SuiteName,
    given: tuple[BenchOptions, BenchConfig, ResultOptions],
    defaults: tuple[Sequence[SystemName], Sequence[PipelineName]],
    measure: Callable[[Ask], Outcome],
    *,
    pages: Pages = Pages.COLD,
    nprobes: Sequence[int] = (),
    concurrency: int = 1,
) -> None:
    """Open what answering needs, measure, and keep what was found; ``defaults`` are the systems and the pipelines."""
    asking, config, keeping = given
    questions = asking.questions(suite)

    def measured() -> tuple[Outcome, dict[str, Any]]:
        from telerag_cli.bench.answering import Ask, settings_of
        from telerag_cli.bench.systems import Setup
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.engine.opening import prepare
        from telerag_cli.pipelines.registry import make_pipeline
        from telerag_cli.retrieval.retriever import check_search

        reporter = ConsoleReporter()
        wanted = config.opened(asking, concurrency)
        made = prepare(wanted, reporter)
        assert made.llm
        for value in nprobes:
            check_search(made.opened.index, made.k, value)
        made.opened.embedder.warm_up(approximate=True)
        shared = replace(wanted, k=made.k, nprobe=made.nprobe)
        names = _unique(asking.pipeline, *defaults[1])
        with contextlib.closing(made.llm.open()) as generator:
            ask = Ask(
                setup=Setup(made.opened, generator, shared, pages, reporter),
                systems=_unique(asking.system, *defaults[0]),
                questions=questions,
                pipelines=[make_pipeline(name) for name in names],
                num_warmups=asking.num_warmups,
                repeats=asking.repeats,
                seed=asking.seed,
                detailed=keeping.save_detailed,
                counting=console.progress,
            )
            return measure(ask), settings_of(made.opened, shared, made.llm.name, **asking.extent(questions, names))

    _keep(suite, keeping, measured)


def _keep(suite: SuiteName, keeping: ResultOptions, measure: Callable[[], tuple[Outcome, dict[str, Any]]]) -> None:
    """Measure, write the result where it is wanted, and print it."""
    noted, path = keeping.noted(), keeping.path(f"{suite}.json")
    with console.stdout_reserved():
        from telerag_cli.bench.report import headline_table, ratios_table
        from telerag_cli.bench.results import SuiteResult

        result = SuiteResult.of(suite, measure, noted)
    if path:
        result.save(path)
        console.say(f"{path}; telerag bench report {path.parent} makes a report of it.")
    if keeping.as_json:
        console.emit_json(asdict(result))
    else:
        for table in (headline_table(result), ratios_table(result)):
            if table.rows:
                console.table(table.caption, table.columns, table.rows, data=True)
    for check in result.checks:
        if not check.held:
            console.warn(f"{check.name}: {check.says}")
