"""Moving averages of what earlier runs showed, kept between runs: lengths of texts, and how windows turned out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from telerag_cli.errors import ArtifactError, TeleragError
from telerag_cli.files import read_json, update_json

FORMAT, VERSION = "telerag-averages", 1
NEWEST = 0.25
"""Weight of the newest value: a machine that changes its speed is known after some texts."""
Quantity = Literal["tokens", "prompt", "cached", "window", "link", "moved"]
"""Of a stage: tokens written, tokens of the prompt and those of it that were cached; and, measured over expected, the
length of the window before the retrieval, the rate of the link in it, and the bytes moved."""
Known = dict[str, tuple[float, int]]
"""Average and number of values, by "stage quantity"."""


class Averages:
    """Averages by stage, such as ``hyde/passage``, and quantity. Not for several threads at once."""

    def __init__(self, path: Path | None = None, *, warn: Callable[[str], None] = lambda _message: None) -> None:
        """Start with what was kept.

        The file need not exist; without one nothing is kept. ``warn`` is called if `save` cannot write it.

        Raises:
            ArtifactError: the file is something else.
        """
        self._path, self._warn = path, warn
        self._known = _read(path, read_json(path)) if path is not None and path.exists() else {}
        self._observed: list[tuple[str, float]] = []
        """What is not saved yet, oldest first."""

    def get(self, stage: str, quantity: Quantity, default: float) -> float:
        """Return the average, or the default if nothing is known."""
        return self._known.get(f"{stage} {quantity}", (default, 0))[0]

    def observe(self, stage: str, quantity: Quantity, value: float) -> None:
        """Add a value: ``(1 - w) * average + w * value``; the first four weigh alike, later ones have w = `NEWEST`."""
        _add(self._known, f"{stage} {quantity}", value)
        if self._path:
            self._observed.append((f"{stage} {quantity}", value))

    def save(self) -> None:
        """Add what was observed to what is kept by now; that it cannot be kept costs nobody an answer."""
        if self._path and self._observed:
            try:
                update_json(self._path, self._with_observed)
                self._observed.clear()
            except TeleragError as error:
                self._warn(f"What this run has shown is not kept: {error}")

    def _with_observed(self, raw: Any) -> dict[str, Any]:
        assert self._path
        known = _read(self._path, raw) if raw is not None else {}  # others have saved theirs meanwhile
        for key, value in self._observed:
            _add(known, key, value)
        averages = {key: (round(average, 6), count) for key, (average, count) in known.items()}
        return {"format": FORMAT, "version": VERSION, "averages": averages}


def _add(known: Known, key: str, value: float) -> None:
    average, count = known.get(key, (0.0, 0))
    weight = max(NEWEST, 1 / (count + 1))
    known[key] = ((1 - weight) * average + weight * value, count + 1)


def _read(path: Path, raw: Any) -> Known:
    try:
        if (raw["format"], raw["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{raw['format']} version {raw['version']}")
        return {key: (float(value), int(count)) for key, (value, count) in raw["averages"].items()}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{path} does not hold averages of this version: {error}.", remedy="Remove it.") from error
