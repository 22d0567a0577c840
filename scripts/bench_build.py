"""`telerag build-index` against Faiss's own `train` + `add` in memory: time per vector, and peak memory.

The product is run as a user runs it, in a process of its own whose peak resident memory the kernel reports; its stages are
timed from outside, by the files that they leave. It begins with embeddings that are not in the page cache. Faiss gets the
same training sample, the same lists and iterations, and vectors that are in memory already: only `train` and `add` are on
its clock, of as many vectors as memory holds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faiss

from telerag_cli.config import Metric, Storage, format_bytes, parse_bytes
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.index.artifact import ID_BYTES, Index, code_size
from telerag_cli.index.build import partial_of
from telerag_cli.index.scoring import faiss_metric
from telerag_cli.index.train import ITERATIONS, TrainingPlan, draw_rows
from telerag_cli.tiers.transport import available_bytes

POLL_S = 0.02
ADD_ROWS = 65536
MIB = 1 << 20


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Run the product; seconds by stage and peak bytes."""
    command = [sys.executable, "-m", "telerag_cli", "build-index", str(options.embeddings), "-o", str(options.index),
               "--nlist", options.nlist, "--metric", options.metric, "--storage", options.storage,
               "--memory", options.memory, "--overwrite"]  # fmt: skip
    partial = partial_of(options.index)
    # A stage has ended when its file is there; in this order.
    ends = {"start and sample": partial / "work" / "queries.npz", "train": partial / "centroids.npy",
            "assign and passages": partial / "lists.bin", "place": partial / "checksums.npy"}  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(command)
    seen: dict[str, float] = {}
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        now = time.monotonic() - began
        for stage, path in ends.items():
            if stage not in seen and path.exists():
                seen[stage] = now
        if pid:
            break
        time.sleep(POLL_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    seconds, last = {}, 0.0
    for stage in ends:
        seen.setdefault(stage, last)  # over between two looks
        seconds[stage] = max(0.0, seen[stage] - last)
        last = max(last, seen[stage])
    seconds["seal"] = now - last
    return {"stages_s": {stage: round(value, 2) for stage, value in seconds.items()}, "total_s": round(now, 2),
            "peak_rss_bytes": usage.ru_maxrss * 1024}  # fmt: skip


def reference(
    source: Embeddings, index: Index, storage: Storage, metric: Metric, share: float
) -> dict[str, Any]:
    """Faiss's `train` on the product's sample, and `add` of what fits; seconds."""
    dimension, nlist = source.dimension, index.manifest.nlist
    quantizer = faiss.IndexFlat(dimension, faiss_metric(metric))
    kinds = {Storage.FLOAT16: faiss.ScalarQuantizer.QT_fp16, Storage.INT8: faiss.ScalarQuantizer.QT_8bit}
    if storage is Storage.FLOAT32:
        ivf = faiss.IndexIVFFlat(quantizer, dimension, nlist, faiss_metric(metric))
    else:
        ivf = faiss.IndexIVFScalarQuantizer(
            quantizer, dimension, nlist, kinds[storage], faiss_metric(metric), False
        )
    ivf.cp.niter, ivf.cp.seed = ITERATIONS, index.manifest.seed
    plan = TrainingPlan(nlist, index.manifest.training_rows, index.manifest.recall_queries)
    training, _ = draw_rows(source.rows, plan, index.manifest.seed)
    sample = source.sample(training, lambda _count: None)
    began = time.monotonic()
    ivf.train(sample)
    train_s = time.monotonic() - began
    del sample
    # The lists grow by doubling, so allow twice what they will hold.
    free = available_bytes()
    most = int(free * share / (2 * (code_size(dimension, storage) + ID_BYTES)))
    add_s, added = 0.0, 0
    for _, block in source.batches(ADD_ROWS):
        if added + len(block) > most:
            break
        began = time.monotonic()
        ivf.add(block)
        add_s += time.monotonic() - began
        added += len(block)
    return {"train_s": round(train_s, 2), "add_s": round(add_s, 2), "added": added}


def main() -> None:
    """Build, measure, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--index", type=Path, required=True, help="index to build; replaced if it is there")
    parser.add_argument("--nlist", default="4096")
    parser.add_argument("--metric", default="ip", choices=[str(metric) for metric in Metric])
    parser.add_argument("--storage", default="float32", choices=[str(storage) for storage in Storage])
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--reference-memory", type=float, default=0.8, help="share of free memory for Faiss")
    parser.add_argument("--remove", action="store_true", help="remove the index afterwards")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/build.json"))
    options = parser.parse_args()

    source = Embeddings.open(options.embeddings)
    # From nothing, or the product would go on with what it finds.
    shutil.rmtree(partial_of(options.index), ignore_errors=True)
    for shard in source.shards:
        with shard.path.open("rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    product = build(options)
    index = Index.open(options.index)
    faiss_s = reference(
        source, index, Storage(options.storage), Metric(options.metric), options.reference_memory
    )
    rows = source.rows
    train_s = product["stages_s"]["train"]
    ours_us = {"train": train_s / rows * 1e6, "rest": (product["total_s"] - train_s) / rows * 1e6}
    # Training is of the same sample for both: spread over the same vectors, or the part that fits would look dearer.
    theirs_us = {"train": faiss_s["train_s"] / rows * 1e6, "rest": faiss_s["add_s"] / faiss_s["added"] * 1e6}
    ratio = sum(ours_us.values()) / sum(theirs_us.values())

    from telerag_cli.bench_record import record

    lists_bytes = index.manifest.files["lists.bin"].bytes
    result = record(
        shlex.join(["python", *sys.argv]),
        vectors=rows, dimension=source.dimension, nlist=index.manifest.nlist, storage=options.storage,
        lists_bytes=lists_bytes, memory=options.memory, memory_bytes=parse_bytes(options.memory),
        product=product, faiss=faiss_s,
        us_per_vector={"product": {key: round(value, 3) for key, value in ours_us.items()},
                       "faiss": {key: round(value, 3) for key, value in theirs_us.items()}},
        time_ratio=round(ratio, 3), recall_at_10=index.manifest.recall_at_10, balance=index.manifest.balance,
        figures=[
            {"what": f"Building an index of {lists_bytes / 1e9:.1f} GB ({rows:,} vectors, {index.manifest.nlist:,} lists), per vector",
             "value": f"{sum(ours_us.values()):.1f} µs ({ratio:.2f} x)",
             "against": f"Faiss train + add in memory, {faiss_s['added']:,} vectors: {sum(theirs_us.values()):.1f} µs",
             "goal": "at most 1.5 x"},
            {"what": "Peak resident memory of that build", "value": format_bytes(product["peak_rss_bytes"]),
             "goal": "below 2.5 GiB"},
        ],
    )  # fmt: skip
    from telerag_cli.files import write_json

    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    print(f"{rows:,} vectors: product {product['total_s']} s {product['stages_s']}, peak {product['peak_rss_bytes'] / MIB:,.0f} MiB;"
          f" Faiss {faiss_s}; per vector {ratio:.2f} x")  # fmt: skip
    if options.remove:
        shutil.rmtree(options.index)


if __name__ == "__main__":
    main()
