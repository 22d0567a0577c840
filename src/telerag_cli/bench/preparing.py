"""The suites of what comes before answering: embedding a corpus, building an index, each beside the obvious way."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.bench import page_cache
from telerag_cli.bench.results import Cell, Check, Outcome, Ratio
from telerag_cli.bench.statistics import ratio, short
from telerag_cli.corpus.chunking import Chunker
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.corpus.readers import read_passages
from telerag_cli.corpus.sources import find_sources
from telerag_cli.embedding.encoder import Encoder, min_cosine
from telerag_cli.embedding.loading import model_path
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.index.artifact import ID_BYTES, Index, code_size
from telerag_cli.index.partial import partial_of
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.index.train import ITERATIONS, TrainingPlan, draw_rows
from telerag_cli.progress import Advance
from telerag_cli.system import available_bytes
from telerag_cli.units import parse_bytes

TELERAG, PLAIN, FAISS = "telerag", "sentence-transformers", "faiss-memory"
LEAST_COSINE = 0.999
POLL_S = 0.02
ADD_ROWS = 65536
REFERENCE_SHARE = 0.8
"""Of free memory, for Faiss's lists."""


def embedding(
    source: str, model: str | None, device: str, count: int, shortest: int, repeats: int, advance: Advance
) -> tuple[Outcome, dict[str, Any]]:
    """Passages a second of telerag's encoder and ``SentenceTransformer.encode`` in turn, same passages and weights.

    Raises:
        InputError: the source has no passage that is long enough.
    """
    from sentence_transformers import SentenceTransformer

    from telerag_cli.config import DEFAULT_EMBEDDER

    name = model or DEFAULT_EMBEDDER
    encoder = Encoder.load(name, device=device)
    baseline = SentenceTransformer(model_path(name), device=encoder.device)
    read = read_passages(find_sources([source]), Chunker(encoder.tokenizer, encoder.info.max_tokens))
    texts = [each.embedded_text for each in islice((each for each in read if len(each.text) >= shortest), count)]
    if not texts:
        raise InputError(
            f"{source} has no passage of at least {shortest} characters.",
            remedy="Lower --shortest, or name another source.",
        )
    encoder.decide(texts)
    encoder.encode(texts[:64])
    baseline.encode(texts[:64])
    encoders: dict[str, Callable[[Sequence[str]], FloatArray]] = {
        TELERAG: encoder.encode,
        PLAIN: lambda some: np.asarray(baseline.encode(list(some)), np.float32),
    }
    seconds: dict[str, list[float]] = {system: [] for system in encoders}
    cosines = []
    for turn in range(repeats):
        made = {}
        for system in list(encoders)[:: 1 if turn % 2 == 0 else -1]:
            gc.collect()
            began_s = time.perf_counter()
            made[system] = encoders[system](texts)
            seconds[system].append(time.perf_counter() - began_s)
            advance(1)
        cosines.append(min_cosine(made[TELERAG], made[PLAIN]))
    key = {"batch_size": len(texts)}
    cells = []
    for system, taken in seconds.items():
        rate = short(len(texts) / statistics.median(taken))
        values = {"completed": len(taken) * len(texts), "duration": short(sum(taken)), "request_throughput": rate}
        cells.append(Cell(system, key, values))
    found = ratio(key, PLAIN, TELERAG, "duration", list(zip(seconds[PLAIN], seconds[TELERAG], strict=True)))
    says = (
        f"The least cosine between the two embeddings of a passage is {min(cosines):.5f}, and {LEAST_COSINE} is wanted."
    )
    systems = {
        TELERAG: {"what": "telerag embed's encoder", "precision": str(encoder.precision)},
        PLAIN: {"what": "SentenceTransformer.encode with its defaults", "precision": "float32"},
    }
    settings = {
        "model": encoder.info.model,
        "device": str(encoder.device),
        "passages": len(texts),
        "repeats": repeats,
        "mean_characters": round(statistics.mean(map(len, texts)), 1),
    }
    check = Check("same embeddings", min(cosines) >= LEAST_COSINE, says)
    return Outcome(systems, cells, [found], [check]), settings


