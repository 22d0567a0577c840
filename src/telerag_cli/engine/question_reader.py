"""Takes questions from a source that blocks, as they come, and hands out those that have come together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

from telerag_cli.engine.questions import Question


class QuestionReader:
    """Reads a source in a thread, a bounded number of questions ahead. For one event loop.

    The thread is a daemon, because nothing can wake one that waits for a terminal or a pipe when the run is
    interrupted.
    """

    def __init__(self, questions: Iterable[Question], most: int, wait_s: float) -> None:
        """Start reading.

        Args:
            questions: the source.
            most: questions handed out together.
            wait_s: for which the first of them waits for others at most.
        """
        self._most = most
        self._wait_s = wait_s
        self._loop = asyncio.get_running_loop()
        self._read: asyncio.Queue[Question | BaseException | None] = asyncio.Queue()
        self._places = threading.Semaphore(most)
        self._ended = False
        self._trouble: BaseException | None = None
        threading.Thread(target=self._work, args=(questions,), daemon=True, name="questions").start()

    async def some(self) -> list[Question]:
        """One or more questions, in order; none at the end.

        Raises:
            BaseException: what the source raised, after the questions before it were handed out.
        """
        gathered: list[Question] = []
        deadline_s: float | None = None
        while len(gathered) < self._most and not self._ended:
            try:
                async with asyncio.timeout_at(deadline_s):
                    item = await self._read.get()
            except TimeoutError:
                break
            if deadline_s is None:
                deadline_s = self._loop.time() + self._wait_s
            if isinstance(item, Question):
                gathered.append(item)
                self._places.release()
                continue
            self._ended, self._trouble = True, item
        if not gathered and self._trouble is not None:
            raise self._trouble
        return gathered

    def _work(self, questions: Iterable[Question]) -> None:
        try:
            for question in questions:
                self._places.acquire()
                if not self._put(question):
                    return
            self._put(None)
        except BaseException as error:  # told where it can be handled
            self._put(error)

    def _put(self, item: Question | BaseException | None) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._read.put_nowait, item)
        except RuntimeError:
            return False  # the loop has ended, and nobody listens any more
        return True
