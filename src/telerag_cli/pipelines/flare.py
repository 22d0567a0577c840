"""FLARE (Jiang et al., arXiv 2305.06983): write on, sentence by sentence, and look up what the model was unsure of.

This is FLARE-direct with generated questions: each stretch of tokens below the threshold becomes a question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from telerag_cli.corpus.passages import Retrieved
from telerag_cli.errors import ModelError
from telerag_cli.llm.base import Generation, Message
from telerag_cli.llm.shapes import Lines
from telerag_cli.pipelines.base import Answer, Rag, merge, together
from telerag_cli.pipelines.prompts import numbered, user

SENTENCE_TOKENS = 48
QUERY_TOKENS = 32
SENTENCE_ENDS = (". ", "! ", "? ", "\n")
QUERY = Lines(1)
MAX_DOUBTS = 3
"""Stretches of a sentence that are asked about, the most doubtful ones."""


async def flare(rag: Rag, question: str, *, flare_threshold: float = 0.4, sentences: int = 4) -> Answer:
    """Write at most ``sentences`` sentences; one with a token less probable than the threshold is written again.

    Raises:
        ModelError: the generator does not tell how probable its tokens are.
    """
    written = ""
    retrieved: list[list[Retrieved]] = []
    for number in range(1, sentences + 1):
        start = written or question
        async with rag.lookahead(start) as ahead:
            draft = await rag.generate(
                f"sentence_{number}",
                _continuation(question, (), written),
                max_tokens=SENTENCE_TOKENS,
                stop=SENTENCE_ENDS,
                logprobs=True,
                refining=ahead,
                expect=partial(_expected, start),
            )
            queries = await together(
                _query(rag, question, draft.text, doubt) for doubt in doubts(draft, flare_threshold)
            )
        sentence = draft.text
        if queries:
            retrieved.append(await rag.retrieve(queries))
            rewritten = await rag.answer(
                question,
                retrieved[-1],
                stage=f"rewrite_{number}",
                max_tokens=SENTENCE_TOKENS,
                stop=SENTENCE_ENDS,
                prompt=partial(_continuation, written=written),
            )
            retrieved[-1] = retrieved[-1][: rewritten.in_prompt]
            sentence = rewritten.text
        if not sentence or sentence in written:
            break
        # The mark that ended the sentence was cut off with the stop text.
        closed = sentence if sentence.endswith((".", "!", "?", ":")) else f"{sentence}."
        written = f"{written} {closed}".strip()
        if draft.finish_reason == "stop" and draft.stopped_by is None:
            break  # the model had no more to say
    return Answer(written, merge(*retrieved))


def doubts(sentence: Generation, threshold: float) -> list[str]:
    """Stretches of tokens less probable than the threshold, the least probable ``MAX_DOUBTS``, in order."""
    if sentence.text and not sentence.tokens:
        raise ModelError(
            "The generator does not tell how probable its tokens are, and flare asks about the improbable ones.",
            remedy="Use another --pipeline, or a server that gives logprobs.",
        )
    stretches: list[tuple[int, int, float]] = []
    for token in sentence.tokens:
        if math.exp(token.logprob) >= threshold:
            continue
        if stretches and stretches[-1][1] == token.start:
            start, _end, least = stretches.pop()
            stretches.append((start, token.end, min(least, token.logprob)))
        else:
            stretches.append((token.start, token.end, token.logprob))
    chosen = sorted(sorted(stretches, key=lambda stretch: stretch[2])[:MAX_DOUBTS])
    return [text for start, end, _least in chosen if (text := sentence.text[start:end].strip())]


def _continuation(question: str, found: Sequence[Retrieved], written: str) -> list[Message]:
    """The prompt for the next sentence; with passages, for one that rests on them."""
    passages = f"{numbered(found)}\n\n" if found else ""
    instruction = "Use the numbered passages. " if found else ""
    so_far = f"\nAnswer so far: {written}" if written else ""
    return [
        Message("system", f"{instruction}Answer the question briefly. Write only the next sentence of the answer."),
        *user(f"{passages}Question: {question}{so_far}"),
    ]


def _expected(start: str, sentence: str) -> list[str]:
    """What the queries will resemble: they come from the sentence, and from the question or what is written."""
    return [f"{start} {sentence}"]


async def _query(rag: Rag, question: str, sentence: str, doubt: str) -> str:
    """A query for a doubtful stretch; the sentence itself if the model has none."""
    prompt = user(f'Question: {question}\nSentence: {sentence}\nWrite one short question whose answer is "{doubt}".')
    written = await rag.generate("query", prompt, max_tokens=QUERY_TOKENS, shape=QUERY)
    return QUERY.first(written.text, sentence)
