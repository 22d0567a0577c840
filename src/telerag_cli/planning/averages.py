"""Moving averages of what earlier runs showed, kept between runs: lengths of texts, and how windows turned out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from telerag_cli.errors import ArtifactError, TeleragError
from telerag_cli.files import read_json, write_json

FORMAT, VERSION = "telerag-averages", 1
NEWEST = 0.25
"""Weight of the newest value: a machine that changes its speed is known after some texts."""
Quantity = Literal["tokens", "prompt", "cached", "window", "link", "moved"]
"""Of a stage: tokens written, tokens of the prompt and those of it that were cached; and, measured over expected, the
length of the window before the retrieval, the rate of the link in it, and the bytes moved."""


class Averages:
    """Averages by stage, such as ``hyde/passage``, and quantity. Not for several threads at once."""

    def __init__(self, path: Path | None = None, *, warn: Callable[[str], None] = lambda _message: None) -> None:
        """Start with what was kept.

        The file need not exist; without one nothing is kept. ``warn`` is called if `save` cannot write it.

        Raises:
            ArtifactError: the file is something else.
        """
        self._path, self._warn = path, warn
        self._known: dict[str, tuple[float, int]] = {}
        """Average and number of values, by "stage quantity"."""
        self._changed = False
        if path is None or not path.exists():
            return
        raw = read_json(path)
        try:
            if (raw["format"], raw["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{raw['format']} version {raw['version']}")
            self._known = {key: (float(value), int(count)) for key, (value, count) in raw["averages"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} does not hold averages of this version: {error}.", remedy="Remove it."
            ) from error

    def get(self, stage: str, quantity: Quantity, default: float) -> float:
        """Return the average, or the default if nothing is known."""
        return self._known.get(f"{stage} {quantity}", (default, 0))[0]

    def observe(self, stage: str, quantity: Quantity, value: float) -> None:
        """Add a value: ``(1 - w) * average + w * value``; the first four weigh alike, later ones have w = `NEWEST`."""
        average, count = self._known.get(f"{stage} {quantity}", (0.0, 0))
        weight = max(NEWEST, 1 / (count + 1))
        self._known[f"{stage} {quantity}"] = ((1 - weight) * average + weight * value, count + 1)
        self._changed = True

    def save(self) -> None:
        """Keep them for the next run; that they cannot be kept costs nobody an answer."""
        if self._path and self._changed:
            averages = {key: (round(value, 6), count) for key, (value, count) in self._known.items()}
            try:
                write_json(self._path, {"format": FORMAT, "version": VERSION, "averages": averages}, parents=True)
            except TeleragError as error:
                self._warn(f"What this run has shown is not kept: {error}")
