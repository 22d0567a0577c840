"""Retrieve with the question, then answer (Lewis et al., arXiv 2005.11401); nothing hides the retrieval."""

from __future__ import annotations

from telerag_cli.pipelines.base import Answer, Rag


async def naive(rag: Rag, question: str) -> Answer:
    """Answer from the passages nearest to the question."""
    found = await rag.retrieve([question])
    return await rag.answer(question, found)
