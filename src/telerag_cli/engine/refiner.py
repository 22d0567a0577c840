"""Starts lookahead, and decides when the text an LLM is writing is looked at again, so that lookahead can follow it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.engine.refinement_embedder import RefinementEmbedder
from telerag_cli.pipelines.base import Expect
from telerag_cli.prefetch.order import CHECKPOINTS, PATIENT_CHECKPOINTS, blend, due
from telerag_cli.prefetch.prefetcher import Prefetch
from telerag_cli.retrieval.retriever import Retriever

AWAITED = 2
"""Queries for which lists are moved as long as none of several is finished. Source: scripts/lookahead_study.py."""

StartPrefetches = Callable[[Sequence[FloatArray]], Sequence[Prefetch]]
"""Starts a prefetch for each of several searches, each of queries of shape (n, dimension)."""


class PrefetchStart:
    """A `EmbeddingTask` that starts lookahead for some queries together while the LLM already reads their prompts."""

    urgent = True

    def __init__(self, queries: Sequence[str], start: StartPrefetches, vectors: FloatArray | None = None) -> None:
        """Get ready.

        Args:
            queries: the lookahead queries.
            start: starts the prefetches.
            vectors: their embeddings, shape (n, dimension), if they are known already.
        """
        self._queries = queries
        self._start = start
        self._vectors = vectors
        self.prefetches: list[Future[Prefetch]] = [Future() for _ in queries]

    def take(self) -> Sequence[str]:
        """See `EmbeddingTask`."""
        # What nobody wants any more is left out, and a future that is running can no longer be cancelled.
        wanted = [place for place, future in enumerate(self.prefetches) if future.set_running_or_notify_cancel()]
        self.prefetches = [self.prefetches[place] for place in wanted]
        if self._vectors is None or not wanted:
            return [self._queries[place] for place in wanted]
        try:
            self.give(self._vectors[wanted])
        except Exception as error:
            self.fail(error)
        return []

    def give(self, vectors: FloatArray) -> None:
        """See `EmbeddingTask`."""
        for future, vector, prefetch in zip(self.prefetches, vectors, self._start(list(vectors[:, None])), strict=True):
            prefetch.question = vector
            future.set_result(prefetch)

    def fail(self, error: Exception) -> None:
        """See `EmbeddingTask`."""
        for future in self.prefetches:
            if not future.done():
                future.set_exception(error)


class Refiner:
    """Watches one generation, as its `OnText`; at each checkpoint what is written is embedded and lookahead follows it.

    Never more than one refinement at a time: what comes while one waits is looked at when its turn comes.
    """

    urgent = False

    def __init__(
        self,
        prefetch: Future[Prefetch],
        retriever: Retriever,
        nprobe: int,
        expected_tokens: float,
        embedder: RefinementEmbedder,
        expect: Expect | None = None,
    ) -> None:
        """Get ready.

        Args:
            prefetch: the lookahead to refine.
            retriever: what started it.
            nprobe: lists that each query will probe.
            expected_tokens: how long the text will probably be.
            embedder: what embeds.
            expect: the queries that a text leads to; the text itself if not given.
        """
        self._prefetch = prefetch
        self._retriever = retriever
        self._nprobe = nprobe
        self._expected = max(expected_tokens, 1.0)
        self._embedder = embedder
        self._expect: Expect = expect or (lambda text: [text])
        self._lock = threading.Lock()
        self._text, self._fraction = "", 0.0
        self._looked, self._followed = 0.0, 0.0
        self._taken: Sequence[str] | None = None
        self._ended = False
        self._error: Exception | None = None

    def __call__(self, text: str, tokens: int) -> None:
        """See `OnText`."""
        fraction = min(tokens / self._expected, 1.0)
        with self._lock:
            self._text, self._fraction = text, fraction
            if not due(fraction, self._looked, CHECKPOINTS) and not self._more(self._expect(text)):
                return
            self._looked = fraction
        self._embedder.submit(self)

    def end(self) -> None:
        """The text is complete: its own embedding comes next, so a refinement that still waits is pointless.

        Raises:
            Exception: what went wrong with one that did not.
        """
        self._ended = True
        if self._error:
            raise self._error

    def take(self) -> Sequence[str]:
        """See `EmbeddingTask`."""
        started = self._prefetch
        if self._ended or not started.done() or started.cancelled() or started.exception():
            return []
        with self._lock:
            text, fraction = self._text, self._fraction
        prefetch, queries = started.result(), self._expect(text)
        patient = prefetch.idle and not due(fraction, self._followed, PATIENT_CHECKPOINTS)
        if queries == self._taken or (patient and queries and not self._more(queries)):
            return []
        self._taken, self._followed = queries, fraction
        if not queries and prefetch.question is not None:
            # None is finished, and several may be written: the first order, which was only a start, is all there is.
            self._retriever.refine(prefetch, prefetch.question[None], AWAITED * self._nprobe, fraction)
        return queries

    def give(self, vectors: FloatArray) -> None:
        """See `EmbeddingTask`."""
        prefetch, fraction = self._prefetch.result(), self._followed
        assert prefetch.question is not None
        mixed = [blend(prefetch.question, vector, fraction) for vector in vectors]
        self._retriever.refine(prefetch, np.stack(mixed), len(mixed) * self._nprobe, fraction)

    def fail(self, error: Exception) -> None:
        """See `EmbeddingTask`."""
        self._error = error

    def _more(self, queries: Sequence[str]) -> bool:
        """Whether there are more than before, which says more than a checkpoint does; the first one waits."""
        return len(queries) > max(len(self._taken or ()), 1)
