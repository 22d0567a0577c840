"""Sub-questions: split the question into simpler ones, retrieve for all of them, answer from the union.

The decomposition is that of Self-Ask (Press et al., arXiv 2210.03350), asked for at once instead of one by one, as
LlamaIndex's sub-question query engine does.
"""

from __future__ import annotations

from telerag_cli.llm.shapes import Lines
from telerag_cli.pipelines.base import Answer, Rag
from telerag_cli.pipelines.prompts import user

QUESTION_TOKENS = 32


async def subquestion(rag: Rag, question: str, *, sub_questions: int = 3) -> Answer:
    """Answer from the passages nearest to any of at most ``sub_questions`` sub-questions."""
    prompt = user(
        f"List up to {sub_questions} simple questions, one per line, whose answers together answer this question.\n\n"
        f"Question: {question}"
    )
    shape = Lines(sub_questions)
    async with rag.lookahead(question) as ahead:
        written = await rag.generate(
            "sub_questions",
            prompt,
            max_tokens=QUESTION_TOKENS * sub_questions,
            shape=shape,
            refining=ahead,
            expect=shape.finished,
        )
    found = await rag.retrieve(shape.read(written.text) or [question])
    return await rag.answer(question, found)
