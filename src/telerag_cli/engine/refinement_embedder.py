"""Embeds what lookahead follows, many texts at once, and never more than a share of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from telerag_cli.arrays import FloatArray
from telerag_cli.system import give_way

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

        Args:
            embed: texts to vectors, shape (texts, dimension).
            share: the part of the time that texts which are not urgent may take.
            allowance_s: seconds that may be saved up.
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
