"""``telerag eval``: how good the answers and passages of runs are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.search import open_lines
from telerag_cli.errors import InputError, UsageError
from telerag_cli.files import wrap_os_error, write_json, writing

if TYPE_CHECKING:
    from telerag_cli.evaluation.bootstrap import Estimate
    from telerag_cli.evaluation.evaluate import Evaluation, Reference
    from telerag_cli.evaluation.records import Run

DECIMALS = 3
INTERVAL = "95 % interval"
VERDICTS = {True: "differs", False: "no difference shown", None: "too few questions"}


def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(help="What telerag run wrote, or telerag search --json; - is stdin.", metavar="RUN..."),
    ],
    questions: Annotated[
        str | None,
        typer.Option(
            "--questions",
            "-q",
            help="The questions as JSONL, with gold answers as answers, and ids of supporting passages as passages.",
            metavar="FILE|-",
        ),
    ] = None,
    qrels: Annotated[
        str | None,
        typer.Option(
            help="Which passages are relevant, as TREC or BEIR write it.  "
            "\\[default: the passages that --questions names, or else those that contain a gold answer]",
            metavar="FILE|-",
        ),
    ] = None,
    cutoffs: Annotated[
        list[int] | None,
        typer.Option(
            "--cutoff",
            "-k",
            help="Measure the first so many passages; may be repeated.  "
            "\\[default: 1, 3, 5 and 10, as far as passages were retrieved]",
        ),
    ] = None,
    trec: Annotated[
        Path | None,
        typer.Option(
            help="Write what was retrieved as a TREC run file; of several runs, a folder of them.",
            metavar="FILE|FOLDER",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the result as JSON.", metavar="FILE")
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=100, max=1_000_000, help="How often the bootstrap draws questions.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Measure answers and passages of runs, with intervals, and say whether two runs differ."""
    _check(runs, questions, qrels, cutoffs)
    # Libraries that are loaded on the way may write to stdout.
    with console.stdout_reserved():
        from telerag_cli.evaluation.bootstrap import Sampling
        from telerag_cli.evaluation.evaluate import evaluate as measure

        opened = _read_runs(runs)
        reference = _read_reference(questions, qrels)
        total = sum(len(run.records) for run in opened)
        with console.progress("Scoring", total, unit="answers") as advance:
            result = measure(opened, reference, cutoffs, Sampling(resamples, seed), advance)
        if trec:
            _write_trec(opened, trec)
        if output:
            write_json(output, result.as_json())
        if as_json:
            console.emit_json(result.as_json(), indent=2)
        else:
            _show(result)
    for note in result.notes:
        console.say(note)


def _check(runs: Sequence[str], questions: str | None, qrels: str | None, cutoffs: Sequence[int] | None) -> None:
    sources = [*runs, *(source for source in (questions, qrels) if source)]
    if sources.count("-") > 1:
        raise UsageError(
            f"- is given {sources.count('-')} times, and stdin can be read once.", remedy="Give files for the others."
        )
    twice = next((run for run in runs if list(runs).count(run) > 1), None)
    if twice:
        raise UsageError(f"{twice} is given {list(runs).count(twice)} times.", remedy="Give each run once.")
    if cutoffs and min(cutoffs) < 1:
        raise UsageError(f"-k is {min(cutoffs)}, and the first passage is at 1.", remedy="Give 1 or more.")


def _read_runs(sources: Sequence[str]) -> list[Run]:
    from telerag_cli.evaluation.records import names_of, read_run

    found = []
    for source, name in zip(sources, names_of(sources), strict=True):
        with open_lines(source) as (lines, told):
            found.append(read_run(lines, told, name))
    return found


def _read_reference(questions: str | None, qrels: str | None) -> Reference:
    from telerag_cli.evaluation.evaluate import Reference
    from telerag_cli.evaluation.judgements import read_qrels
    from telerag_cli.evaluation.records import read_gold

    gold, gold_name, judged, judged_name = {}, "", None, ""
    if questions:
        with open_lines(questions) as (lines, gold_name):
            gold = read_gold(lines, gold_name, judged=qrels is not None)
    if qrels:
        with open_lines(qrels) as (lines, judged_name):
            judged = read_qrels(lines, judged_name)
    return Reference(gold, gold_name, judged, judged_name)


def _write_trec(runs: Sequence[Run], target: Path) -> None:
    """A file, or for several runs a folder with one each, named like the runs."""
    from telerag_cli.evaluation.judgements import scores_order, trec_id, trec_lines

    paths = [target]
    if len(runs) > 1:
        names = [trec_id(run.name.removesuffix(".jsonl")).replace("/", "-").strip("<>") for run in runs]
        clash = next((name for name in names if names.count(name) > 1), None)
        if clash:
            raise UsageError(f"Two of the runs would both be written as {target / clash}.trec.", remedy="Rename one.")
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise wrap_os_error(error, target) from error
        paths = [target / f"{name}.trec" for name in names]
    for run, path in zip(runs, paths, strict=True):
        if not run.most_passages:
            raise InputError(
                f"{run.source} has {len(run.records):,} lines and no passage, so there is nothing to write to {path}.",
                remedy="Leave out --trec, or this run.",
            )
        own = scores_order(run)
        with writing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
            handle.writelines(f"{line}\n" for line in trec_lines(run, own_scores=own))
        if not own:
            console.say(
                f"{path}: sorted by their own scores, the passages of {run.source} would not keep their order, so the "
                "scores written are 1 / rank."
            )


def _show(result: Evaluation) -> None:
    measured = [
        (run.run, name, _number(found.value), _interval(found), found.questions)
        for run in result.runs
        for name, found in run.measures.items()
    ]
    if measured:
        console.table("Quality", ["run", "measure", "mean", INTERVAL, "questions"], measured, data=True)
    if not result.comparisons:
        return
    pairs = [
        (each.first, each.second, each.questions, _or_dash(each.identical_answers), _or_dash(each.identical_passages))
        for each in result.comparisons
    ]
    columns = ["first", "second", "answered by both", "identical answers", "identical passages"]
    console.table("Runs side by side", columns, pairs, data=True)
    differences = [
        (each.first, each.second, name, _number(found.value, "+"), _interval(found, "+"), found.questions, verdict)
        for each in result.comparisons
        for name, found in each.measures.items()
        for verdict in (VERDICTS[found.differs],)
    ]
    if differences:
        columns = ["first", "second", "measure", "second - first", INTERVAL, "questions", "verdict"]
        console.table("Differences", columns, differences, data=True)


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.{DECIMALS}f}"


def _interval(found: Estimate, sign: str = "") -> str:
    if found.low is None or found.high is None:
        return "-"
    return f"{_number(found.low, sign)} to {_number(found.high, sign)}"


def _or_dash(count: int | None) -> str | int:
    return "-" if count is None else count
