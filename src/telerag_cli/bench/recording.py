"""From what a suite found to the result that is kept."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from typing import Any

from telerag_cli.bench.answering import Outcome
from telerag_cli.bench.results import SuiteResult
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.config import EngineConfig
from telerag_cli.engine.opened_index import OpenedIndex
from telerag_cli.files import checksum
from telerag_cli.system import hardware


class Stopwatch:
    """Notes when a suite began."""

    def __init__(self, suite: SuiteName) -> None:
        self._suite = suite
        self._date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._began_s = time.perf_counter()

    def result(self, outcome: Outcome, settings: dict[str, Any], metadata: dict[str, str]) -> SuiteResult:
        """Return what is kept of the suite, which ends now."""
        suite = SUITES[self._suite]
        return SuiteResult(
            suite=self._suite.value,
            title=suite.title,
            stands_for=suite.stands_for,
            date=self._date,
            took_s=round(time.perf_counter() - self._began_s, 1),
            command=shlex.join(["telerag", *sys.argv[1:]]),
            hardware=hardware(),
            metadata=metadata,
            settings=settings,
            axes=list(suite.axes),
            **vars(outcome),
        )


def settings_of(opened: OpenedIndex, config: EngineConfig, llm: str, **extent: Any) -> dict[str, Any]:
    """Return what was the same for all systems.

    Args:
        opened: index and embedder.
        config: how questions were answered, with ``k`` and ``nprobe``.
        llm: the LLM's name.
        extent: how much was asked, by the names of results.
    """
    index, trace = opened.index, config.replay
    manifest = index.manifest
    return {
        "index": {
            "name": index.paths.root.name,
            "lists_bytes": int(index.list_bytes.sum()),
            "ntotal": manifest.ntotal,
            "nlist": manifest.nlist,
            "dimension": manifest.dimension,
            "storage": manifest.storage.value,
            "metric": manifest.metric.value,
        },
        "llm": llm,
        "generation": "real" if trace is None else f"replayed from {trace.name} ({checksum(trace)})",
        "embedder": opened.embedder.info.model,
        **extent,
        "k": config.k,
        "nprobe": config.nprobe,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "fast_memory_bytes": config.fast_memory_bytes,
    }
