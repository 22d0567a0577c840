"""Opening what searching and answering need, in the order that fails soonest: index, embedder, LLM, arena.

`Engine.open` is the only way in, for commands, the server, benchmarks and replicas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telerag_cli.config import NONE, EngineConfig, GeneratorKind
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.engine.memory_plan import PlannedLlm, PlannedTier, Row, plan_llm, plan_tier
from telerag_cli.errors import ArtifactError, ModelError, ResourceError, TeleragError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generation, Generator, Message, OnText, Request
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.hits import Replayed, from_passages
from telerag_cli.planning.links import scratch_file
from telerag_cli.planning.measure import FULL, ProfileSubject, measure
from telerag_cli.planning.profile import Identity, Profile, kept_in
from telerag_cli.progress import Advance, silent
from telerag_cli.retrieval.retriever import Retriever, search_depth
from telerag_cli.setting import AUTO
from telerag_cli.system import available_bytes, hardware
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

PASSAGES = "passages of the index, their first sentences as questions"
VERSIONS = ("telerag-cli", "torch", "faiss-cpu", "faiss-gpu", "llama-cpp-python")


class Reporter:
    """What a person is told while an engine opens and works; this one tells nothing."""

    def say(self, message: str) -> None:
        """Something worth knowing."""

    def warn(self, message: str) -> None:
        """Something that is not as it was asked for."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """A plan, before it is carried out."""

    def progress(self, description: str, total: int | None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """A stage of ``total`` units, while the block runs."""
        return silent(description, total, unit=unit)


SILENT = Reporter()


class SearchOnly:
    """The generator of an engine that was opened to search only: it refuses to write."""

    name, context_tokens, parallel = "none", 0, 1

    def count_tokens(self, _messages: Sequence[Message]) -> int:
        """See `Generator`; there is nothing to count with."""
        return 0

    async def generate(self, _request: Request, _on_text: OnText | None = None) -> Generation:
        """See `Generator`; always raises UsageError."""
        raise UsageError(
            "This engine was opened without an LLM.", remedy="Open it with generate=True to ask questions."
        )

    def forget(self) -> None:
        """See `Generator`."""

    def close(self) -> None:
        """See `Generator`."""


@dataclass(frozen=True)
class OpenedIndex:
    """An index with its passages and the embedder of its questions."""

    index: Index
    passages: Passages
    embedder: Encoder


def index_passages(index: Index) -> Passages:
    """The passages of an opened index; raises ArtifactError if they are damaged or not as many as its vectors."""
    return Passages.open(index.held(index.paths.passages), index.manifest.ntotal, index.batch_checksums)


def open_index(index: Index, embedder: str | None, device: str = AUTO) -> OpenedIndex:
    """Open an index's passages and the embedder that its manifest names, or the one named here.

    Raises:
        ArtifactError: the index is damaged.
        ModelError: no embedder is known, or its vectors are of another dimension.
    """
    root = index.paths.root
    passages = index_passages(index)
    name = embedder or index.manifest.embedder.model
    if name is None:
        raise ModelError(f"{root} does not say which model made its vectors.", remedy="Name it with --embedder.")
    try:
        encoder = Encoder.load(name, device=device, fetch=embedder is not None)
    except ModelError as error:
        if embedder is not None:
            raise
        # A file that somebody made does not decide which repositories this machine asks for.
        raise ModelError(
            f"{root} names the embedder {name}, and it cannot be loaded from this machine: {error.message}",
            remedy=f"Fetch it with --embedder {name}, or name another.",
        ) from error
    if encoder.info.dimension != index.manifest.dimension:
        raise ModelError(
            f"{name} makes vectors of {encoder.info.dimension} dimensions, and {root} has {index.manifest.dimension}.",
            remedy="Name the model that made them with --embedder.",
        )
    return OpenedIndex(index, passages, encoder)


@dataclass(frozen=True)
class Prepared:
    """An index with its embedder, and the memory that the rest will take: planned, not taken."""

    opened: OpenedIndex
    tier: PlannedTier
    llm: PlannedLlm | None
    k: int
    nprobe: int

    @property
    def identity(self) -> tuple[Identity, dict[str, str]]:
        """What a profile of these parts is of, and the versions of the libraries."""
        return identity_of(self.opened.index, self.tier.name, self.llm, embedder_name(self.opened.embedder))


def prepare(
    config: EngineConfig,
    reporter: Reporter = SILENT,
    *,
    opened: OpenedIndex | None = None,
    sharers: int = 1,
    generate: bool = True,
) -> Prepared:
    """Open index, passages and embedder, if they are not open already, and plan and show the memory of the rest.

    ``sharers`` processes plan to share this machine's memory, this one included. An LLM is planned if ``generate``.

    Raises:
        TeleragError: something is missing, does not fit, or contradicts something else.
    """
    index = opened.index if opened else Index.open(config.index)
    k, nprobe = search_depth(index, config)
    tier = plan_tier(index, config)
    llm = plan_llm(config, tier, reporter.warn, sharers) if generate else None
    opened = opened or open_index(index, config.embedder, config.device)
    free = ("free", "RAM", format_bytes(available_bytes()))
    rows = [*tier.rows, *(llm.rows if llm else []), free]
    reporter.table(f"Memory ({tier.kind} tier: {tier.why})", ("what", "where", "size"), rows)
    return Prepared(opened, tier, llm, k, nprobe)


def open_retriever(
    index: Index,
    tier: PlannedTier,
    config: EngineConfig,
    *,
    tracer: Tracer | None = None,
    reporter: Reporter = SILENT,
    rates: JoinRates | None = None,
) -> Retriever:
    """A retriever over the planned tier, which takes its memory now."""
    coarse = Coarse(index.centroids, index.manifest.metric)
    opened = tier.open(coarse, tracer, reporter.progress, rates)
    return Retriever(
        index, coarse, opened, rescore=config.rescore, budget_bytes=config.prefetch_budget_bytes, tracer=tracer
    )


@contextlib.contextmanager
def open_parts(config: EngineConfig, reporter: Reporter) -> Iterator[tuple[Prepared, Generator, Retriever]]:
    """The parts of an engine, not put together, to be measured; closed at the end."""
    made = prepare(config, reporter)
    assert made.llm
    made.opened.embedder.warm_up(approximate=True)
    with (
        contextlib.closing(made.llm.open()) as generator,
        contextlib.closing(open_retriever(made.opened.index, made.tier, config, reporter=reporter)) as retriever,
    ):
        yield made, generator, retriever


def kept_plan(config: EngineConfig, made: Prepared, reporter: Reporter) -> tuple[Averages, Profile | None]:
    """What earlier runs of these parts showed, and the profile that was named or kept.

    What is kept is a convenience: where it cannot be read, that is a warning.
    """
    identity, versions = made.identity
    known: Profile | None = None
    if config.profile != AUTO:
        known = Profile.load(Path(config.profile))
        known.check(identity, Path(config.profile))
    try:
        kept = kept_in(identity, versions)
        averages = Averages(kept.with_suffix(".averages.json"), warn=reporter.warn)
        if config.profile == AUTO and kept.exists():
            known = Profile.load(kept)
    except (TeleragError, OSError) as error:
        reporter.warn(f"Nothing of earlier runs is used: {error}")
        averages = Averages()
    return averages, known


def measured(
    config: EngineConfig, made: Prepared, generator: Generator, retriever: Retriever, reporter: Reporter
) -> Profile | None:
    """A profile measured now and kept; None where that is not to be done or failed."""
    if config.generator is GeneratorKind.OPENAI:
        reporter.warn("A server is not measured unasked, so nothing is predicted; telerag profile measures it.")
        return None
    reporter.say("Measuring this machine and index to plan with; once, some seconds. --profile none goes without.")
    subject = subject_of(made, retriever, generator)
    try:
        with reporter.progress("measuring", None) as advance:
            profile = measure(subject, quick=True, advance=advance, command="telerag run")
    except (ResourceError, ArtifactError) as error:
        reporter.warn(f"Nothing is predicted, because measuring failed: {error}")
        return None
    try:
        profile.save(kept_in(*made.identity))
    except TeleragError as error:
        reporter.warn(f"The measurement is not kept: {error}")
    return profile


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
    made: Prepared,
    retriever: Retriever,
    generator: Generator,
    questions: Sequence[Replayed] = (),
    source: str = PASSAGES,
) -> ProfileSubject:
    """Return what `measure` needs of parts that are open; without questions, passages of the index are replayed."""
    opened = made.opened
    replayed = questions or from_passages(opened.passages, FULL.replayed)
    lists = opened.index.held(opened.index.paths.lists)
    return ProfileSubject(
        *made.identity, made.tier.gpu, lists, opened.embedder, generator, retriever, made.nprobe, replayed, source
    )


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
