"""From what a suite found to the result that is kept."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telerag_cli.bench.answering import Outcome
from telerag_cli.bench.results import SuiteResult
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.config import EngineConfig
from telerag_cli.engine.opened_index import OpenedIndex
from telerag_cli.files import checksum
from telerag_cli.system import hardware


@dataclass(frozen=True)
class Started:
    """A suite that runs."""

    suite: SuiteName
    date: str
    began_s: float

    def done(self, outcome: Outcome, settings: dict[str, Any], metadata: dict[str, str]) -> SuiteResult:
        """What is kept of it."""
        suite = SUITES[self.suite]
        return SuiteResult(
            suite=self.suite.value,
            title=suite.title,
            stands_for=suite.stands_for,
            date=self.date,
            took_s=round(time.perf_counter() - self.began_s, 1),
            command=shlex.join(["telerag", *sys.argv[1:]]),
            hardware=hardware(),
            metadata=metadata,
            settings=settings,
            systems=outcome.systems,
            axes=list(suite.axes),
            cells=outcome.cells,
            ratios=outcome.ratios,
            checks=outcome.checks,
            notes=outcome.notes,
        )


def keep(suite: SuiteName) -> Started:
    """Note when a suite began."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Started(suite, now, time.perf_counter())


def settings_of(
    opened: OpenedIndex, config: EngineConfig, questions: Mapping[str, Sequence[str]], trace: Path | None, **more: Any
) -> dict[str, Any]:
    """Return what was the same for all systems.

    Args:
        opened: index and embedder.
        config: how questions were answered.
        questions: the questions of each dataset.
        trace: the recording whose texts were replayed, if any.
        more: other settings, by their names in results.
    """
    manifest = opened.index.manifest
    return {
        "index": {
            "name": opened.index.paths.root.name,
            "lists_bytes": int(opened.index.list_bytes.sum()),
            "ntotal": manifest.ntotal,
            "nlist": manifest.nlist,
            "dimension": manifest.dimension,
            "storage": manifest.storage.value,
            "metric": manifest.metric.value,
        },
        "generation": "real" if trace is None else f"replayed from {trace.name} ({checksum(trace)})",
        "embedder": opened.embedder.info.model,
        "datasets": list(questions),
        "k": config.k,
        "nprobe": config.nprobe,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        **more,
    }
