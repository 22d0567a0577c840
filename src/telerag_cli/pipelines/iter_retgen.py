"""Iter-RetGen (Shao et al., arXiv 2305.15294): an answer, though wrong, says what to retrieve for a better one."""

from __future__ import annotations

from telerag_cli.pipelines.base import Answer, Rag


async def iter_retgen(rag: Rag, question: str, *, rounds: int = 3) -> Answer:
    """Answer ``rounds`` times, each time from the passages nearest to the question and the answer before."""
    found = await rag.retrieve([question])
    query = question
    for number in range(1, rounds):
        async with rag.lookahead(query) as ahead:
            draft = await rag.answer(
                question, found, stage=f"draft_{number}", refining=ahead, expect=lambda text: [f"{question} {text}"]
            )
        query = f"{question} {draft.text}"
        found = await rag.retrieve([query])
    return await rag.answer(question, found)
