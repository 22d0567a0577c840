"""Embeds and searches for all questions at hand: what is asked while one batch runs is the next batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from telerag_cli.config import Metric
from telerag_cli.errors import TeleragError
from telerag_cli.index.artifact import FloatArray
from telerag_cli.index.passages import Passages
from telerag_cli.lookahead.retriever import Found, JoinReport, Search, Searcher
from telerag_cli.lookahead.round import Round
from telerag_cli.pipelines.found import Retrieved
from telerag_cli.tracing import Tracer

EMBED = "embed"
MOST_SEARCHES = 32
"""Searches in one batch; each waits for the lists of all."""


class QueryEmbedder(Protocol):
    """Embeds questions the way the index's passages were embedded."""

    def encode_queries(self, texts: Sequence[str]) -> FloatArray:
        """Shape (len(texts), dimension); a text's vector does not depend on the others. From any thread."""

    def sketch(self, texts: Sequence[str]) -> FloatArray:
        """Rough embeddings, shape (len(texts), dimension), that take little from an LLM decoding meanwhile."""


@dataclass(frozen=True)
class Retrieval:
    """One retrieval: what was asked, what was found, and what it took."""

    queries: tuple[str, ...]
    found: list[Retrieved]
    join: JoinReport
    embed_s: float
    """For the batch that it was part of, as the join's times are."""


class Finder(Protocol):
    """Finds passages for texts."""

    async def find(self, queries: Sequence[str], rounds: Sequence[Round]) -> Retrieval:
        """The best passages for these queries together; the rounds that prepared them end.

        Raises:
            TeleragError: it failed.
        """

    def close(self) -> None:
        """Wait for what runs and let go of what this alone uses."""


@dataclass(frozen=True)
class _Asked:
    queries: tuple[str, ...]
    rounds: tuple[Round, ...]
    answer: asyncio.Future[Retrieval] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Retrievals:
    """A queue and a thread. Nothing waits for company: a batch is what came while the one before it ran."""

    def __init__(self, embedder: QueryEmbedder, searcher: Searcher, passages: Passages, k: int, nprobe: int,
                 tracer: Tracer) -> None:  # fmt: skip
        self._embedder = embedder
        self._searcher = searcher
        self._passages = passages
        self._k = k
        self._nprobe = nprobe
        self._tracer = tracer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        self._waiting: list[_Asked] = []
        self._running: asyncio.Task[None] | None = None

    async def find(self, queries: Sequence[str], rounds: Sequence[Round]) -> Retrieval:
        """The best passages for these queries together; the rounds that prepared them end.

        Raises:
            TeleragError: a list could not be read.
        """
        asked = _Asked(tuple(queries), tuple(rounds))
        self._waiting.append(asked)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await asked.answer

    def close(self) -> None:
        """Wait for what runs and stop the thread."""
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST_SEARCHES], self._waiting[MOST_SEARCHES:]
                batch = [asked for asked in batch if not asked.answer.done()]
                if not batch:
                    continue
                results = await loop.run_in_executor(self._thread, self._work, batch)
                for asked, result in zip(batch, results, strict=True):
                    if asked.answer.done():
                        continue  # nobody waits for it any more
                    if isinstance(result, Exception):
                        asked.answer.set_exception(result)
                    else:
                        asked.answer.set_result(result)
        finally:
            self._running = None

    def _work(self, batch: Sequence[_Asked]) -> list[Retrieval | Exception]:
        try:
            return list(self._together(batch))
        except Exception as error:
            if len(batch) == 1 or not isinstance(error, TeleragError):
                return [error] * len(batch)
            # What one of them needs may be damaged and what the others need not.
            return [result for asked in batch for result in self._work([asked])]

    def _together(self, batch: Sequence[_Asked]) -> list[Retrieval]:
        texts = [query for asked in batch for query in asked.queries]
        started_s = time.perf_counter()
        with self._tracer.span(EMBED, f"{len(texts)} texts" if len(texts) > 1 else "text"):
            vectors = self._embedder.encode_queries(texts)
        embed_s = time.perf_counter() - started_s
        searches, start = [], 0
        for asked in batch:
            searches.append(Search(vectors[start : (start := start + len(asked.queries))], asked.rounds))
        found = self._searcher.search_together(searches, self._k, self._nprobe)
        return [
            Retrieval(asked.queries, self._best(each), each.report, embed_s)
            for asked, each in zip(batch, found, strict=True)
        ]

    def _best(self, found: Found) -> list[Retrieved]:
        """The best ``k`` passages over all queries, each once, best first."""
        larger_is_nearer = self._searcher.index.manifest.metric is Metric.IP
        best: dict[int, float] = {}
        for score, row in zip(found.scores.ravel().tolist(), found.rows.ravel().tolist(), strict=True):
            if row >= 0 and (row not in best or (score > best[row]) == larger_is_nearer):
                best[row] = score
        ranked = sorted(best.items(), key=lambda item: (-item[1] if larger_is_nearer else item[1], item[0]))
        ranked = ranked[: self._k]
        passages = self._passages[[row for row, _score in ranked]]
        return [
            Retrieved(passage, row, score) for passage, (row, score) in zip(passages, ranked, strict=True)
        ]
