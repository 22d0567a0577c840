"""The unit of text that is embedded and returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Passage:
    """A piece of text with what is known about it; ``metadata`` is JSON-serialisable, a title is its ``title``."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
