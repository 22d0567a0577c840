"""Questions that run together, whose first lookahead is planned and started once for all of them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from telerag_cli.arrays import BoolArray, FloatArray
from telerag_cli.engine.refinement import PrefetchStart, RefinementEmbedder, StartPrefetches
from telerag_cli.prefetch.prefetcher import Prefetch


@dataclass(eq=False)
class MicroBatch:
    """Questions that run together. For one event loop.

    Each member holds the batch (``with``) from when it is put together until it is answered. The first one that looks
    ahead for its question starts lookahead for all of them; a pipeline that looks ahead for something else does so
    alone. What was started and never asked for ends when nobody holds the batch any more.
    """

    questions: tuple[str, ...] = ()
    vectors: FloatArray | None = None
    """Embeddings of the questions, shape (n, dimension), if they are known."""
    number: int = 0
    """Unique within a run."""
    members: tuple[int, ...] = ()
    """The caller's numbers of the questions."""
    lists: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Lists that the questions will probably probe, shape (nlist,)."""
    _holders: int = field(default=0, init=False)
    _started: dict[str, list[Future[Prefetch]]] = field(default_factory=dict, init=False)

    def __enter__(self) -> Self:
        self._holders += 1
        return self

    def __exit__(self, *_error: object) -> None:
        self._holders -= 1
        if not self._holders:
            for futures in self._started.values():
                while futures:
                    give_up(futures.pop())

    def lookahead(self, query: str, start: StartPrefetches, embedder: RefinementEmbedder) -> Future[Prefetch]:
        """Lookahead for a query of one of the members, which from now on belongs to that member."""
        if query in self.questions and not self._started:
            together = PrefetchStart(self.questions, start, self.vectors)
            for question, future in zip(self.questions, together.prefetches, strict=True):
                self._started.setdefault(question, []).append(future)
            embedder.submit(together)
        if waiting := self._started.get(query):
            return waiting.pop()
        # Something else, or a second lookahead for the same question.
        alone = PrefetchStart([query], start)
        (future,) = alone.prefetches
        embedder.submit(alone)
        return future


def give_up(prefetch: Future[Prefetch]) -> None:
    """Stop lookahead that nothing will retrieve from, whether it has started or not."""

    def end(started: Future[Prefetch]) -> None:
        if not started.cancelled() and not started.exception():
            started.result().end()

    if not prefetch.cancel():
        prefetch.add_done_callback(end)
