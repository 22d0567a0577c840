"""Self-RAG (Asai et al., arXiv 2310.11511): retrieve only if needed, answer from each passage, keep the best answer.

The paper trains a model to write its judgements as special tokens; here an instruct model is asked for them.
"""

from __future__ import annotations

from telerag_cli.corpus.passages import Retrieved
from telerag_cli.llm.shapes import Choice
from telerag_cli.pipelines.base import Answer, Rag, together
from telerag_cli.pipelines.prompts import user

NEED = Choice(("yes", "no"))
RATING = Choice(("5", "4", "3", "2", "1"))


async def self_rag(rag: Rag, question: str) -> Answer:
    """The best rated of one answer per passage; the one from the nearer passage if several are."""
    prompt = user(f"Would looking something up help to answer this question? Say yes or no.\n\nQuestion: {question}")
    async with rag.lookahead(question):
        needed = await rag.generate("need", prompt, max_tokens=2, shape=NEED)
    if needed.text == "no":
        return await rag.answer(question, [])
    found = await rag.retrieve([question])
    attempts = await together(_attempt(rag, question, hit, number) for number, hit in enumerate(found, 1))
    if not attempts:
        return await rag.answer(question, found)
    return max(attempts, key=lambda rated: rated[0])[1]


async def _attempt(rag: Rag, question: str, hit: Retrieved, number: int) -> tuple[int, Answer]:
    """An answer from one passage, and its rating; 0 if the critic says nothing."""
    answer = await rag.answer(question, [hit], stage=f"answer_{number}")
    prompt = user(
        f"Passage: {hit.passage.embedded_text}\n\nQuestion: {question}\nAnswer: {answer.text}\n\n"
        "Rate from 1 to 5 how useful the answer is and how well the passage supports it. Say one number."
    )
    rating = await rag.generate(f"critique_{number}", prompt, max_tokens=2, shape=RATING)
    return int(rating.text or 0), answer
