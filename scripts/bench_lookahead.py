"""Retrieval hidden behind an LLM: HyDE over an index larger than its fast memory, cold, several systems side by side.

    python scripts/bench_lookahead.py INDEX --questions FILE [--nprobe 256] [--fast-memory 2GiB] [-o RESULT.json]

Each question is answered by every system in turn, in an order that rotates, with the same LLM, prompts and probes. Before each, the index
file is dropped from the page cache (and the share still in it is measured), and the arena starts empty: no system has a cache from before.

    faiss-ondisk  Faiss, memory-mapped OnDiskInvertedLists over the same lists.bin, parallel_mode=1, all cores
    off           telerag without lookahead: lists are read when the query is there
    question      lookahead by the question alone, as the paper has it
    refined       lookahead by the question and the text written so far: the default
    useless       lookahead by a random query: what a wrong prediction costs
    llm-only      the same LLM calls without retrieval: what is left when retrieval takes no time
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import mmap
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from telerag_cli.bench_record import record
from telerag_cli.config import Lookahead, TierKind, parse_bytes
from telerag_cli.engine.assemble import Opened, open_index, open_retriever
from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.engine.placement import TierOptions, plan_tier
from telerag_cli.engine.questions import read_questions
from telerag_cli.engine.session import Settings
from telerag_cli.generation.base import Generator, Request
from telerag_cli.generation.llama_model import LlamaModel
from telerag_cli.generation.llamacpp import LlamaCpp
from telerag_cli.generation.models import resolve_model
from telerag_cli.index.artifact import FloatArray, Index
from telerag_cli.index.scoring import Coarse, empty_ivf
from telerag_cli.lookahead.retriever import Found, JoinReport, Retriever, Search
from telerag_cli.lookahead.round import Round
from telerag_cli.pipelines.hyde import PASSAGE_TOKENS, hyde, hypothetical_passage
from telerag_cli.pipelines.prompts import answer_prompt
from telerag_cli.tiers.base import FastTier
from telerag_cli.tiers.cache import CacheKind

SYSTEMS = ("faiss-ondisk", "off", "question", "refined", "useless", "llm-only")


class FaissOnDisk(Retriever):
    """Faiss's own memory-mapped lists behind the retriever's interface; mapped anew for each question, so that it is cold."""

    def __init__(self, index: Index, coarse: Coarse, tier: FastTier) -> None:
        super().__init__(index, coarse, tier)
        self._quantizer = coarse
        self._ivf: Any = None
        self._lists: Any = None

    def unmap(self) -> None:
        """Let go of the mapping: mapped pages stay in the page cache whatever is asked."""
        self._ivf = self._lists = None

    def map_again(self) -> None:
        """Build an index whose lists are the file, mapped read-only."""
        manifest = self.index.manifest
        ivf = empty_ivf(
            self._quantizer.index,
            manifest.dimension,
            manifest.nlist,
            manifest.metric,
            manifest.storage,
            self.index.trained,
        )
        # Faiss opens the file with its lists' places already known.
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size, lists.read_only = manifest.nlist, manifest.code_size, True
        lists.filename = os.fspath(self.index.paths.lists)
        lists.totsize = self.index.paths.lists.stat().st_size
        lists.lists.resize(manifest.nlist)
        address = int(lists.lists.data().this)
        table = np.ctypeslib.as_array((ctypes.c_uint64 * (3 * manifest.nlist)).from_address(address)).reshape(
            -1, 3
        )
        table[:] = self.index.table
        lists.do_mmap()
        ivf.replace_invlists(lists, False)
        ivf.ntotal = manifest.ntotal
        ivf.parallel_mode = 1
        self._ivf, self._lists = ivf, lists

    def search_together(self, searches: Sequence[Search], k: int, nprobe: int) -> list[Found]:
        """Faiss's search, timed, one after the other."""
        return [self._search(search.queries, k, nprobe) for search in searches]

    def _search(self, queries: FloatArray, k: int, nprobe: int) -> Found:
        started_s = time.perf_counter()
        self._ivf.nprobe = nprobe
        scores, rows = self._ivf.search(queries, k)
        took_s = time.perf_counter() - started_s
        probes = np.unique(self._quantizer.probe(queries, nprobe)[1])
        wanted = int(self.index.extents[probes].sum())
        zeros = dict.fromkeys(JoinReport.count_names(), 0)
        report = JoinReport(**zeros | {"lists_wanted": len(probes), "lists_missed": len(probes), "bytes_wanted": wanted,
                                       "bytes_missed": wanted}, coarse_s=0.0, score_s=0.0, join_s=took_s, window=None)  # fmt: skip
        return Found(scores, rows, report)


class Useless(Retriever):
    """Lookahead that follows a random direction."""

    random = np.random.default_rng(0)

    def begin(self, queries: FloatArray, nprobe: int, *, refining: bool = False) -> Round:
        """Start lookahead for anything but these queries."""
        anything = self.random.standard_normal(queries.shape, dtype=np.float32)
        return super().begin(anything, nprobe, refining=refining)


