"""Moving or scoring in place: the planner's split of a join's misses against a sweep of fixed ones, on links of chosen speeds.

    python scripts/bench_split.py [-o benchmarks/results/split.json]

A simulated GPU's link is throttled, and profiled as `telerag profile` does it. Then a batch of queries misses every list, and
the misses are split in fixed shares between the link and scoring in place, and as the planner splits them by the profile. Every
split is timed in every round, in an order that rotates. The planner is compared with the fixed share of the least median; as
that least of several noisy medians is lucky, it is timed once more beside the planner, and both ratios are told.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from telerag_cli.bench_record import record
from telerag_cli.config import Metric, Storage
from telerag_cli.engine.survey import rates_for_joins
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse
from telerag_cli.lookahead.retriever import Retriever
from telerag_cli.planning.profile import Identity, Profile
from telerag_cli.profiling.lists import joins_of, moving_rates, scoring_rates
from telerag_cli.profiling.storages import MadeLists, make_index
from telerag_cli.profiling.timing import FULL
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
PAIRS = 40
"""Of the planner and the best fixed split, at the end."""
IDENTITY = Identity("", 0, (), "", "", "", "")


def profile_of(index: Index, coarse: Coarse, gpu: SimulatedGpu, lists: MadeLists) -> Profile:
    """What planning needs of a join."""
    tier = open_cuda_tier(index, coarse, gpu, int(index.extents.sum()), lists=lists)
    with contextlib.closing(Retriever(index, coarse, tier)) as retriever:
        scoring, moving = scoring_rates(index, tier, FULL), moving_rates(retriever, None, 0, FULL)
        joins = joins_of(retriever, index.centroids[:8], index.manifest.nlist)
    return Profile(IDENTITY, False, 0.0, "", {}, moving=moving, scoring=tuple(scoring), joins=joins)


def measure(bytes_per_s: float, storage: Storage, queries: int, rounds: int) -> dict[str, Any]:
    """One link and one batch."""
    with tempfile.TemporaryDirectory() as folder:
        index, lists = make_index(Path(folder), 384, Metric.IP, storage)
    coarse = Coarse(index.centroids, Metric.IP)
    gpu = SimulatedGpu(bytes_per_s=bytes_per_s)
    rates = rates_for_joins(profile_of(index, coarse, gpu, lists))
    tier = open_cuda_tier(index, coarse, gpu, int(index.extents.sum()), lists=lists, rates=rates)
    batch = np.random.default_rng(queries).standard_normal((queries, 384), np.float32)
    fixed = {f"{share:.3f}": Retriever(index, coarse, tier, link_share=share) for share in SHARES}
    planner = Retriever(index, coarse, tier)
    took: dict[str, list[float]] = {name: [] for name in (*fixed, "planner")}

    def timed(retriever: Retriever) -> float:
        # What came before may have left the processor's threads asleep, and would be paid for by whoever is next.
        fixed["0.000"].search(batch, 5, index.manifest.nlist)
        tier.forget()
        began_s = time.perf_counter()
        retriever.search(batch, 5, index.manifest.nlist)
        return time.perf_counter() - began_s

    everyone = [*fixed.items(), ("planner", planner)]
    for number in range(rounds + 1):
        turn = number % len(everyone)
        for name, retriever in everyone[turn:] + everyone[:turn]:
            took_s = timed(retriever)
            if number:  # the first round warms up, and lets the planner see both ends together
                took[name].append(took_s)
    medians = {name: statistics.median(times) for name, times in took.items()}
    best = min(fixed, key=medians.__getitem__)
    again = [(timed(planner), timed(fixed[best])) for _ in range(PAIRS)]
    tier.close()
    return {
        "link_bytes_per_s": bytes_per_s, "storage": storage.value, "queries": queries, "rates": None if rates is None else asdict(rates),
        "median_s": {name: round(value, 6) for name, value in medians.items()}, "best_share": float(best),
        "planner_to_best": round(medians["planner"] / medians[best], 4),
        "side_by_side": round(statistics.median(ours for ours, _ in again) / statistics.median(theirs for _, theirs in again), 4),
    }  # fmt: skip


def told(each: dict[str, Any]) -> str:
    """One result in a line."""
    ms = {name: f"{1e3 * seconds:7.1f}" for name, seconds in each["median_s"].items()}
    best = f"{each['best_share']:.3f}"
    return (f"{each['link_bytes_per_s'] / 1e9:4.1f} GB/s, {each['storage']:7}, {each['queries']:2} queries: planner {ms['planner']} ms; "
            f"best fixed share {best} with {ms[best]}; all in place {ms['0.000']}, all moved {ms['1.000']}; "
            f"ratio {each['planner_to_best']:.3f}, side by side {each['side_by_side']:.3f}")  # fmt: skip


def main() -> None:
    """Measure all links and batches."""
    parser = argparse.ArgumentParser(description="The planner's split of misses against a sweep.")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1e9, 0.5e9, 2e9], help="bytes a second")
    parser.add_argument("--storages", type=Storage, nargs="+", default=[Storage.FLOAT32])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    results = []
    for bytes_per_s, storage in itertools.product(options.rates, options.storages):
        for queries in options.queries:
            each = measure(bytes_per_s, storage, queries, options.rounds)
            results.append(each)
            print(told(each), flush=True)
    worst = max(each["side_by_side"] for each in results)
    print(f"the planner's split takes at most {worst:.3f} times the best of the sweep")
    if options.output:
        what = (f"Join of 64 misses over links of {', '.join(f'{rate / 1e9:g}' for rate in options.rates)} GB/s, "
                f"{' and '.join(options.storages)}, {' and '.join(map(str, options.queries))} queries: moving and scoring in place as the "
                "planner splits them, at worst")  # fmt: skip
        against = f"the best of {len(SHARES)} fixed splits, side by side"
        figures = [{"what": what, "value": f"{worst:.3f} x", "against": against, "goal": "at most 1.05 x"}]
        result = record(shlex.join(["python", *sys.argv]), figures=figures, each=results)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
