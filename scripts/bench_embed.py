"""Passages per second of telerag's encoder and of `SentenceTransformer.encode` with its defaults.

Both embed the same passages, in turn, in one process, with the same weights; which goes first alternates.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from telerag_cli.bench_record import record
from telerag_cli.config import DEFAULT_EMBEDDER
from telerag_cli.corpus.chunking import Chunker
from telerag_cli.corpus.readers import find_sources, read_passages
from telerag_cli.embedding.encoder import Encoder, FloatArray, min_cosine, model_path
from telerag_cli.files import write_json


def timed(encode: Callable[[], FloatArray]) -> tuple[float, FloatArray]:
    """Seconds of one call, and its vectors."""
    gc.collect()
    started = time.perf_counter()
    vectors = encode()
    return time.perf_counter() - started, vectors


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="what telerag embed reads; a folder of embeddings too")
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument(
        "--shortest", type=int, default=0, help="leave out passages of fewer characters than this"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default=DEFAULT_EMBEDDER)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()

    encoder = Encoder.load(options.model, device=options.device)
    baseline = SentenceTransformer(model_path(options.model), device=encoder.device)
    chunker = Chunker(encoder.tokenizer, encoder.info.max_tokens)
    read = read_passages(find_sources([options.source]), chunker)
    passages = islice(
        (passage for passage in read if len(passage.text) >= options.shortest), options.passages
    )
    texts = [passage.embedded_text for passage in passages]
    tokens = [min(encoder.count_tokens(text), encoder.info.max_tokens) for text in texts]

    encoder.decide(texts)
    encoder.encode(texts[:64])
    baseline.encode(texts[:64])
    pairs = []
    for turn in range(options.repeats):
        runs: list[tuple[str, Callable[[], FloatArray]]] = [
            ("telerag", lambda: encoder.encode(texts)),
            ("sentence_transformers", lambda: np.asarray(baseline.encode(texts))),
        ]
        found = {name: timed(run) for name, run in (runs if turn % 2 == 0 else runs[::-1])}
        rates = {name: len(texts) / seconds for name, (seconds, _) in found.items()}
        cosine = min_cosine(found["telerag"][1], found["sentence_transformers"][1])
        ratio = rates["telerag"] / rates["sentence_transformers"]
        pairs.append({**rates, "ratio": ratio, "min_cosine": cosine})
        print(
            f"pair {turn + 1}: telerag {rates['telerag']:7.1f} passages/s, SentenceTransformer "
            f"{rates['sentence_transformers']:7.1f} passages/s, {ratio:.2f} times, least cosine {cosine:.6f}"
        )
    ratios = [pair["ratio"] for pair in pairs]
    print(f"median {statistics.median(ratios):.2f} times, from {min(ratios):.2f} to {max(ratios):.2f}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        result = record(
            shlex.join(["python", *sys.argv]),
            model=encoder.info.model,
            device=encoder.device,
            precision=encoder.precision,
            threads=torch.get_num_threads(),
            passages=len(texts),
            mean_characters=statistics.mean(map(len, texts)),
            mean_tokens=statistics.mean(tokens),
            pairs=pairs,
            telerag_passages_per_s=statistics.median(pair["telerag"] for pair in pairs),
            sentence_transformers_passages_per_s=statistics.median(
                pair["sentence_transformers"] for pair in pairs
            ),
            median_ratio=statistics.median(ratios),
            min_cosine=min(pair["min_cosine"] for pair in pairs),
            figures=[
                {
                    "what": f"Embedding {len(texts):,} passages of {statistics.mean(map(len, texts)):.0f} characters",
                    "value": f"{statistics.median(pair['telerag'] for pair in pairs):.0f} passages/s "
                    f"({statistics.median(ratios):.1f} x, least cosine {min(p['min_cosine'] for p in pairs):.4f})",
                    "against": "SentenceTransformer.encode with its defaults: "
                    f"{statistics.median(pair['sentence_transformers'] for pair in pairs):.0f} passages/s",
                    "goal": "at least 4 x, cosine at least 0.999",
                }
            ],
        )
        write_json(options.output, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
