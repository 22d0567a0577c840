"""How fast one replica is in its share of a machine, while as many others as there will be do the same.

Each replica's parts are opened in a process of its own, as a replica opens them, and all processes measure the same
figure at the same time. Nothing here answers a question: what is calibrated are steps of the LLM, moves, joins and
embeddings.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from statistics import median
from threading import BrokenBarrierError
from typing import Any

import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.bench.simulating.rates import Host, Rates, rates_of
from telerag_cli.distributed.replicas import Opened, Opens, Share
from telerag_cli.errors import ResourceError, TeleragError
from telerag_cli.llm.base import Generator
from telerag_cli.planning.lists import bring, joins_of, moving_rates
from telerag_cli.planning.llm import llm_rates
from telerag_cli.planning.profile import DecodePoint, Measured, PrefillPoint
from telerag_cli.planning.timing import Effort, seconds
from telerag_cli.progress import Advance
from telerag_cli.retrieval.retriever import Retriever

EFFORT = Effort(0.2, 5, 2, 6.0)
PROMPTS = (32, 128, 512, 1024)
TOKENS = 24
"""Written for each figure of the LLM."""
WIDEST = 64
"""Texts written together at most; what more of them would take follows from the last two."""
JOINS = 6
"""Queries whose joins are timed."""
SEVERAL = 4
"""Queries scored together, to see what one more costs."""
LONGEST_S = 300.0
"""For which one process waits for the others at most."""


@dataclass(frozen=True)
class Calibration:
    """One replica beside ``replicas - 1`` busy ones: medians over all of them."""

    replicas: int
    threads: int
    at_once: int
    arena_bytes: int
    depth: int
    tier: str
    rates: Rates
    links_bytes_per_s: float
    """Of all links together."""

    def described(self) -> dict[str, Any]:
        """For a result's settings."""
        rates = self.rates
        return {
            "threads": self.threads,
            "prefill_s": {str(point.tokens): _short(point.took_s.value) for point in rates.llm.prefill},
            "step_s": {str(point.width): _short(point.step_s.value) for point in rates.llm.decode},
            "context_step_s": _short(rates.llm.context_step_s),
            "link_bytes_per_s": _short(rates.link_bytes_per_s),
            "links_together_bytes_per_s": _short(self.links_bytes_per_s),
            "link_beside_llm_share": _short(rates.beside_llm),
            "decoding_slowed": _short(rates.decoding_slowed),
            "scored_bytes_per_s": _short(rates.scored_bytes_per_s),
            "another_query_share": _short(rates.another_query),
            "in_place_bytes_per_s": _short(rates.in_place_bytes_per_s),
            "join_s": _short(rates.join_s),
            "query_s": _short(rates.query_s),
            "sketch_s": _short(rates.sketch_s),
        }


def host_of(alone: Calibration, together: Calibration) -> tuple[Rates, Host]:
    """A replica's rates among busy ones, and what they share: a link alone may be faster than when all are used.

    Args:
        alone: one replica.
        together: as many as a host has.
    """
    link = max(alone.rates.link_bytes_per_s, together.rates.link_bytes_per_s)
    slow = max(together.links_bytes_per_s, link)
    return replace(together.rates, link_bytes_per_s=link), Host(together.replicas, slow)


@dataclass(frozen=True)
class Kind:
    """What of a replica cannot be measured."""

    chunk: int
    """Prompt tokens that its LLM reads in a step."""
    llm_apart: bool
    """Whether the LLM runs on something else than embedding and scoring do."""


