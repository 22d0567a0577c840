"""HyDE (Gao et al., arXiv 2212.10496): write a passage that would answer the question, retrieve what resembles it."""

from __future__ import annotations

from telerag_cli.pipelines.base import Answer, Rag
from telerag_cli.pipelines.prompts import user

PASSAGE_TOKENS = 96


async def hyde(rag: Rag, question: str) -> Answer:
    """Answer from the passages nearest to a hypothetical answer, which need not be true."""
    prompt = user(f"Write a short, factual passage that answers the question.\n\nQuestion: {question}\n\nPassage:")
    async with rag.lookahead(question) as ahead:
        passage = await rag.generate("passage", prompt, max_tokens=PASSAGE_TOKENS, refining=ahead)
    found = await rag.retrieve([passage.text])
    return await rag.answer(question, found)
