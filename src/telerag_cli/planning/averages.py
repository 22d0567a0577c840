"""What earlier runs showed, as moving averages kept between them: lengths of texts, and how long windows really were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from telerag_cli.errors import ArtifactError
from telerag_cli.files import read_json, write_json

FORMAT = "telerag-averages"
VERSION = 1
NEWEST = 0.25
"""Weight of the newest value: machines change their speed, and some texts later it should be known."""


@dataclass(frozen=True)
class Average:
    """A moving average, and how many values it has seen."""

    value: float
    count: int

    def and_then(self, value: float) -> Average:
        """With one value more. The first few weigh alike, so that none of them is believed more than the others."""
        weight = max(NEWEST, 1 / (self.count + 1))
        return Average((1 - weight) * self.value + weight * value, self.count + 1)


class Averages:
    """By what they are of, such as ``hyde/passage tokens``. Not for several threads at once."""

    def __init__(self, path: Path | None = None) -> None:
        """Begin with what was kept.

        Args:
            path: a file that need not exist; None to keep nothing.

        Raises:
            ArtifactError: the file is something else.
        """
        self._path = path
        self._known: dict[str, Average] = {}
        self._changed = False
        if path is None or not path.exists():
            return
        raw = read_json(path)
        try:
            if (raw["format"], raw["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{raw['format']} version {raw['version']}")
            self._known = {key: Average(float(value), int(count)) for key, (value, count) in raw["averages"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} holds no averages of this version: {error}.", remedy="Remove it.") from error

    def get(self, key: str, default: float) -> float:
        """The average, or the default if nothing is known."""
        known = self._known.get(key)
        return default if known is None else known.value

    def observe(self, key: str, value: float) -> None:
        """Learn a value."""
        known = self._known.get(key)
        self._known[key] = Average(value, 1) if known is None else known.and_then(value)
        self._changed = True

    def save(self) -> None:
        """Keep them for the next run.

        Raises:
            ResourceError: the file cannot be written.
        """
        if self._path and self._changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            averages = {key: (round(known.value, 6), known.count) for key, known in self._known.items()}
            write_json(self._path, {"format": FORMAT, "version": VERSION, "averages": averages})
