"""Profiling parts that are planned or open: what they are, and what of them is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telerag_cli.embedding.encoder import Encoder
from telerag_cli.engine.llm_plan import PlannedLlm
from telerag_cli.engine.opened_index import OpenedIndex
from telerag_cli.index.artifact import Index
from telerag_cli.llm.base import Generator
from telerag_cli.planning.hits import Replayed, from_passages
from telerag_cli.planning.links import scratch_file
from telerag_cli.planning.measure import FULL, ProfileSubject, measure
from telerag_cli.planning.profile import Identity, Profile
from telerag_cli.progress import Advance
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.system import hardware
from telerag_cli.tiers.rates import JoinRates

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

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
    """Return what a profile of these parts is of, and the versions it is made with."""
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


def subject_of(
    opened: OpenedIndex,
    gpu: Gpu | None,
    retriever: Retriever,
    generator: Generator,
    nprobe: int,
    identity: tuple[Identity, dict[str, str]],
    replays: Replays = Replays(),
) -> ProfileSubject:
    """Return what `measure` needs of parts that are open; the arena is empty afterwards."""
    questions = replays.questions or from_passages(opened.passages, FULL.replayed)
    source = replays.source if replays.questions else PASSAGES
    lists = opened.index.paths.lists
    return ProfileSubject(*identity, gpu, lists, opened.embedder, generator, retriever, nprobe, questions, source)


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
    left_out = ("Name an index to measure its lists, their hit rates and the coarse quantizer as well.",)
    with scratch_file(Path.cwd()) as file:
        subject = ProfileSubject(identity, versions, gpu, file, encoder, generator, left_out=left_out)
        return measure(subject, quick=quick, advance=advance, command=command)


def embedder_name(encoder: Encoder) -> str:
    """Return model, fingerprint of its weights, and device."""
    return f"{encoder.info.model} ({encoder.info.weights}) on {encoder.device}"


def rates_for_joins(profile: Profile) -> JoinRates | None:
    """Return the rates with which a tier that scores in place starts; None where the profile has no such tier."""
    places = {rate.place: rate for rate in profile.scoring[:2]}
    if profile.moving is None or "in place" not in places:
        return None
    arena, in_place = places["arena"], places["in place"].bytes_per_s.value
    slowed = profile.joins.both_ends_slowed if profile.joins else 1.0
    return JoinRates(profile.moving.alone.value, in_place, arena.bytes_per_s.value, arena.latency_s, slowed)
