"""Iterative retrieval: ask for what is missing, answer that step, until a judge has enough.

After Self-Ask (Press et al., arXiv 2210.03350) and LlamaIndex's multi-step query engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from telerag_cli.llm.base import Message
from telerag_cli.llm.shapes import Choice, Lines
from telerag_cli.pipelines.base import Rag
from telerag_cli.pipelines.found import Answer, Retrieved, merge
from telerag_cli.pipelines.prompts import answer_prompt

QUERY_TOKENS = 40
QUERY = Lines(1)
VERDICT = Choice(("yes", "no"))


@dataclass(frozen=True)
class Step:
    """What was asked, and what the passages said."""

    query: str
    answer: str


def known(steps: Sequence[Step]) -> str:
    """The steps so far, in words."""
    return "\n".join(f"Q: {step.query}\nA: {step.answer}" for step in steps)


def next_query(question: str, steps: Sequence[Step]) -> list[Message]:
    """The prompt for what to look up next."""
    so_far = f"Known so far:\n{known(steps)}\n\n" if steps else ""
    return [
        Message(
            "user",
            f"{so_far}Write one short question to look up next, so that this can be answered.\n\nQuestion: {question}",
        )
    ]


def judgement(question: str, steps: Sequence[Step]) -> list[Message]:
    """The prompt that asks whether the steps suffice."""
    return [
        Message(
            "user", f"{known(steps)}\n\nQuestion: {question}\nIs this enough to answer the question? Say yes or no."
        )
    ]


def final_prompt(question: str, found: Sequence[Retrieved], steps: Sequence[Step]) -> list[Message]:
    """The usual prompt, and what the steps found out."""
    return answer_prompt(f"{question}\n\nKnown so far:\n{known(steps)}", found)


async def iterative(rag: Rag, question: str, *, rounds: int = 3) -> Answer:
    """Answer from the passages and answers of at most ``rounds`` steps."""
    steps: list[Step] = []
    retrieved: list[list[Retrieved]] = []
    query = question
    for number in range(1, rounds + 1):
        async with rag.lookahead(query) as ahead:
            written = await rag.generate(
                f"query_{number}", next_query(question, steps), max_tokens=QUERY_TOKENS, shape=QUERY, refining=ahead
            )
        query = next(iter(QUERY.read(written.text)), question)
        retrieved.append(await rag.retrieve([query], ahead))
        step = await rag.answer(query, retrieved[-1], stage=f"step_{number}")
        steps.append(Step(query, step.text))
        if number < rounds:
            verdict = await rag.generate(f"judge_{number}", judgement(question, steps), max_tokens=2, shape=VERDICT)
            if verdict.text == "yes":
                break
    return await rag.answer(question, merge(*retrieved), prompt=partial(final_prompt, steps=steps))
