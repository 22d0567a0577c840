"""The suites by name: what each shows, and the figure or table of the paper that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SuiteName(StrEnum):
    """All suites."""

    LATENCY = "latency"
    NPROBE = "nprobe"
    HIT_RATE = "hit-rate"
    THROUGHPUT = "throughput"
    BREAKDOWN = "breakdown"
    CACHE = "cache"
    SCALING = "scaling"
    EMBED = "embed"
    BUILD = "build"


class SystemName(StrEnum):
    """What ``--system`` may say."""

    FAISS_MEMORY = "faiss-memory"
    FAISS_ONDISK = "faiss-ondisk"
    FAISS_GPU = "faiss-gpu"
    LANCEDB = "lancedb"
    FETCH = "fetch"
    QUESTION = "question"
    ARRIVAL = "arrival"
    REFINED = "refined"
    PERFECT = "perfect"
    USELESS = "useless"
    RESIDENT = "resident"
    LLM_ONLY = "llm-only"


class Pages(StrEnum):
    """What an index file's pages and the arenas hold when a question comes: nothing, or what earlier ones left."""

    COLD = "cold"
    WARM = "warm"


@dataclass(frozen=True)
class Suite:
    """What a suite is."""

    title: str
    stands_for: str
    axes: tuple[str, ...]
    """What varies besides the system, the outermost first."""


SUITES = {
    SuiteName.LATENCY: Suite(
        "Latency of single queries",
        "the paper's comparison of end-to-end latency by pipeline and dataset",
        ("pipeline", "dataset", "pages"),
    ),
    SuiteName.NPROBE: Suite("Latency by lists probed", "the paper's sensitivity to nprobe", ("nprobe",)),
    SuiteName.HIT_RATE: Suite(
        "Lists in fast memory at the join, by bytes moved", "the paper's hit rate by prefetch budget", ("budget",)
    ),
    SuiteName.THROUGHPUT: Suite("Throughput by batch size", "the paper's throughput by batch size", ("batch_size",)),
    SuiteName.BREAKDOWN: Suite("Where the time goes", "the paper's breakdown of latency into stages", ("pipeline",)),
    SuiteName.CACHE: Suite("Cache policies", "the paper's ablation of the cache", ("skew", "cache_fraction")),
    SuiteName.SCALING: Suite("Throughput by replicas", "the paper's scaling over several GPUs", ("replicas",)),
    SuiteName.EMBED: Suite(
        "Embedding a corpus", "nothing in the paper, which takes embeddings as given", ("batch_size",)
    ),
    SuiteName.BUILD: Suite("Building an index", "nothing in the paper, which takes the index as given", ()),
}
