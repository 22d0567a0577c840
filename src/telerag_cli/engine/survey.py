"""What is profiled of planned parts: their identity, the link alone, and storage types that the index does not have."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telerag_cli.config import Metric, Storage
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.engine.llm_plan import PlannedLlm
from telerag_cli.engine.opened_index import OpenedIndex
from telerag_cli.engine.tier_plan import PlannedTier
from telerag_cli.errors import ResourceError
from telerag_cli.files import wrap_os_error
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generator
from telerag_cli.planning.disk import disk_points
from telerag_cli.planning.hits import Replayed, from_passages
from telerag_cli.planning.lists import scoring_rates
from telerag_cli.planning.measure import FULL_EXTENT, Subject, Sweep, measure
from telerag_cli.planning.pcie import slot_of
from telerag_cli.planning.profile import Identity, LinkPoint, Memory, Pcie, Profile, ScoringRate
from telerag_cli.planning.storages import MadeLists, make_index
from telerag_cli.planning.timing import Effort, rate
from telerag_cli.progress import Advance
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import available_bytes, hardware
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tiers.tier import FastTier

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

SCRATCH_BYTES = 256 << 20
"""A file to read from where there is no index."""
PASSAGES = "passages of the index, their first sentences as questions"
VERSIONS = ("telerag-cli", "torch", "faiss-cpu", "faiss-gpu", "llama-cpp-python")
NONE = "none"


@dataclass(frozen=True)
class Replays:
    """Questions for the hit curve, and where they are from; none for passages of the index."""

    questions: Sequence[Replayed] = ()
    source: str = PASSAGES


def identity_of(
    index: Index | None, tier_name: str, llm: PlannedLlm | None, embedder: str
) -> tuple[Identity, dict[str, str]]:
    """What a profile of these parts is of, and the versions it was made with."""
    machine = hardware()
    lists = NONE
    if index is not None:
        manifest = index.manifest
        file = manifest.files.get("lists.bin")
        made_of = f"{manifest.ntotal:,} vectors of {manifest.storage} in {manifest.nlist:,} lists"
        lists = f"{made_of}, {file.checksum if file else NONE}"
    identity = Identity(
        machine["cpu"], machine["cores"], tuple(machine["gpus"]), tier_name, lists, llm.name if llm else NONE, embedder
    )
    return identity, {name: version for name, version in machine["versions"].items() if name in VERSIONS}


def survey(
    opened: OpenedIndex,
    tier: PlannedTier,
    retriever: Retriever,
    generator: Generator,
    nprobe: int,
    replays: Replays,
    *,
    identity: Identity,
    versions: dict[str, str],
    quick: bool,
    advance: Advance,
    command: str = "",
) -> Profile:
    """Measure parts that are open: see `measure`. The arena is empty afterwards."""
    index = opened.index
    questions = replays.questions or from_passages(opened.passages, FULL_EXTENT.replayed)
    subject = Subject(
        identity,
        versions,
        links_of(tier.gpu, index.paths.lists),
        opened.embedder,
        generator,
        index,
        retriever,
        nprobe,
        questions,
        replays.source if replays.questions else PASSAGES,
        partial(_other_storages, tier.gpu, index),
        partial(memory_of, tier.gpu),
        partial(_slot, tier.gpu),
    )
    return measure(subject, quick=quick, advance=advance, command=command)


def survey_machine(
    gpu: Gpu | None,
    name: str,
    encoder: Encoder,
    llm: PlannedLlm,
    generator: Generator,
    *,
    quick: bool,
    advance: Advance,
    command: str,
) -> Profile:
    """Measure what can be without an index; the disk is that of the current folder.

    Raises:
        ResourceError: nothing can be written there.
    """
    identity, versions = identity_of(None, name, llm, embedder_name(encoder))
    left_out = (
        "Without an index, its lists, their hit rates and the coarse quantizer were not measured; name one to measure them.",
    )

    def storages(effort: Effort) -> list[ScoringRate]:
        return [
            each for storage in Storage for each in scoring_of(gpu, encoder.info.dimension, Metric.IP, storage, effort)
        ]

    with scratch_file(Path.cwd()) as file:
        subject = Subject(
            identity,
            versions,
            links_of(gpu, file),
            encoder,
            generator,
            other_storages=storages,
            memory=partial(memory_of, gpu),
            slot=partial(_slot, gpu),
            left_out=left_out,
        )
        return measure(subject, quick=quick, advance=advance, command=command)


def embedder_name(encoder: Encoder) -> str:
    """Model, fingerprint of its weights, and device."""
    return f"{encoder.info.model} ({encoder.info.weights}) on {encoder.device}"


def links_of(gpu: Gpu | None, lists: Path) -> Sweep:
    """The links from these lists: of the GPU, if there is one, and of the disk."""

    def sweep(sizes: Sequence[int], depths: Sequence[int], effort: Effort) -> Iterator[LinkPoint]:
        if gpu is not None:
            from telerag_cli.tiers.cuda.bandwidth import transfers

            for each in transfers(gpu, sizes, effort.repeats):
                figure = rate(each.count * each.nbytes, each.took_s)
                yield LinkPoint("PCIe", each.way, each.nbytes, each.depth, figure)
        yield from disk_points(lists, sizes, depths, effort)

    return sweep


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """A file to read from, for a while.

    Raises:
        ResourceError: it cannot be written there.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".telerag-profile-") as file:
            block = np.random.default_rng(0).integers(256, size=16 << 20, dtype=np.uint8).tobytes()
            for _ in range(SCRATCH_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise wrap_os_error(error, folder) from error


def memory_of(gpu: Gpu | None) -> list[Memory]:
    """What is free now."""
    found = [Memory("RAM", available_bytes())]
    return found if gpu is None else [*found, Memory(gpu.name, gpu.free_bytes())]


def rates_for_joins(profile: Profile) -> JoinRates | None:
    """What a tier that scores in place begins with; None where the profile has no such tier."""
    places = {rate.place: rate for rate in profile.scoring[:2]}
    if profile.moving is None or "in place" not in places:
        return None
    arena = places["arena"]
    in_place = places["in place"].bytes_per_s.value
    slowed = profile.joins.both_ends_slowed if profile.joins else 1.0
    return JoinRates(profile.moving.alone.value, in_place, arena.bytes_per_s.value, arena.latency_s, slowed)


def _slot(gpu: Gpu | None) -> Pcie | None:
    return slot_of(gpu.device.index or 0) if gpu is not None and gpu.device.type == "cuda" else None


def _other_storages(gpu: Gpu | None, index: Index, effort: Effort) -> list[ScoringRate]:
    """Rates of the storage types that the index does not have, from made-up lists in a tier of the same kind."""
    others = [storage for storage in Storage if storage is not index.manifest.storage]
    return [
        each
        for storage in others
        for each in scoring_of(gpu, index.manifest.dimension, index.manifest.metric, storage, effort)
    ]


def scoring_of(gpu: Gpu | None, dimension: int, metric: Metric, storage: Storage, effort: Effort) -> list[ScoringRate]:
    """Rates of one storage type, from made-up lists in a tier on this GPU, or in RAM; none if there is no room for them."""
    with tempfile.TemporaryDirectory(prefix="telerag-profile-") as folder, contextlib.suppress(ResourceError):
        made, lists = make_index(Path(folder), dimension, metric, storage)
        coarse = Coarse(made.centroids, metric)
        nbytes = int(made.list_bytes.sum())
        with contextlib.closing(_tier_over(gpu, made, lists, coarse, nbytes)) as tier:
            return scoring_rates(made, tier, effort)
    return []


def _tier_over(gpu: Gpu | None, made: Index, lists: MadeLists, coarse: Coarse, nbytes: int) -> FastTier:
    if gpu is None:
        lists.memory.tofile(made.paths.lists)
        return open_host_tier(made, coarse, nbytes)
    from telerag_cli.tiers.cuda.tier import open_cuda_tier

    return open_cuda_tier(made, coarse, gpu, nbytes, lists=lists)
