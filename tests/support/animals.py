"""A small world for the engine: passages about animals, an embedding without a model, engines with a scripted LLM."""

import hashlib

import numpy as np
import pyarrow as pa

from indexes import make_index
from telerag_cli.bench.suites import Pages
from telerag_cli.bench.systems import Setup
from telerag_cli.config import EngineConfig, Lookahead, Metric, Storage, TierKind
from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.opening import OpenedIndex
from telerag_cli.index.passages import Passages, write_passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.scripted import ScriptedGenerator
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.host import open_host_tier

DIMENSION = 24


class WordHashes:
    """An embedding that needs no model: texts with words in common are near."""

    def encode_queries(self, texts):
        out = np.zeros((len(texts), DIMENSION), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                digest = hashlib.blake2b(word.strip(".,?").encode(), digest_size=8).digest()
                out[row] += np.random.default_rng(int.from_bytes(digest)).standard_normal(DIMENSION)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    def embed_approx(self, texts):
        return self.encode_queries(texts)


ANIMALS = ("cats", "dogs", "owls", "bees", "ants", "eels", "bats", "cows", "hens", "rats")
TEXTS = [
    f"{animal} number {n} live in place {n * 7 % 13} and eat food {n % 5}." for animal in ANIMALS for n in range(30)
]


class World:
    """Makes engines over one index, and checks that they leave nothing behind."""

    def __init__(self, folder):
        vectors = WordHashes().encode_queries(TEXTS)
        self.index, _ivf = make_index(folder, vectors, 20, Metric.IP, Storage.FLOAT32)
        columns = [[f"p{n}" for n in range(len(TEXTS))], TEXTS, ["{}"] * len(TEXTS)]
        rows = pa.record_batch(columns, schema=PASSAGE_SCHEMA)
        assert sum(write_passages([rows], self.index.paths.passages)) == len(TEXTS)
        self.opened = []

    @classmethod
    def over(cls, index):
        """Over an index that another process has made."""
        world = cls.__new__(cls)
        world.index, world.opened = index, []
        return world

    def engine(
        self,
        script,
        lookahead=Lookahead.REFINED,
        *,
        token_s=0.0,
        context_tokens=4096,
        tracer=None,
        arena=0.5,
        max_tokens=20,
        link=None,
        embedder=None,
        concurrency=1,
    ):
        coarse = Coarse(self.index.centroids, Metric.IP)
        chosen = {"transport": link} if link else {}
        tier = open_host_tier(self.index, coarse, int(self.index.list_bytes.sum() * arena), tracer=tracer, **chosen)
        generator = ScriptedGenerator(script, token_s=token_s, context_tokens=context_tokens)
        retriever = Retriever(self.index, coarse, tier, tracer=tracer)
        passages = Passages.open(self.index.paths.passages)
        config = EngineConfig(index=self.index.paths.root, k=3, nprobe=4, lookahead=lookahead, max_tokens=max_tokens)
        engine = Engine(
            generator, embedder or WordHashes(), retriever, passages, config, tracer=tracer, concurrency=concurrency
        )
        self.opened.append(engine)
        return engine

    def close(self):
        for engine in self.opened:
            engine.close()
            assert getattr(engine.generator, "running", 0) == 0
            assert engine.retriever.prefetches == 0
            assert engine.retriever.tier.occupancy().references == 0
            engine.retriever.tier.check_integrity()


def bench_setup(root, generator):
    """What the systems of a benchmark share: a world, an arena of half its lists, and cold pages."""
    world = World(root)
    opened = OpenedIndex(world.index, Passages.open(world.index.paths.passages), WordHashes())
    config = EngineConfig(
        index=root,
        k=3,
        nprobe=6,
        lookahead=Lookahead.OFF,
        max_tokens=20,
        tier=TierKind.HOST,
        fast_memory=int(world.index.list_bytes.sum() // 2),
    )
    return Setup(opened, generator, config, Pages.COLD)
