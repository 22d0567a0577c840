"""The systems that are compared, behind one interface, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.bench import page_cache
from telerag_cli.bench.baselines import FaissGpu, FaissMemory, FaissOnDisk, Plain, Recalled
from telerag_cli.bench.suites import Pages, SystemName
from telerag_cli.config import EngineConfig, Lookahead, ScheduleName, TierKind
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.memory_plan import device_number, plan_tier
from telerag_cli.engine.opening import SILENT, OpenedIndex, Reporter, open_retriever
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.index.scoring import Coarse, faiss_threads
from telerag_cli.llm.base import Generator
from telerag_cli.planning.lists import bring
from telerag_cli.prefetch.prefetcher import Prefetch
from telerag_cli.retrieval.retriever import Finder, Retrievals, Retriever
from telerag_cli.system import available_bytes
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes


@dataclass(frozen=True)
class Setup:
    """What all systems of a benchmark have in common."""

    opened: OpenedIndex
    generator: Generator
    config: EngineConfig
    """With ``k`` and ``nprobe``."""
    pages: Pages
    reporter: Reporter = SILENT

    @property
    def depth(self) -> tuple[int, int]:
        """``k`` and ``nprobe``."""
        assert self.config.k
        assert self.config.nprobe
        return self.config.k, self.config.nprobe


@dataclass(frozen=True)
class System:
    """One way to retrieve, ready to answer with."""

    name: SystemName
    configuration: dict[str, Any]
    engine: Engine
    forget: Callable[[], None] = lambda: None
    """Drops all that earlier questions left."""
    prepare: Callable[[], None] = lambda: None
    """Gets ready for a question, off the clock."""
    files: tuple[Path, ...] = ()
    """It reads these besides the index."""
    retriever: Retriever | None = None
    """Of those that have a fast tier."""
    schedule: ScheduleName = ScheduleName.ARRIVAL
    """Which questions run together, where there are more than run at once."""


class Perfect(Retriever):
    """Lookahead that knows the query: the most that any prediction could do."""

    known: FloatArray | None = None
    """The query to come, (n, dimension)."""

    def prefetch_batch(self, searches: Sequence[FloatArray], nprobe: int, *, refining: bool = False) -> list[Prefetch]:
        """Start lookahead for the query that is known."""
        assert self.known is not None, "nobody has said what the query will be"
        return super().prefetch_batch([self.known] * len(searches), nprobe, refining=refining)


class Useless(Retriever):
    """Lookahead that follows a random direction: what a wrong prediction costs."""

    random = np.random.default_rng(0)

    def prefetch_batch(self, searches: Sequence[FloatArray], nprobe: int, *, refining: bool = False) -> list[Prefetch]:
        """Start lookahead for random queries."""
        wrong = [self.random.standard_normal(each.shape, np.float32) for each in searches]
        return super().prefetch_batch(wrong, nprobe, refining=refining)


@dataclass
class Harness:
    """Systems side by side over one index and one LLM. Cold, they share an arena, emptied before each question."""

    setup: Setup
    systems: dict[SystemName, System] = field(default_factory=dict)
    recalled: Recalled = field(default_factory=Recalled)
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Closes what was opened here; index, passages, embedder and LLM stay open."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, setup: Setup, names: Iterable[SystemName]) -> Iterator[Harness]:
        """Open systems, and close them after the block.

        Raises:
            ResourceError: they do not fit the memory together, or a device or a package is missing.
            UsageError: they cannot be compared.
        """
        rig = cls(setup)
        names = list(dict.fromkeys(names))
        if names == [SystemName.LLM_ONLY]:
            raise UsageError(
                "llm-only gives the LLM passages that other systems found, and is the only one.",
                remedy="Name another --system beside it.",
            )
        _check_memory(setup, names)
        with rig.undo:
            for name in names:
                rig.systems[name] = _telerag(rig, name) if name in TELERAG else OPENERS[name](rig)
                rig.undo.callback(rig.systems[name].engine.release)
            yield rig

    def start(self, system: System) -> float:
        """Get ready for a question to a system; return the share of the index file that is in the page cache."""
        setup = self.setup
        setup.generator.forget()  # prompts kept of one system would make the next one quicker
        if setup.pages is Pages.COLD:
            for each in self.systems.values():
                each.forget()
            for path in self._files():
                page_cache.drop(path)
            left = max(map(page_cache.share, self._files()))
        else:
            left = page_cache.share(setup.opened.index.paths.lists)
        system.prepare()
        return left

    def warm(self) -> None:
        """Fill the page cache with what the systems read, as far as memory holds it."""
        for path in self._files():
            page_cache.fill(path)

    def _files(self) -> list[Path]:
        paths = self.setup.opened.index.paths
        more = [path for system in self.systems.values() for path in system.files]
        return [paths.lists, *([paths.vectors] if paths.vectors.exists() else []), *more]

    @cached_property
    def coarse(self) -> Coarse:
        """The coarse quantizer of all systems."""
        index = self.setup.opened.index
        return Coarse(index.centroids, index.manifest.metric)

    @cached_property
    def _shared(self) -> Retriever:
        return self.open_retriever(self.setup.config)

    @cached_property
    def idle(self) -> Retriever:
        """A retriever for engines that never use it."""
        return self.retriever()

    @cached_property
    def memory(self) -> FaissMemory:
        """Faiss with everything in RAM, for all systems that need it."""
        index = self.setup.opened.index
        total = int(index.list_bytes.sum())
        with self.setup.reporter.progress("reading lists into memory", total, unit="bytes") as advance:
            return FaissMemory(index, self.coarse, advance)

    def open_retriever(self, config: EngineConfig) -> Retriever:
        """Open a retriever over a tier of its own."""
        setup = self.setup
        plan = plan_tier(setup.opened.index, config)
        opened = open_retriever(setup.opened.index, plan, setup.config, reporter=setup.reporter)
        self.undo.callback(opened.close)
        return opened

    def retriever(self, kind: type[Retriever] = Retriever) -> Retriever:
        """Return a retriever over the tier that was asked for."""
        base = self._shared if self.setup.pages is Pages.COLD else self.open_retriever(self.setup.config)
        return kind(base.index, self.coarse, base.tier)

    def engine(self, retriever: Retriever, lookahead: Lookahead, finder: Finder | None = None) -> Engine:
        """Return an engine over the shared LLM."""
        setup = self.setup
        config = replace(setup.config, lookahead=lookahead)
        return Engine.open(config, opened=setup.opened, generator=setup.generator, retriever=retriever, finder=finder)

    def plain(self, searcher: Plain) -> Engine:
        """Return an engine that finds passages without a fast tier."""
        setup, (k, nprobe) = self.setup, self.setup.depth
        finder = Retrievals(setup.opened.embedder, searcher, setup.opened.passages, k, nprobe, Tracer(enabled=False))
        return self.engine(self.idle, Lookahead.OFF, finder)


def _check_memory(setup: Setup, names: Sequence[SystemName]) -> None:
    lists = int(setup.opened.index.list_bytes.sum())
    whole = [name for name in names if name in (SystemName.FAISS_MEMORY, SystemName.RESIDENT)]
    free = available_bytes()
    if len(whole) * lists > free and setup.config.tier in (TierKind.HOST, TierKind.AUTO):
        raise ResourceError(
            f"{' and '.join(whole)} take {format_bytes(lists)} of RAM each, and {format_bytes(free)} are free.",
            remedy="Leave one of them out, or use a smaller index.",
        )


TELERAG = {
    SystemName.FETCH: (Lookahead.OFF, "no lookahead: lists move when the query is there"),
    SystemName.QUESTION: (Lookahead.QUESTION, "lookahead by the question alone, as the paper has it"),
    SystemName.ARRIVAL: (Lookahead.REFINED, "as refined, with the questions in order of arrival"),
    SystemName.REFINED: (Lookahead.REFINED, "lookahead by the question and the text so far: the default"),
    SystemName.PERFECT: (Lookahead.QUESTION, "lookahead that knows the query: the most prediction can do"),
    SystemName.USELESS: (Lookahead.QUESTION, "lookahead in a random direction: a wrong prediction's cost"),
}
"""What predicts, and this in words."""


def _telerag(rig: Harness, name: SystemName) -> System:
    lookahead, what = TELERAG[name]
    kinds: dict[SystemName, type[Retriever]] = {SystemName.PERFECT: Perfect, SystemName.USELESS: Useless}
    schedule = ScheduleName.SIMILAR if name is SystemName.REFINED else ScheduleName.ARRIVAL
    retriever = rig.retriever(kinds.get(name, Retriever))
    tier = retriever.tier
    configuration = {
        "what": f"telerag, {what}",
        "lookahead": lookahead.value,
        "arena_bytes": tier.arena_bytes,
        "cache": rig.setup.config.cache.value,
        "schedule": schedule.value,
        "tier": plan_tier(rig.setup.opened.index, rig.setup.config).name,
    }
    engine = rig.engine(retriever, lookahead)
    return System(name, configuration, engine, forget=tier.forget, retriever=retriever, schedule=schedule)


def _faiss(name: SystemName, what: str, engine: Engine, **hooks: Any) -> System:
    configuration = {"what": f"Faiss, {what}", "parallel_mode": 1, "threads": faiss_threads()}
    return System(name, configuration, engine, **hooks)


def _open_ondisk(rig: Harness) -> System:
    searcher = FaissOnDisk(rig.setup.opened.index, rig.coarse)
    rig.undo.callback(searcher.unmap)
    what = "OnDiskInvertedLists: lists.bin mapped into memory, read through the page cache"
    return _faiss(SystemName.FAISS_ONDISK, what, rig.plain(searcher), forget=searcher.unmap, prepare=searcher.map)


def _open_memory(rig: Harness) -> System:
    return _faiss(SystemName.FAISS_MEMORY, "all lists in RAM (ArrayInvertedLists)", rig.plain(rig.memory))


def _open_gpu(rig: Harness) -> System:
    searcher = FaissGpu(rig.memory, device_number(rig.setup.config.device))
    return _faiss(SystemName.FAISS_GPU, "all lists on the GPU (GpuIndexIVF)", rig.plain(searcher))


def _open_lance(rig: Harness) -> System:
    from telerag_cli.bench.lance import open_lance

    searcher, configuration, files = open_lance(rig.setup.opened, rig.setup.reporter.progress)
    hooks: dict[str, Any] = {"forget": searcher.unmap, "prepare": searcher.map, "files": files}
    return System(SystemName.LANCEDB, configuration, rig.plain(searcher), **hooks)


def _open_resident(rig: Harness) -> System:
    config, index = rig.setup.config, rig.setup.opened.index
    everything = str(int(index.list_bytes.sum()))
    on_gpu = config.tier in (TierKind.CUDA, TierKind.SIMULATED)
    wide = replace(config, gpu_memory=everything) if on_gpu else replace(config, fast_memory=everything)
    retriever = rig.open_retriever(wide)
    bring(retriever.tier, np.flatnonzero(index.list_bytes > 0))
    configuration = {
        "what": "telerag, every list in the fast tier all the time: the limit",
        "lookahead": "off",
        "arena_bytes": retriever.tier.arena_bytes,
        "tier": plan_tier(index, wide).name,
    }
    return System(SystemName.RESIDENT, configuration, rig.engine(retriever, Lookahead.OFF), retriever=retriever)


def _open_llm_only(rig: Harness) -> System:
    configuration = {"what": "the same LLM calls, given passages that were found before: no embedding, no retrieval"}
    return System(SystemName.LLM_ONLY, configuration, rig.engine(rig.idle, Lookahead.OFF, rig.recalled))


OPENERS: dict[SystemName, Callable[[Harness], System]] = {
    SystemName.FAISS_MEMORY: _open_memory,
    SystemName.FAISS_ONDISK: _open_ondisk,
    SystemName.FAISS_GPU: _open_gpu,
    SystemName.LANCEDB: _open_lance,
    SystemName.RESIDENT: _open_resident,
    SystemName.LLM_ONLY: _open_llm_only,
}
