"""What a corpus was read as: what was left out of it, and what was assumed."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import xxhash

from telerag_cli.errors import TeleragError

MAX_NAMED = 20
"""Bad lines and files that are named; all are counted."""


@dataclass
class CorpusNotes:
    """Grows while a corpus is found and read; `lines` says it in words."""

    files: Counter[str] = field(default_factory=Counter)
    """Files and folders left out, by suffix or reason."""
    troubles: list[TeleragError] = field(default_factory=list)
    """The first of the items that could not be used."""
    bad: int = 0
    """Number of all of them."""
    ids: Counter[str] = field(default_factory=Counter)
    """Passages by where their ids came from."""
    assumed: list[str] = field(default_factory=list)
    """Sentences about what was not said and had to be guessed."""
    _hashes: array[int] = field(default_factory=lambda: array("Q"))

    def trouble(self, error: TeleragError) -> None:
        """Count an item that cannot be used."""
        self.bad += 1
        if len(self.troubles) < MAX_NAMED:
            self.troubles.append(error)

    def took(self, passage_id: str, origin: str) -> None:
        """Count a passage and where its id came from."""
        self.ids[origin] += 1
        self._hashes.append(xxhash.xxh3_64_intdigest(passage_id.encode()))

    @property
    def repeated(self) -> int:
        """Passages whose id an earlier one has."""
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.uint64))) if self._hashes else 0

    def lines(self) -> list[str]:
        """Return sentences for the person who waited: what was left out, how ids were chosen, what was assumed."""
        said = []
        if total := self.files.total():
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.files.most_common())
            said.append(f"Left out: {total:,} file{'s' * (total != 1)} ({kinds}).")
        if self.bad:
            said.append(
                f"Left out: {self.bad:,} bad {'lines or files' if self.bad > 1 else 'line or file'}: {self.examples()}"
            )
        if self.ids:
            several = len(self.ids) > 1
            counts = (origin + f" ({count:,})" * several for origin, count in self.ids.most_common())
            said.append(f"Ids: {', '.join(counts)}.")
        if repeated := self.repeated:
            said.append(f"Ids given again: {repeated:,}; a citation does not tell such passages from the first.")
        return said + self.assumed

    def examples(self) -> str:
        """Return the troubles in words, or the first of them."""
        return "; ".join(error.message.rstrip(".") for error in self.troubles) + (
            " ..." if self.bad > len(self.troubles) else "."
        )
