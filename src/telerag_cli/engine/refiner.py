"""Decides when the text an LLM is writing is looked at again, so that lookahead can follow it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor

from telerag_cli.lookahead.order import CHECKPOINTS, due


class Refiner:
    """Watches one generation; at each checkpoint it has what is written refined, off the LLM's thread.

    Never more than one refinement at a time: what comes while one runs is covered by the next checkpoint.
    """

    def __init__(
        self, refine: Callable[[str, float], None], expected_tokens: float, executor: Executor
    ) -> None:
        """Get ready.

        Args:
            refine: takes the text so far and the share of the expected text that it is, 0 to 1.
            expected_tokens: how long the text will probably be.
            executor: where refinement runs.
        """
        self._refine = refine
        self._expected = max(expected_tokens, 1.0)
        self._executor = executor
        self._looked = 0.0
        self._busy = threading.Lock()
        self._ended = False

    def on_text(self, text: str, tokens: int) -> None:
        """See `OnText`."""
        fraction = tokens / self._expected
        if not due(fraction, self._looked, CHECKPOINTS) or not self._busy.acquire(blocking=False):
            return
        self._looked = fraction
        self._executor.submit(self._run, text, min(fraction, 1.0))

    def end(self) -> None:
        """The text is complete: its own embedding comes next, so a refinement that still waits is pointless."""
        self._ended = True

    def _run(self, text: str, fraction: float) -> None:
        try:
            if not self._ended:
                self._refine(text, fraction)
        finally:
            self._busy.release()