def forget(path: Path) -> float:
    """Drop a file from the page cache; the share of it that is still there."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as view:
            pages = -(-size // mmap.PAGESIZE)
            here = (ctypes.c_ubyte * pages)()
            address = np.frombuffer(view, np.uint8).ctypes.data
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), here):
                raise OSError(ctypes.get_errno(), "mincore")
            return float((np.ctypeslib.as_array(here) & 1).mean())


async def llm_only(
    generator: Generator, question: str, answered: Answered, settings: Settings
) -> dict[str, float]:
    """The LLM calls of an answered question, with nothing between them."""
    started_s = time.perf_counter()
    await generator.generate(Request(hypothetical_passage(question), PASSAGE_TOKENS))
    passage_s = time.perf_counter() - started_s
    kept = answered.found[: len(answered.found) - answered.dropped_passages]
    await generator.generate(Request(answer_prompt(question, kept), settings.max_tokens))
    return {"total_s": time.perf_counter() - started_s, "passage_s": passage_s, "retrieval_s": 0.0}


def measure(
    opened: Opened, generator: LlamaCpp, settings: Settings, arena_bytes: int, questions: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry a question: what each system took and found."""
    lists = opened.index.paths.lists
    options = TierOptions(TierKind.HOST, fast_memory_bytes=arena_bytes, cache=CacheKind.NONE)
    base = open_retriever(opened.index, plan_tier(opened.index, options))
    coarse = Coarse(opened.index.centroids, opened.index.manifest.metric)
    mapped = FaissOnDisk(opened.index, coarse, base.tier)
    kinds: dict[str, tuple[Retriever, Lookahead]] = {
        "faiss-ondisk": (mapped, Lookahead.OFF), "off": (base, Lookahead.OFF), "question": (base, Lookahead.QUESTION),
        "refined": (base, Lookahead.REFINED), "useless": (Useless(opened.index, coarse, base.tier), Lookahead.QUESTION),
    }  # fmt: skip
    engines = {name: Engine(generator, opened.embedder, retriever, opened.passages, replace(settings, lookahead=mode))
               for name, (retriever, mode) in kinds.items()}  # fmt: skip
    results = []
    with asyncio.Runner() as runner:
        runner.run(engines["refined"].ask(hyde, questions[0]))  # warm-up: models, threads, pages of the arena
        for number, question in enumerate(questions):
            entry: dict[str, Any] = {"question": question}
            answers = {}
            answered: Answered | None = None
            turn = SYSTEMS[number % len(SYSTEMS) :] + SYSTEMS[: number % len(SYSTEMS)]
            for name in turn:
                mapped.unmap()
                generator.forget()  # prompts kept of one system would make the next one quicker
                cached = forget(lists)
                if name == "llm-only":
                    # It needs the passages, which the first system of this question has found; not measured if it is first.
                    known = answered or runner.run(engines["refined"].ask(hyde, question))
                    entry[name] = runner.run(llm_only(generator, question, known, settings))
                    continue
                if name == "faiss-ondisk":
                    mapped.map_again()
                answered = runner.run(engines[name].ask(hyde, question))
                answers[name] = (answered.answer, [hit.passage.id for hit in answered.found])
                join = answered.joins[0]
                timings = {key: round(value, 5) for key, value in answered.timings.items()}
                entry[name] = timings | join.counts() | {"cached": round(cached, 5)}
            entry["same_answers"] = len({answer for answer, _ids in answers.values()}) == 1
            entry["same_passages"] = len({tuple(ids) for _answer, ids in answers.values()}) == 1
            results.append(entry)
            print(f"{number + 1:3}/{len(questions)}  " + "  ".join(
                f"{name} {entry[name]['total_s']:.2f}/{entry[name]['retrieval_s']:.3f}" for name in SYSTEMS), file=sys.stderr)  # fmt: skip
    base.close()
    return results


def ratio(results: Sequence[dict[str, Any]], over: str, under: str, what: str) -> dict[str, float]:
    """Median of the ratio pair by pair with its quartiles, and the ratio of the medians."""
    pairs = [entry[over][what] / entry[under][what] for entry in results]
    low, middle, high = statistics.quantiles(pairs, n=4)
    medians = [statistics.median(entry[name][what] for entry in results) for name in (over, under)]
    return {
        "median": round(middle, 4),
        "q1": round(low, 4),
        "q3": round(high, 4),
        "of_medians": round(medians[0] / medians[1], 4),
    }


