"""Self-RAG (Asai et al., arXiv 2310.11511): retrieve only if needed, answer from each passage alone, keep the best answer.

The paper trains a model to write its judgements as special tokens; here an instruct model is asked for them.
"""

from __future__ import annotations

from telerag_cli.llm.base import Message
from telerag_cli.llm.shapes import Choice
from telerag_cli.pipelines.base import Rag
from telerag_cli.pipelines.found import Answer, Retrieved
from telerag_cli.pipelines.together import together

NEED = Choice(("yes", "no"))
RATING = Choice(("5", "4", "3", "2", "1"))


def need(question: str) -> list[Message]:
    """The prompt that asks whether to retrieve at all."""
    return [
        Message(
            "user", f"Would looking something up help to answer this question? Say yes or no.\n\nQuestion: {question}"
        )
    ]


def critique(question: str, hit: Retrieved, answer: str) -> list[Message]:
    """The prompt for how well the passage supports the answer, and the answer the question."""
    return [
        Message(
            "user",
            f"Passage: {hit.passage.embedded_text}\n\nQuestion: {question}\nAnswer: {answer}\n\n"
            "Rate from 1 to 5 how useful the answer is and how well the passage supports it. Say one number.",
        )
    ]


async def attempt(rag: Rag, question: str, hit: Retrieved, number: int) -> tuple[int, Answer]:
    """An answer from one passage, and its rating; 0 if the critic says nothing."""
    answer = await rag.answer(question, [hit], stage=f"answer_{number}")
    rating = await rag.generate(f"critique_{number}", critique(question, hit, answer.text), max_tokens=2, shape=RATING)
    return int(rating.text or 0), answer


async def self_rag(rag: Rag, question: str) -> Answer:
    """The best rated of one answer per passage, of equals the one from the nearer passage."""
    async with rag.lookahead(question) as ahead:
        needed = await rag.generate("need", need(question), max_tokens=2, shape=NEED)
    if needed.text == "no":
        return await rag.answer(question, [])
    found = await rag.retrieve([question], ahead)
    attempts = await together(attempt(rag, question, hit, number) for number, hit in enumerate(found, 1))
    if not attempts:
        return await rag.answer(question, found)
    return max(attempts, key=lambda rated: rated[0])[1]
