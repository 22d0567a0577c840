"""HyDE (Gao et al., arXiv 2212.10496): write a passage that would answer the question, retrieve what resembles it."""

from __future__ import annotations

from telerag_cli.llm.base import Message
from telerag_cli.pipelines.base import Rag
from telerag_cli.pipelines.found import Answer

PASSAGE_TOKENS = 96


def hypothetical_passage(question: str) -> list[Message]:
    """The prompt for the passage; it need not be true, only like the ones that are."""
    return [
        Message(
            "user", f"Write a short, factual passage that answers the question.\n\nQuestion: {question}\n\nPassage:"
        )
    ]


async def hyde(rag: Rag, question: str) -> Answer:
    """Answer from the passages nearest to a hypothetical answer."""
    async with rag.lookahead(question) as ahead:
        passage = await rag.generate(
            "passage", hypothetical_passage(question), max_tokens=PASSAGE_TOKENS, refining=ahead
        )
    found = await rag.retrieve([passage.text], ahead)
    return await rag.answer(question, found)
