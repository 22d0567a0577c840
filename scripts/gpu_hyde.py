"""The stage of gpu_check.py that measures whole questions: HyDE over a datastore in host memory, and the join alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gpu_stages import Outcome, Row, median, timed
from make_synthetic import Datastore
from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import CacheKind, Storage
from telerag_cli.index.scoring import ListScorer
from telerag_cli.prefetch.order import blend
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import available_bytes
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from gpu_check import Bench

K = 10
REFINED_AT = (0.25, 0.5, 0.75)
Search = Callable[[FloatArray], tuple[FloatArray, IntArray]]
SYSTEMS = {
    "faiss": "Faiss on all cores",
    "off": "no lookahead",
    "question": "lookahead by the question",
    "refined": "refined lookahead",
}


def end_to_end(bench: Bench) -> Outcome:
    """Replay HyDE by several systems in turn, and compare joins."""
    llm, gpu, options = bench.llm, bench.gpu, bench.options  # the LLM before the arena takes its memory
    asked = options.bytes or (bench.sizes.moved_bytes if bench.simulated else min(60 * 10**9, available_bytes() // 2))
    store = Datastore.near(bench.material.base, asked, bench.sizes.list_bytes, Storage(options.storage))
    index, coarse = store.index, store.coarse
    nprobe = options.nprobe or max(1, index.manifest.nlist // 16)
    texts = bench.material.written[1.0][:32]
    probed = np.median([index.list_bytes[coarse.probe(text[None], nprobe)[1][0]].sum() for text in texts])
    arena_bytes = options.arena or min(len(store.memory) // 4, gpu.free_bytes() * 3 // 4)
    tier = open_cuda_tier(index, coarse, gpu, arena_bytes, cache=CacheKind.NONE, lists=store)
    retriever = Retriever(index, coarse, tier)
    # Faiss over the same lists in host memory, all cores: its best.
    scorer = ListScorer.over(store.memory, index, coarse)
    scorer.table[:] = index.table

    def in_memory(queries: FloatArray) -> tuple[FloatArray, IntArray]:
        return scorer.score(queries, coarse.probe(queries, nprobe)[1], K)

    try:
        outcome = Outcome(
            f"{nprobe} of {index.manifest.nlist:,} lists of {format_bytes(len(store.memory))} "
            f"{index.manifest.storage}, "
            f"{format_bytes(int(probed))} probed, arena {format_bytes(tier.arena_bytes)}, {bench.material.source} "
            f"embeddings, {llm.name}"
        )
        outcome.raw = {"setting": outcome.setting, "notes": tier.notes}
        _joins(bench, retriever, in_memory, nprobe, outcome)
        _hyde(bench, retriever, in_memory, nprobe, outcome)
    finally:
        scorer.close()
        retriever.close()
    return outcome


def _joins(bench: Bench, retriever: Retriever, in_memory: Search, nprobe: int, outcome: Outcome) -> None:
    """Compare the join with nothing in the arena with its two extremes."""
    took: dict[str, list[float]] = {"faiss": [], "move-all": [], "join": [], "in_place_share": []}
    place = retriever.tier.in_place
    queries = bench.material.written[1.0]
    until_s = time.monotonic() + 0.3 * (bench.stage_ends_s - time.monotonic())
    for number in range(4 * bench.sizes.questions):
        query = queries[number % len(queries)][None]
        took["faiss"].append(timed(partial(in_memory, query)))
        retriever.tier.in_place = None
        took["move-all"].append(retriever.search(query, K, nprobe).report.join_s)
        retriever.tier.in_place = place
        report = retriever.search(query, K, nprobe).report
        took["join"].append(report.join_s)
        took["in_place_share"].append(report.lists_in_place / max(report.lists_wanted, 1))
        if time.monotonic() > until_s:
            break
    found = {name: median(values) for name, values in took.items()}
    ratio = found["join"] / min(found["faiss"], found["move-all"])
    outcome.raw["joins"] = found | {"searches": len(took["join"]), "ratio_to_better": ratio}
    ms = {name: f"{value * 1e3:.3g} ms" for name, value in found.items()}
    value = f"{ms['join']} ({ratio:.2f} x the better)"
    against = f"Faiss on all cores: {ms['faiss']}; moving everything: {ms['move-all']}"
    what = f"Join with nothing in the arena, p50 of {len(took['join'])}"
    outcome.rows.append(Row(what, value, against, "at most 1.05 x", ratio <= 1.05))


def _hyde(bench: Bench, retriever: Retriever, in_memory: Search, nprobe: int, outcome: Outcome) -> None:
    """Passage, retrieval, answer: each question by every system, in an order that rotates."""
    sizes, material, write = bench.sizes, bench.material, bench.llm.write
    figures: dict[str, dict[str, list[float]]] = {
        name: {"total_s": [], "retrieval_s": [], "hit_share": []} for name in SYSTEMS
    }
    same, count, names = True, 0, list(SYSTEMS)
    write("Warm up.", 4)

    def answer(name: str, number: int) -> tuple[bytes, bytes]:
        """Answer one question by one system, and return what was found."""
        final, took = material.written[1.0][number][None], figures[name]
        started_s = time.perf_counter()
        embedded: list[Future[None]] = []
        due = list(REFINED_AT) if name == "refined" else []
        ahead = None
        if name in ("question", "refined"):
            ahead = retriever.prefetch(material.question[number][None], nprobe, refining=name == "refined")

        def on_count(count: int) -> None:
            while due and count >= due[0] * sizes.passage_tokens:
                assert ahead is not None
                share = due.pop(0)
                query = blend(material.question[number], material.written[share][number], share)[None]
                embedded.append(refinement_embedder.submit(retriever.refine, ahead, query, nprobe, share))

        write(f"Write a passage that answers question {number}.", sizes.passage_tokens, on_count)
        arrived_s = time.perf_counter()
        if name == "faiss":
            scores, rows = in_memory(final)
            took["hit_share"].append(0.0)
        else:
            found = retriever.search(final, K, nprobe, ahead)
            scores, rows = found.scores, found.rows
            took["hit_share"].append(found.report.lists_hit / max(found.report.lists_wanted, 1))
        took["retrieval_s"].append(time.perf_counter() - arrived_s)
        passages = "What was found says this and that. " * (sizes.prompt_words // 7)
        write(f"{passages} Answer question {number}.", sizes.answer_tokens)
        took["total_s"].append(time.perf_counter() - started_s)
        for each in embedded:
            each.result()
        return scores.tobytes(), rows.tobytes()

    with ThreadPoolExecutor(1) as refinement_embedder:
        for number in range(min(sizes.questions, len(material.question))):
            first = number % len(names)
            same &= len({answer(name, number) for name in names[first:] + names[:first]}) == 1
            count += 1
            if bench.late:
                break
    outcome.wrong |= not same
    medians = {name: {what: median(values) for what, values in each.items()} for name, each in figures.items()}
    about = {"passage_tokens": sizes.passage_tokens, "answer_tokens": sizes.answer_tokens}
    outcome.raw["hyde"] = medians | {"questions": count, "same_results": same, **about}
    faiss = medians["faiss"]
    for name in names[1:]:
        whole, part = (
            median([one / other for one, other in zip(figures["faiss"][what], figures[name][what], strict=True)])
            for what in ("total_s", "retrieval_s")
        )
        ours = medians[name]
        value = (
            f"retrieval {1e3 * ours['retrieval_s']:.3g} ms ({part:.2f} x), whole {ours['total_s']:.3g} s "
            f"({whole:.2f} x), {ours['hit_share']:.0%} of the lists there"
        )
        against = f"{SYSTEMS['faiss']}: {1e3 * faiss['retrieval_s']:.3g} ms, {faiss['total_s']:.3g} s"
        outcome.rows.append(Row(f"HyDE, {SYSTEMS[name]}, p50 of {count}", value, against))