def figures(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the README."""
    p50, ratios, hit = summary["p50"], summary["ratios"], summary["hit_share"]
    size = (
        f"{summary['nprobe']} of {summary['nlist']:,} lists of a {summary['index_bytes'] / 1e9:.1f} GB index"
    )
    setting = f"{size}, {summary['k']} passages, answers up to {summary['max_tokens']} tokens, arena {summary['arena']}, cold"
    return [
        {"what": f"Retrieval stage, p50 of {summary['questions']} HyDE questions, {setting}",
         "value": f"{p50['refined']['retrieval_s'] * 1e3:.0f} ms ({ratios['retrieval faiss-ondisk / refined']['median']:.1f} x)",
         "against": f"Faiss OnDiskInvertedLists, memory-mapped, parallel_mode=1: {p50['faiss-ondisk']['retrieval_s'] * 1e3:.0f} ms; "
                    f"without lookahead: {p50['off']['retrieval_s'] * 1e3:.0f} ms", "goal": "at least 8 x"},
        {"what": "The same, end to end",
         "value": f"{p50['refined']['total_s']:.2f} s ({ratios['end to end faiss-ondisk / refined']['median']:.2f} x)",
         "against": f"the same Faiss: {p50['faiss-ondisk']['total_s']:.2f} s", "goal": "at least 1.4 x"},
        {"what": "The same, against the LLM's own time",
         "value": f"{ratios['end to end refined / llm-only']['median']:.3f} x",
         "against": f"the same LLM calls and no retrieval: {p50['llm-only']['total_s']:.2f} s", "goal": "at most 1.05 x"},
        {"what": "A useless prediction, end to end", "value": f"{ratios['end to end useless / off']['median']:.3f} x",
         "against": "no lookahead", "goal": "at most 1.05 x"},
        {"what": "Probed lists in fast memory when the query arrives", "value": f"{hit['refined']:.0%}",
         "against": f"question only: {hit['question']:.0%}", "goal": ""},
    ]  # fmt: skip


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--nprobe", type=int, default=256)
    parser.add_argument("-k", type=int, default=3)
    parser.add_argument("--fast-memory", default="2GiB")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    with options.questions.open("rb") as lines:
        questions = [question.text for question in read_questions(lines, str(options.questions))][
            : options.limit
        ]
    opened = open_index(Index.open(options.index), None)
    generator = LlamaCpp(LlamaModel(resolve_model(None, None)))
    settings = Settings(options.k, options.nprobe, Lookahead.OFF, options.max_tokens)
    results = measure(opened, generator, settings, parse_bytes(options.fast_memory), questions)
    generator.close()

    p50 = {name: {what: round(statistics.median(entry[name][what] for entry in results), 4) for what in ("retrieval_s", "total_s")}
           for name in SYSTEMS}  # fmt: skip
    hit = {name: round(sum(e[name]["lists_hit"] for e in results) / sum(e[name]["lists_wanted"] for e in results), 4)
           for name in ("off", "question", "refined", "useless")}  # fmt: skip
    manifest = opened.index.manifest
    summary = {
        "p50": p50,
        "hit_share": hit,
        "ratios": {
            "retrieval faiss-ondisk / refined": ratio(results, "faiss-ondisk", "refined", "retrieval_s"),
            "end to end faiss-ondisk / refined": ratio(results, "faiss-ondisk", "refined", "total_s"),
            "end to end refined / llm-only": ratio(results, "refined", "llm-only", "total_s"),
            "end to end useless / off": ratio(results, "useless", "off", "total_s"),
            "end to end question / refined": ratio(results, "question", "refined", "total_s"),
        },
        "same_answers": sum(entry["same_answers"] for entry in results),
        "same_passages": sum(entry["same_passages"] for entry in results),
        "largest_cached_share": max(entry[name]["cached"] for entry in results for name in SYSTEMS if name != "llm-only"),
        "questions": len(results),
        "index_bytes": int(opened.index.extents.sum()),
        "p50_passage_s": {name: round(statistics.median(entry[name]["passage_s"] for entry in results), 4)
                          for name in SYSTEMS},
        "k": options.k, "max_tokens": options.max_tokens, "passage_tokens": PASSAGE_TOKENS,
        "nlist": manifest.nlist, "nprobe": options.nprobe, "ntotal": manifest.ntotal, "arena": options.fast_memory,
        "generator": generator.name,
    }  # fmt: skip
    print(f"{'p50':14} {'retrieval s':>12} {'end to end s':>13} {'hit share':>10}")
    for name in SYSTEMS:
        share = f"{hit[name]:10.2f}" if name in hit else ""
        print(f"{name:14} {p50[name]['retrieval_s']:12.4f} {p50[name]['total_s']:13.3f} {share}")
    for name, values in summary["ratios"].items():
        print(
            f"{name:36} {values['median']:.3f}  (quartiles {values['q1']:.3f} to {values['q3']:.3f}; of medians {values['of_medians']:.3f})"
        )
    print(f"same answers {summary['same_answers']}/{len(results)}, same passages {summary['same_passages']}/{len(results)}, "
          f"at most {summary['largest_cached_share']:.2%} of the index in the page cache")  # fmt: skip
    if options.output:
        result = record(shlex.join(["python", *sys.argv]), **summary, figures=figures(summary), each=results)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
