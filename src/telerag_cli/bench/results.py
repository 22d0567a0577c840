"""What a benchmark leaves: one JSON file a suite, from which reports are made. docs/bench.md describes the fields."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.errors import ArtifactError
from telerag_cli.files import read_json, write_json
from telerag_cli.system import hardware

FORMAT = "telerag-bench"
VERSION = 1

Key = dict[str, Any]
"""What tells cells of a suite apart besides the system: a value for each of the suite's axes."""


@dataclass(frozen=True)
class Cell:
    """One system at one point of a suite's axes, and what was measured there.

    ``values`` has vLLM's names where vLLM has the figure (``mean_e2el_ms``, ``p99_ttft_ms``, ``request_throughput``),
    and names of the same form where it does not (``mean_retrieval_ms``, ``hit_share``). A value is a number, or a table
    of them by stage (``mean_stage_ms``), in the order in which the stages run.
    """

    system: str
    key: Key
    values: dict[str, Any]
    detailed: list[dict[str, Any]] = field(default_factory=list)
    """One entry a measured request, if they were to be kept."""


@dataclass(frozen=True)
class Ratio:
    """How two systems compare: ``over / under`` pair by pair, over the requests that both served side by side."""

    key: Key
    over: str
    under: str
    metric: str
    """``e2el_ms``, say: what was divided."""
    pairs: int
    ratio: float | None
    """The geometric mean; None if the spread is too wide for a number to mean anything."""
    low: float
    high: float
    """The ends of its 95 % confidence interval, by bootstrap over pairs."""
    note: str = ""
    """Why there is no number."""


@dataclass(frozen=True)
class Check:
    """Something that must hold for the figures to mean anything."""

    name: str
    held: bool
    """Whether it did."""
    says: str
    """In a sentence, with the numbers."""


@dataclass(frozen=True)
class Outcome:
    """What a suite found."""

    systems: dict[str, dict[str, Any]]
    """How each system was configured; ``what`` is a sentence."""
    cells: list[Cell]
    ratios: list[Ratio] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader should know before believing a figure."""


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found, and all that is needed to judge it and to run it again."""

    suite: str
    title: str
    stands_for: str
    """The figure or table of the paper."""
    date: str
    """ISO 8601, UTC, when it began."""
    took_s: float
    command: str
    hardware: dict[str, Any]
    """See `telerag_cli.system.hardware`."""
    metadata: dict[str, str]
    """What the user wanted noted."""
    settings: dict[str, Any]
    """Index, LLM, pipelines, dataset, numbers of prompts, seed, and what else all cells share; may be nested."""
    systems: dict[str, dict[str, Any]]
    """See `Outcome`, as for what follows."""
    axes: list[str]
    """Names of the keys of a cell, the outermost first."""
    cells: list[Cell]
    ratios: list[Ratio]
    checks: list[Check]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, name: SuiteName, measure: Callable[[], tuple[Outcome, dict[str, Any]]], metadata: dict[str, str]
    ) -> SuiteResult:
        """Run a suite, which returns what it found and its settings."""
        suite, date = SUITES[name], datetime.now(UTC).isoformat(timespec="seconds")
        began_s = time.perf_counter()
        outcome, settings = measure()
        return cls(
            suite=name.value,
            title=suite.title,
            stands_for=suite.stands_for,
            date=date,
            took_s=round(time.perf_counter() - began_s, 1),
            command=shlex.join(["telerag", *sys.argv[1:]]),
            hardware=hardware(),
            metadata=metadata,
            settings=settings,
            axes=list(suite.axes),
            **vars(outcome),
        )

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; raises ResourceError if it cannot be written."""
        # Not sorted: stages stand in the order in which they run.
        write_json(path, {"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=False)

    @classmethod
    def load(cls, path: Path) -> SuiteResult:
        """Read what `save` wrote; raises ArtifactError if the file is missing, not a result, or of another version."""
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not a benchmark result.", remedy="Name a file that telerag bench wrote.")
        if raw.get("version") != VERSION:
            raise ArtifactError(
                f"{path} is a benchmark result of version {raw.get('version')}, and this reads version {VERSION}.",
                remedy="Run the benchmark again, or use the telerag that made it.",
            )
        values = {name: value for name, value in raw.items() if name not in ("format", "version")}
        try:
            for name, kind in (("cells", Cell), ("ratios", Ratio), ("checks", Check)):
                values[name] = [kind(**each) for each in raw[name]]
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}.", remedy="Run the benchmark again.") from error


def load_all(folder: Path) -> dict[str, SuiteResult]:
    """Read every result in a folder, by file name without its ending; other JSON files are left alone.

    Raises:
        ArtifactError: the folder is missing or has no result.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        raw = read_json(path)
        if isinstance(raw, dict) and raw.get("format") == FORMAT:
            found[path.stem] = SuiteResult.load(path)
    if not found:
        raise ArtifactError(
            f"{folder} has no benchmark result.", remedy="Run a suite with --result-dir, like telerag bench latency."
        )
    return found
