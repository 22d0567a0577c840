"""Questions that are answered together: a micro-batch, whose first lookahead is planned once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from telerag_cli.engine.refiner import Beginning, Begun
from telerag_cli.engine.sketcher import Sketcher
from telerag_cli.index.artifact import FloatArray
from telerag_cli.lookahead.round import Round

Begin = Callable[[FloatArray], Sequence[Round]]
"""Starts lookahead for queries with these embeddings, shape (n, dimension): a round for each."""


class Company:
    """The questions of a micro-batch. Whoever looks ahead first for its question begins for all of them.

    A pipeline that looks ahead for something else than its question does so alone, and what was begun for a question and
    never asked for ends with the company. For one event loop.
    """

    def __init__(self, questions: Sequence[str], vectors: FloatArray | None = None) -> None:
        """Begin with nothing.

        Args:
            questions: the questions.
            vectors: their embeddings, shape (n, dimension), if they are known.
        """
        self._questions = questions
        self._vectors = vectors
        self._begun: dict[str, list[Future[Begun]]] | None = None

    def lookahead(self, query: str, begin: Begin, sketcher: Sketcher) -> Future[Begun]:
        """Lookahead for a query of one of the members, which from now on belongs to that member."""
        if query not in self._questions:
            return _submit(Beginning([query], begin), sketcher)[0]
        if self._begun is None:
            self._begun = {}
            futures = _submit(Beginning(self._questions, begin, self._vectors), sketcher)
            for question, future in zip(self._questions, futures, strict=True):
                self._begun.setdefault(question, []).append(future)
        if left := self._begun[query]:
            return left.pop()
        # A second lookahead for the same question.
        return _submit(Beginning([query], begin), sketcher)[0]

    def end(self) -> None:
        """End what no member has taken."""
        for futures in (self._begun or {}).values():
            while futures:
                give_up(futures.pop())


def give_up(begun: Future[Begun]) -> None:
    """Stop lookahead that nothing will retrieve from, whether it has begun or not."""
    if not begun.cancel():
        begun.add_done_callback(_end_round)


def _submit(beginning: Beginning, sketcher: Sketcher) -> list[Future[Begun]]:
    futures = list(beginning.begun)
    sketcher.submit(beginning)
    return futures


def _end_round(begun: Future[Begun]) -> None:
    if not begun.cancelled() and not begun.exception():
        begun.result().round.end()
