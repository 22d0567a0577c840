"""Draw a real trace of every pipeline into docs/pipelines.md: one question each, over `telerag quickstart`'s index."""

from __future__ import annotations

import argparse
from pathlib import Path

from telerag_cli.cli.chat_screen import seconds, timeline
from telerag_cli.config import NONE, EngineConfig, PipelineName, TierKind
from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.tracing import Tracer

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "pipelines.md"
QUESTION = "How do I find the median of a list of numbers, and its variance?"
WIDTH = 100
ARENA_BYTES = 3 * 2**20
MAX_TOKENS = 48


def drawn(answered: Answered, tracer: Tracer) -> str:
    """The question's lanes, its queries, and what it took."""
    queries = [f"searched: {query}" for retrieval in answered.retrievals for query in retrieval.queries]
    shown = [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in (" ".join(q.split()) for q in queries)]
    return "\n".join([*timeline(tracer.spans(), WIDTH), "", *shown, *seconds(answered, WIDTH)])


def main() -> None:
    """Ask, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path, help="the index that telerag quickstart made")
    options = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in PipelineName:
        tracer = Tracer()
        config = EngineConfig(
            index=options.index,
            pipeline=name,
            k=3,
            tier=TierKind.HOST,
            fast_memory=str(ARENA_BYTES),
            max_tokens=MAX_TOKENS,
            concurrency=1,
            profile=NONE,
        )
        with Engine.open(config, tracer=tracer) as engine:
            answered = engine.ask(QUESTION)
        begin, end = f"<!-- trace:{name} -->", "<!-- trace:end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n```text\n{drawn(answered, tracer)}\n```\n{end}{rest.partition(end)[2]}"
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
