"""The unit of text that is embedded and returned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Passage:
    """A passage of a corpus; ``metadata`` may hold ``title`` and, of a file's chunk, ``source``, ``start``, ``end``."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embedded_text(self) -> str:
        """What is embedded: the title, if there is one, before the text, as BEIR and DPR do."""
        title = self.metadata.get("title")
        return f"{title} {self.text}" if isinstance(title, str) and title.strip() else self.text

    @property
    def name(self) -> str:
        """The title, or the id, in one line."""
        return " ".join(str(self.metadata.get("title") or self.id).split())

    @property
    def metadata_json(self) -> str:
        """The metadata as one JSON object; what JSON has no type for (a date, a decimal) becomes its text."""
        return json.dumps(self.metadata, ensure_ascii=False, sort_keys=True, default=str)


@dataclass(frozen=True)
class Retrieved:
    """A passage that was found: its row in the index and its score (inner product, or squared L2 distance)."""

    passage: Passage
    row: int
    score: float
