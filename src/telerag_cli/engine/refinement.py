"""Starts lookahead, and embeds the text that an LLM is writing again and again, so that lookahead can follow it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.pipelines.base import Expect
from telerag_cli.prefetch.order import CHECKPOINTS, PATIENT_CHECKPOINTS, blend, due
from telerag_cli.prefetch.prefetcher import Prefetch
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import give_way

AWAITED = 2
"""Queries for which lists are moved as long as none of several is finished. Source: scripts/lookahead_study.py."""

StartPrefetches = Callable[[Sequence[FloatArray]], Sequence[Prefetch]]
"""Starts a prefetch for each of several searches, each of queries of shape (n, dimension)."""

SHARE = 0.03
"""Of the time, what refining may take from an LLM that decodes on the same cores."""
ALLOWANCE_S = 0.03
"""What may be used at once after a quiet time: the refinements of one question that is alone."""
MAX_TEXTS = 8
"""Texts in one call: an exact embedding that a query waits for may have to wait for the call."""
NICENESS = 5


class EmbeddingTask(Protocol):
    """Something that wants texts embedded when there is time for it."""

    urgent: bool
    """Whether it is done at once, whatever it costs."""

    def take(self) -> Sequence[str]:
        """The texts as they are now; empty if there is nothing to do any more."""

    def give(self, vectors: FloatArray) -> None:
        """Their embeddings, shape (texts, dimension)."""

    def fail(self, error: Exception) -> None:
        """What went wrong instead."""


class RefinementEmbedder:
    """One polite thread. Tasks that wait are taken together, urgent ones first, the others as their share allows."""

    def __init__(
        self, embed: Callable[[Sequence[str]], FloatArray], *, share: float = SHARE, allowance_s: float = ALLOWANCE_S
    ) -> None:
        """Start the thread.

        ``embed`` makes vectors of shape (texts, dimension). Texts that are not urgent may take ``share`` of the time,
        and save up ``allowance_s``.
        """
        self._embed = embed
        self._share = share
        self._allowance_s = allowance_s
        self._credit_s = allowance_s
        self._credited_s = time.perf_counter()
        self._waiting: list[EmbeddingTask] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="refinement", daemon=True)
        self._thread.start()

    def submit(self, task: EmbeddingTask) -> None:
        """Have the task's texts embedded; one that waits already keeps its place."""
        with self._changed:
            if task not in self._waiting:
                self._waiting.append(task)
                self._changed.notify()

    def close(self) -> None:
        """Finish what runs and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        give_way(NICENESS)
        while chosen := self._next():
            began_s = time.thread_time()
            self._serve(chosen)
            if not chosen[0].urgent:
                # Processor time, not time: that is what the LLM does not get.
                self._credit_s -= time.thread_time() - began_s

    def _next(self) -> list[EmbeddingTask]:
        """What to do now, all of it urgent or none; waits for it. Empty at the end."""
        with self._changed:
            while not self._closing:
                pause_s = self._pause_s()
                chosen = [task for task in self._waiting if task.urgent]
                if not chosen and not pause_s:
                    chosen = self._waiting[:MAX_TEXTS]
                if chosen:
                    self._waiting = [task for task in self._waiting if task not in chosen]
                    return chosen
                self._changed.wait(pause_s if self._waiting else None)
        return []

    def _pause_s(self) -> float:
        """How long until there is credit again; 0 if there is some."""
        now_s = time.perf_counter()
        earned_s = self._share * (now_s - self._credited_s)
        self._credit_s = min(self._credit_s + earned_s, self._allowance_s)
        self._credited_s = now_s
        return 0.0 if self._credit_s > 0 else (1e-4 - self._credit_s) / self._share

    def _serve(self, tasks: Sequence[EmbeddingTask]) -> None:
        try:
            texts = [task.take() for task in tasks]
            flat = [text for each in texts for text in each]
            vectors = self._embed(flat) if flat else None
        except Exception as error:
            for task in tasks:
                task.fail(error)
            return
        start = 0
        for task, each in zip(tasks, texts, strict=True):
            if vectors is not None and each:
                try:
                    task.give(vectors[start : start + len(each)])
                except Exception as error:
                    task.fail(error)
                start += len(each)


class PrefetchStart:
    """A `EmbeddingTask` that starts lookahead for some queries together while the LLM already reads their prompts."""

    urgent = True

    def __init__(self, queries: Sequence[str], start: StartPrefetches, vectors: FloatArray | None = None) -> None:
        """Get ready.

        ``vectors`` are the queries' embeddings, shape (n, dimension), if they are known already.
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

        ``expect`` gives the queries that a text leads to; the text itself if not given.
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