def building(
    embeddings: Path, output: Path, nlist: int, memory: str, advance: Advance
) -> tuple[Outcome, dict[str, Any]]:
    """``telerag build-index`` in a process of its own, with embeddings not in the page cache, and Faiss in memory.

    Faiss gets the same training sample, and vectors that are in memory already: only ``train`` and ``add`` are on its
    clock, of as many vectors as memory holds.
    """
    source = Embeddings.open(embeddings)
    parse_bytes(memory)
    shutil.rmtree(partial_of(output), ignore_errors=True)  # or it would go on with what it finds
    for shard in source.shards:
        page_cache.drop(shard.path)
    stages_s, total_s, peak_bytes = _build(embeddings, output, nlist, memory)
    advance(1)
    index = Index.open(output)
    train_s, add_s, added = _reference(source, index)
    advance(1)
    rows = source.rows
    # Training is of the same sample for both: spread over the same vectors, or the part that fits would look dearer.
    ours_us = total_s / rows * 1e6
    theirs_us = train_s / rows * 1e6 + add_s / added * 1e6
    ours = {
        "completed": rows,
        "us_per_vector": short(ours_us),
        "duration": round(total_s, 2),
        "peak_rss_bytes": peak_bytes,
        "mean_stage_ms": {stage: round(1e3 * value) for stage, value in stages_s.items()},
    }
    theirs = {
        "completed": added,
        "us_per_vector": short(theirs_us),
        "duration": round(train_s + add_s, 2),
        "mean_stage_ms": {"train": round(1e3 * train_s), "add": round(1e3 * add_s)},
    }
    note = "one run: no interval"
    found = Ratio({}, TELERAG, FAISS, "us_per_vector", 1, short(ours_us / theirs_us), 0.0, 0.0, note)
    systems = {
        TELERAG: {"what": "telerag build-index, out of core, in a process of its own", "memory": memory},
        FAISS: {"what": f"Faiss, train and add in memory, of {added:,} vectors that are in memory already"},
    }
    manifest = index.manifest
    settings = {
        "vectors": rows,
        "dimension": source.dimension,
        "nlist": nlist,
        "lists_bytes": int(index.list_bytes.sum()),
        "recall_at_10": manifest.recall_at_10,
        "balance": manifest.balance,
    }
    return Outcome(systems, [Cell(TELERAG, {}, ours), Cell(FAISS, {}, theirs)], [found]), settings


def _build(embeddings: Path, output: Path, nlist: int, memory: str) -> tuple[dict[str, float], float, int]:
    """Return seconds by stage, as seen from the files that they leave, and in all; and the peak resident bytes."""
    command = [sys.executable, "-m", "telerag_cli", "build-index", str(embeddings), "-o", str(output)]
    command += ["--nlist", str(nlist), "--memory", memory, "--overwrite"]
    partial = partial_of(output)
    ends = {
        "start and sample": partial / "work" / "queries.npz",
        "train": partial / "centroids.npy",
        "assign and passages": partial / "lists.bin",
        "place": partial / "checksums.npy",
    }
    began_s = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen: dict[str, float] = {}
    pid = 0
    while not pid:
        time.sleep(POLL_S)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        now_s = time.monotonic() - began_s
        seen |= {stage: now_s for stage, path in ends.items() if stage not in seen and path.exists()}
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise TeleragError(f"telerag build-index ended with {process.returncode}.", remedy="Its message is above.")
    seconds, last_s = {}, 0.0
    for stage in ends:
        ended_s = max(last_s, seen.get(stage, last_s))  # or it ended between two looks
        seconds[stage] = ended_s - last_s
        last_s = ended_s
    return seconds | {"seal": now_s - last_s}, now_s, usage.ru_maxrss * 1024


def _reference(source: Embeddings, index: Index) -> tuple[float, float, int]:
    """Return the seconds of Faiss's ``train`` and ``add``, and how many vectors were added."""
    manifest = index.manifest
    ivf = empty_ivf(
        flat(index.centroids[:0], manifest.metric), source.dimension, manifest.nlist, manifest.metric, manifest.storage
    )
    ivf.is_trained = False
    ivf.cp.niter, ivf.cp.seed = ITERATIONS, manifest.seed
    plan = TrainingPlan(manifest.nlist, manifest.training_rows, manifest.recall_queries)
    training, _queries = draw_rows(source.rows, plan, manifest.seed)
    sample = source.sample(training, lambda _count: None)
    began_s = time.monotonic()
    ivf.train(sample)
    train_s = time.monotonic() - began_s
    del sample
    # The lists grow by doubling, so allow twice what they will hold.
    most = int(available_bytes() * REFERENCE_SHARE / (2 * (code_size(source.dimension, manifest.storage) + ID_BYTES)))
    add_s, added = 0.0, 0
    for _, block in source.batches(ADD_ROWS):
        if added + len(block) > most and added:
            break
        began_s = time.monotonic()
        ivf.add(block)
        add_s += time.monotonic() - began_s
        added += len(block)
    return train_s, add_s, added
