"""How many requests a server gets at once: as many as it stands."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class AdaptiveLimit:
    """A limit on what runs at once that falls when that is too much. For one event loop."""

    def __init__(self, most: int) -> None:
        """Begin with so many at once."""
        self.most = most
        self._running = 0
        self._falls = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[int]:
        """Hold a place while the block runs, after waiting for it in order; yields what `fall` wants to know."""
        if self._waiting or self._running >= self.most:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    with contextlib.suppress(ValueError):
                        self._waiting.remove(turn)
                else:
                    self._leave()  # the place came too late
                raise
        else:
            self._running += 1
        try:
            yield self._falls
        finally:
            self._leave()

    def fall(self, began: int) -> bool:
        """Halve the limit, as what runs in a place was refused for being one of too many.

        Args:
            began: what `place` yielded; those who began before the last fall have had theirs.

        Returns:
            Whether it is worth another try: it was not alone.
        """
        if began == self._falls:
            if self._running < 2:
                return False
            self.most = self._running // 2
            self._falls += 1
        return True

    def _leave(self) -> None:
        self._running -= 1
        while self._waiting and self._running < self.most:
            turn = self._waiting.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)
