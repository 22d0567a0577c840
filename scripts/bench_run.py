"""What answering many questions at once gives: `telerag run`'s own path, one question at a time and many.

Each turn opens model and arena anew, so that none finds what another left. Texts must be the same in every turn. The third
system follows the question only: what refining costs an LLM that decodes for many questions is its time against that one.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from telerag_cli.bench_record import record
from telerag_cli.config import MOST_CONCURRENT, Lookahead, ScheduleName, TierKind, parse_bytes
from telerag_cli.engine.assemble import Opened, default_k, default_nprobe, open_engine, open_index
from telerag_cli.engine.batch import LineForm, Outputs, answer_all
from telerag_cli.engine.llm import LlmOptions, plan_llm
from telerag_cli.engine.placement import TierOptions, plan_tier
from telerag_cli.engine.questions import Question, read_questions
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.engine.session import Settings
from telerag_cli.engine.workers import Local
from telerag_cli.files import write_json
from telerag_cli.generation.models import resolve_model
from telerag_cli.index.artifact import Index
from telerag_cli.pipelines.registry import PipelineName, make_pipeline

ALONE, TOGETHER, UNREFINED = "one at a time", "together", "together, not refined"


def talk(message: str) -> None:
    """To stderr."""
    print(message, file=sys.stderr)


def turn(opened: Opened, questions: list[Question], name: PipelineName, concurrency: int, settings: Settings,
         model: str | None, arena_bytes: int) -> dict[str, Any]:  # fmt: skip
    """Answer all questions; what it took, and the answers."""
    tier = plan_tier(opened.index, TierOptions(TierKind.HOST, fast_memory_bytes=arena_bytes))
    llm = plan_llm(LlmOptions(model=model), concurrency, tier, talk)
    engine = open_engine(opened, llm.open, tier, settings)
    lines: list[dict[str, Any]] = []
    outputs = Outputs(lines.append, None, talk, lambda _count: None)
    try:
        schedule = Schedule(ScheduleName.ARRIVAL)
        summary = answer_all([Local(engine, make_pipeline(name), name.value, concurrency)], Scheduler.over(engine, schedule),
                             questions, outputs, LineForm(name, settings.lookahead), answered=set())  # fmt: skip
    finally:
        engine.close()
    if summary.failed:
        raise SystemExit(f"{summary.failed} questions failed")
    stages = [stage for line in lines for stage in line["stages"]]
    orders = sum(line["lookahead"]["orders"] for line in lines)
    return {
        "wall_s": round(summary.wall_s, 3),
        "questions_per_s": round(len(lines) / summary.wall_s, 4),
        "prompt_tokens": sum(stage["prompt_tokens"] for stage in stages),
        "completion_tokens": sum(stage["completion_tokens"] for stage in stages),
        "orders": orders,
        "lists_hit_share": round(summary.lists_hit / summary.lists_wanted, 4),
        "answers": {line["id"]: line["answer"] for line in lines},
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--pipeline", type=PipelineName, default=PipelineName.HYDE)
    parser.add_argument("--model", help="a GGUF file; by default the bundled model")
    parser.add_argument("-k", type=int, help="passages for an answer; by default as in `telerag run`")
    parser.add_argument("--concurrency", type=int, default=MOST_CONCURRENT)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--fast-memory", default="512MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    with options.questions.open("rb") as lines:
        questions = list(read_questions(lines, str(options.questions)))[: options.limit]
    opened = open_index(Index.open(options.index), None)
    refined, unrefined = (Settings(options.k or default_k(opened.index), default_nprobe(opened.index), lookahead, options.max_tokens)
                          for lookahead in (Lookahead.REFINED, Lookahead.QUESTION))  # fmt: skip
    systems = {
        ALONE: (1, refined),
        TOGETHER: (options.concurrency, refined),
        UNREFINED: (options.concurrency, unrefined),
    }
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.repeats):
        names = list(systems)
        names = names[number % 3 :] + names[: number % 3]
        rounds.append({name: turn(opened, questions, options.pipeline, *systems[name], options.model,
                                  parse_bytes(options.fast_memory)) for name in names})  # fmt: skip
        talk(
            f"{number + 1}/{options.repeats}  "
            + "  ".join(f"{name} {rounds[-1][name]['wall_s']:.1f} s" for name in systems)
        )
    texts = [result.pop("answers") for each in rounds for result in each.values()]
    same = sum(len({text[question.id] for text in texts}) == 1 for question in questions)

    def ratio(over: str, under: str) -> float:
        return float(statistics.median(each[over]["wall_s"] / each[under]["wall_s"] for each in rounds))

    faster, slowed = ratio(ALONE, TOGETHER), ratio(TOGETHER, UNREFINED)
    rate = {name: statistics.median(each[name]["questions_per_s"] for each in rounds) for name in systems}
    for name in systems:
        print(f"{name:24} {rate[name]:6.3f} questions/s")
    print(f"together against one at a time: {faster:.3f} x; refining costs {slowed - 1:+.1%} of the time")
    print(f"the same answer in every turn: {same} of {len(questions)}")
    if options.output:
        weights = resolve_model(options.model, None).stem
        setting = f"{weights}, {len(questions)} {options.pipeline} questions, k {refined.k}, answers up to {options.max_tokens} tokens"
        figures = [
            {"what": f"{setting}, {options.concurrency} at once", "value": f"{rate[TOGETHER]:.2f} questions/s ({faster:.2f} x)",
             "against": f"one at a time: {rate[ALONE]:.2f} questions/s", "goal": "at least 1.5 x"},
            {"what": "What refining lookahead costs them, in time", "value": f"{slowed - 1:+.1%}",
             "against": "lookahead by the question only", "goal": "at most 3 %"},
            {"what": "The same answer, one at a time and together", "value": f"{same} of {len(questions)}", "against": "", "goal": "all"},
        ]  # fmt: skip
        write_json(options.output, record(shlex.join(["python", *sys.argv]), figures=figures, questions=len(questions),
                                          concurrency=options.concurrency, model=weights, k=refined.k, together_over_alone=round(faster, 4),
                                          refining_over_not=round(slowed, 4), same_answers=same, rounds=rounds))  # fmt: skip


if __name__ == "__main__":
    main()