def calibrate(
    opens: Opens, share: Share, replicas: int, kind: Kind, texts: Sequence[str], advance: Advance
) -> Calibration:
    """Measure replicas side by side.

    Args:
        opens: what each is made from.
        share: what each has of this machine.
        replicas: how many.
        kind: what they are like.
        texts: what is searched for when joins are timed.
        advance: told of each figure.

    Raises:
        TeleragError: one of them could not be opened or measured.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(replicas)
    processes, pipes = [], []
    for number in range(replicas):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (opens, share, kind, tuple(texts), barrier, theirs)
        process = context.Process(target=_measure_apart, args=arguments, daemon=True)
        with _environment(share, number):
            process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        found = _collect(pipes, advance)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return _middle(found, share.threads)


@contextlib.contextmanager
def _environment(share: Share, number: int) -> Iterator[None]:
    """What starts inside the block sees what Ray lets a replica see: so many threads by default, and a GPU of its own."""
    wanted = {"OMP_NUM_THREADS": str(share.threads)}
    if share.gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        wanted["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _collect(pipes: Sequence[Connection], advance: Advance) -> list[Calibration]:
    """What the processes found; the first error of any ends all."""
    found: list[Calibration] = []
    left = list(pipes)
    while left:
        for pipe in wait(left):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except EOFError:
                # Its error, or that of the one it waited for, comes from somebody; without any it was ended from
                # outside.
                left.remove(pipe)
                continue
            match said:
                case TeleragError():
                    raise said
                case Calibration():
                    found.append(said)
                    left.remove(pipe)
                case int():
                    advance(said)
    if len(found) < len(pipes):
        raise ResourceError(
            "A process that measured a replica's share was ended from outside.",
            remedy="Run the same command again, with more memory free.",
        )
    return found


def _measure_apart(
    opens: Opens, share: Share, kind: Kind, texts: Sequence[str], barrier: Barrier, pipe: Connection
) -> None:
    """The process: sends how many figures it has, and at the end all of them or the error."""

    def together() -> None:
        pipe.send(1)
        barrier.wait(LONGEST_S)

    try:
        opened = opens.open(share)
        with contextlib.closing(opened.worker.engine):
            pipe.send(_measure(opened, share, kind, texts, together))
    except TeleragError as error:
        barrier.abort()  # nobody waits for one that will not come
        pipe.send(error)
    except BrokenBarrierError:
        pass  # who broke it says why
    finally:
        pipe.close()


def _measure(
    opened: Opened, share: Share, kind: Kind, texts: Sequence[str], together: Callable[[], None]
) -> Calibration:
    engine = opened.worker.engine
    generator, retriever, embedder, nprobe = (
        engine.generator,
        engine.retriever,
        engine.embedder,
        engine.settings.nprobe,
    )
    tier = retriever.tier
    together()
    llm = llm_rates(generator, PROMPTS, _widths(generator), TOKENS, EFFORT, lambda _count: None)
    together()
    moving = moving_rates(retriever, generator, 2 * TOKENS, EFFORT)
    together()
    queries = embedder.encode_queries(texts[: JOINS + 1])
    joins = joins_of(retriever, queries, nprobe)
    together()
    another = _another_query(retriever, queries, nprobe)
    together()
    query_s, sketch_s = (_embedding_s(embed, texts[0]) for embed in (embedder.encode_queries, embedder.embed_approx))
    together()
    rates = rates_of(
        llm,
        moving,
        joins,
        slots=generator.parallel,
        chunk=kind.chunk,
        llm_apart=kind.llm_apart,
        another_query=another,
        scores_in_place=tier.in_place is not None,
        query_s=query_s,
        sketch_s=sketch_s,
    )
    return Calibration(
        share.on_its_machine,
        share.threads,
        opened.worker.at_once,
        tier.arena_bytes,
        tier.depth,
        opened.tier,
        rates,
        rates.link_bytes_per_s,
    )


def _embedding_s(embed: Callable[[Sequence[str]], FloatArray], text: str) -> float:
    return seconds(lambda: embed([text]), EFFORT).value


def _widths(generator: Generator) -> tuple[int, ...]:
    """Texts written together: powers of two, and as many as there can be."""
    most = min(generator.parallel, WIDEST)
    return tuple(sorted({*(1 << place for place in range(most.bit_length())), most}))


def _another_query(retriever: Retriever, queries: FloatArray, nprobe: int) -> float:
    """What scoring the same lists for one more query costs, as a share of the first."""
    tier = retriever.tier
    several = queries[:SEVERAL]
    if len(several) < 2:
        return 1.0
    lists = retriever.order(several[:1])[:nprobe]
    ends = np.cumsum(tier.list_bytes[lists])
    lists = lists[ends <= tier.arena_bytes // 2]
    if not len(lists):
        return 1.0
    bring(tier, lists)
    pinned = tier.pin(lists.tolist(), lambda _lists, _error: None, move=False)
    held: IntArray = np.array(pinned.hits, np.int64)

    def score_s(count: int) -> float:
        return seconds(lambda: tier.score(several[:count], np.tile(held, (count, 1)), 5), EFFORT).value

    try:
        one_s, several_s = score_s(1), score_s(len(several))
    finally:
        tier.release(pinned.hits)
        tier.forget()
    return min(max((several_s / one_s - 1) / (len(several) - 1), 0.0), 1.0)


def _middle(found: Sequence[Calibration], threads: int) -> Calibration:
    """Medians over the replicas; rates of links are added up besides."""
    several = [each.rates for each in found]

    def of(name: str) -> float:
        return median(float(getattr(rates, name)) for rates in several)

    # Where one was stopped at a prompt that takes too long, the others' longer ones are left out too.
    prefill = tuple(
        PrefillPoint(round(median(point.tokens for point in points)), _median([point.took_s for point in points]))
        for points in zip(*(rates.llm.prefill for rates in several), strict=False)
    )
    decode = tuple(
        DecodePoint(points[0].width, _median([point.step_s for point in points]))
        for points in zip(*(rates.llm.decode for rates in several), strict=True)
    )
    context_step_s = median(rates.llm.context_step_s for rates in several)
    rates = replace(
        several[0],
        llm=replace(several[0].llm, prefill=prefill, decode=decode, context_step_s=context_step_s),
        link_bytes_per_s=of("link_bytes_per_s"),
        beside_llm=of("beside_llm"),
        transfer_s=of("transfer_s"),
        decoding_slowed=of("decoding_slowed"),
        scored_bytes_per_s=of("scored_bytes_per_s"),
        another_query=of("another_query"),
        in_place_bytes_per_s=of("in_place_bytes_per_s"),
        join_s=of("join_s"),
        query_s=of("query_s"),
        sketch_s=of("sketch_s"),
    )
    return replace(
        found[0],
        replicas=len(found),
        threads=threads,
        rates=rates,
        at_once=min(each.at_once for each in found),
        arena_bytes=min(each.arena_bytes for each in found),
        links_bytes_per_s=sum(each.rates.link_bytes_per_s for each in found),
    )


def _median(figures: Sequence[Measured]) -> Measured:
    value, low, high = (median(getattr(each, name) for each in figures) for name in ("value", "low", "high"))
    return Measured(value, low, high, sum(each.repeats for each in figures))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
