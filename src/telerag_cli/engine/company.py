"""Questions that are answered together: a micro-batch, whose first lookahead is planned once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from telerag_cli.engine.refinement_embedder import RefinementEmbedder
from telerag_cli.engine.refiner import PrefetchHandle, PrefetchStart
from telerag_cli.index.artifact import FloatArray
from telerag_cli.prefetch.prefetcher import Prefetch

Begin = Callable[[FloatArray], Sequence[Prefetch]]
"""Starts lookahead for queries with these embeddings, shape (n, dimension): a round for each."""


class Company:
    """The questions of a micro-batch. Whoever looks ahead first for its question begins for all of them.

    A pipeline that looks ahead for something else than its question does so alone, and what was begun for a question
    and never asked for ends with the company. For one event loop.
    """

    def __init__(self, questions: Sequence[str], vectors: FloatArray | None = None) -> None:
        """Begin with nothing.

        Args:
            questions: the questions.
            vectors: their embeddings, shape (n, dimension), if they are known.
        """
        self._questions = questions
        self._vectors = vectors
        self._begun: dict[str, list[Future[PrefetchHandle]]] | None = None

    def lookahead(self, query: str, begin: Begin, refinement_embedder: RefinementEmbedder) -> Future[PrefetchHandle]:
        """Lookahead for a query of one of the members, which from now on belongs to that member."""
        if query not in self._questions:
            return _submit(PrefetchStart([query], begin), refinement_embedder)[0]
        if self._begun is None:
            self._begun = {}
            futures = _submit(PrefetchStart(self._questions, begin, self._vectors), refinement_embedder)
            for question, future in zip(self._questions, futures, strict=True):
                self._begun.setdefault(question, []).append(future)
        if left := self._begun[query]:
            return left.pop()
        # A second lookahead for the same question.
        return _submit(PrefetchStart([query], begin), refinement_embedder)[0]

    def end(self) -> None:
        """End what no member has taken."""
        for futures in (self._begun or {}).values():
            while futures:
                give_up(futures.pop())


def give_up(begun: Future[PrefetchHandle]) -> None:
    """Stop lookahead that nothing will retrieve from, whether it has begun or not."""
    if not begun.cancel():
        begun.add_done_callback(_end_round)


def _submit(beginning: PrefetchStart, refinement_embedder: RefinementEmbedder) -> list[Future[PrefetchHandle]]:
    futures = list(beginning.begun)
    refinement_embedder.submit(beginning)
    return futures


def _end_round(begun: Future[PrefetchHandle]) -> None:
    if not begun.cancelled() and not begun.exception():
        begun.result().round.end()
