"""Re-embeds the text an LLM is writing and lets lookahead follow it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor

from telerag_cli.index.artifact import FloatArray
from telerag_cli.lookahead.order import CHECKPOINTS, blend


class Refiner:
    """Watches one generation; at each checkpoint it embeds what is written, off the LLM's thread.

    Never more than one embedding at a time: what comes while one runs is covered by the next checkpoint.
    """

    def __init__(self, question: FloatArray, embed: Callable[[str], FloatArray], follow: Callable[[FloatArray], None],
                 expected_tokens: float, executor: Executor) -> None:  # fmt: skip
        """Get ready.

        Args:
            question: embedding of the lookahead query, shape (dimension,).
            embed: embeds a text, shape (dimension,).
            follow: takes the lookahead query made of question and text, shape (dimension,).
            expected_tokens: how long the text will probably be.
            executor: where embeddings are computed.
        """
        self._question = question
        self._embed = embed
        self._follow = follow
        self._expected = max(expected_tokens, 1.0)
        self._executor = executor
        self._pending = list(CHECKPOINTS)
        self._busy = threading.Lock()
        self._ended = False

    def on_text(self, text: str, tokens: int) -> None:
        """See `OnText`."""
        fraction = tokens / self._expected
        if not self._pending or fraction < self._pending[0] or not self._busy.acquire(blocking=False):
            return
        self._pending = [checkpoint for checkpoint in self._pending if checkpoint > fraction]
        self._executor.submit(self._refine, text, min(fraction, 1.0))

    def end(self) -> None:
        """The text is complete: its own embedding comes next, so a refinement that still waits is pointless."""
        self._ended = True

    def _refine(self, text: str, fraction: float) -> None:
        try:
            if not self._ended:
                self._follow(blend(self._question, self._embed(text), fraction))
        finally:
            self._busy.release()
