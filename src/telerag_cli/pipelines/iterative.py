"""Iterative retrieval: ask for what is missing, answer that step, until a judge has enough.

After Self-Ask (Press et al., arXiv 2210.03350) and LlamaIndex's multi-step query engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from telerag_cli.corpus.passages import Retrieved
from telerag_cli.llm.base import Message
from telerag_cli.llm.shapes import Choice, Lines
from telerag_cli.pipelines.base import Answer, Rag, merge
from telerag_cli.pipelines.prompts import answer_prompt, user

QUERY_TOKENS = 40
QUERY = Lines(1)
VERDICT = Choice(("yes", "no"))


async def iterative(rag: Rag, question: str, *, rounds: int = 3) -> Answer:
    """Answer from the passages and answers of at most ``rounds`` steps."""
    steps: list[str] = []
    retrieved: list[list[Retrieved]] = []
    query = question
    for number in range(1, rounds + 1):
        known = f"{_known(steps)}\n\n" if steps else ""
        prompt = user(
            f"{known}Write one short question to look up next, so that this can be answered.\n\nQuestion: {question}"
        )
        async with rag.lookahead(query) as ahead:
            written = await rag.generate(
                f"query_{number}", prompt, max_tokens=QUERY_TOKENS, shape=QUERY, refining=ahead
            )
        query = QUERY.first(written.text, question)
        retrieved.append(await rag.retrieve([query]))
        step = await rag.answer(query, retrieved[-1], stage=f"step_{number}")
        steps.append(f"Q: {query}\nA: {step.text}")
        if number < rounds:
            said = "\n".join(steps)
            prompt = user(f"{said}\n\nQuestion: {question}\nIs this enough to answer the question? Say yes or no.")
            verdict = await rag.generate(f"judge_{number}", prompt, max_tokens=2, shape=VERDICT)
            if verdict.text == "yes":
                break

    def final_prompt(question: str, found: Sequence[Retrieved]) -> list[Message]:
        return answer_prompt(f"{question}\n\n{_known(steps)}", found)

    return await rag.answer(question, merge(*retrieved), prompt=final_prompt)


def _known(steps: Sequence[str]) -> str:
    said = "\n".join(steps)
    return f"Known so far:\n{said}"
