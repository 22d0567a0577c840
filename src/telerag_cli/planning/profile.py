"""What ``telerag profile`` measures, as it lies in ``profile.json``. Times are seconds, sizes bytes, rates bytes a second."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from telerag_cli.errors import ArtifactError
from telerag_cli.files import cache_folder, read_json, write_json

FORMAT = "telerag-profile"
VERSION = 1


@dataclass(frozen=True)
class Measured:
    """A figure that was measured several times: its median and its quartiles."""

    value: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """From at least one measurement."""
        several = [*values, *values]  # one value alone has no quartiles
        low, middle, high = statistics.quantiles(several if len(values) == 1 else values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))


@dataclass(frozen=True)
class Identity:
    """What a profile is of. Two profiles of the same say the same, within what the machine varies."""

    cpu: str
    cores: int
    gpus: tuple[str, ...]
    tier: str
    """The kind of tier, and its device if it has one."""
    index: str
    """Name and checksum of the index's lists."""
    model: str
    """The LLM, where it runs, and with how many threads."""
    embedder: str

    def differences(self, other: Identity) -> list[tuple[str, str, str]]:
        """(what, this one's, the other's) for everything in which they differ."""
        pairs = ((entry.name, getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self))
        return [(name, _shown(ours), _shown(theirs)) for name, ours, theirs in pairs if ours != theirs]


def _shown(value: object) -> str:
    return ", ".join(value) or "none" if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class LinkPoint:
    """How fast bytes pass a link in transfers of one size, so many of them under way."""

    link: str
    """``disk`` or ``PCIe``."""
    way: str
    """Such as ``O_DIRECT``, or ``pinned, to the GPU``."""
    nbytes: int
    depth: int
    bytes_per_s: Measured


@dataclass(frozen=True)
class Moving:
    """Lists of the index moved by its tier, as lookahead moves them."""

    alone: Measured
    """Bytes a second."""
    while_decoding: Measured
    """The same while the LLM writes one text."""
    decoding_slowed: float
    """Seconds the LLM needs for a token while lists are moved, over those it needs alone."""


@dataclass(frozen=True)
class ScoringRate:
    """How fast lists are scored in one place."""

    place: str
    """``arena``, or ``in place`` for the slow tier's memory."""
    storage: str
    bytes_per_s: Measured
    """Bytes of lists a second, for one query."""
    latency_s: float
    """What any scoring there takes at least."""


@dataclass(frozen=True)
class LossPoint:
    """A join with some of its lists in fast memory."""

    missed_share: float
    """Of the bytes probed."""
    loss: float
    """Of the shorter of scoring hits and dealing with misses, what is not hidden behind the longer: 0 if they do not disturb
    each other, 1 if they take turns."""


@dataclass(frozen=True)
class Joins:
    """Real joins of replayed queries: some with all their lists in fast memory, some with none of them, some with a part."""

    fixed_s: float
    """Whatever is probed; the coarse quantizer is most of it."""
    hit_bytes_per_s: Measured
    """Bytes of lists in fast memory that are scored."""
    missed_bytes_per_s: Measured
    """Bytes of lists that are not, moved and scored as they come, or scored in place."""
    losses: tuple[LossPoint, ...]
    """In ascending order."""
    both_ends_slowed: float
    """How much longer moving and scoring in place take side by side than alone; 1 where misses can only be moved."""


@dataclass(frozen=True)
class PrefillPoint:
    """Reading a prompt of so many tokens, up to the first token of the text."""

    tokens: int
    took_s: Measured


@dataclass(frozen=True)
class DecodePoint:
    """A token of each of so many texts that are written together."""

    width: int
    step_s: Measured


@dataclass(frozen=True)
class LlmRates:
    """How fast the LLM reads and writes; both in ascending order."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    """After short prompts."""
    decode_context: int
    """Tokens before the texts of ``decode``, on average."""
    context_step_s: float
    """What a token of the context adds to each step of its text."""


@dataclass(frozen=True)
class EmbeddingTimes:
    """What embedding takes."""

    query_s: Measured
    sketch_s: Measured
    """The rough embedding with which lookahead begins and is refined."""
    sketch_costs_llm_s: float
    """What one of those, made while the LLM writes, adds to its time."""


@dataclass(frozen=True)
class HitPoint:
    """What lookahead brings about; all are shares of the bytes that a query probes."""

    budget: float
    """That the link can move in the window."""
    hit: float
    """That are in fast memory when the query arrives."""
    moved: float
    """That were moved; less than the budget where nothing more was worth it."""


@dataclass(frozen=True)
class HitCurve:
    """Hits against budget for one kind of lookahead, from replayed questions, over an empty arena."""

    lookahead: str
    points: tuple[HitPoint, ...]


@dataclass(frozen=True)
class Probed:
    """Bytes that queries probe on average, padding included."""

    nprobe: int
    nbytes: float


@dataclass(frozen=True)
class IndexFigures:
    """What depends on the index alone, whatever the machine."""

    nlist: int
    mean_list_bytes: float
    nprobe: int
    """With which the hit curves were made."""
    replayed: int
    """Questions replayed."""
    replayed_from: str
    probed: tuple[Probed, ...]
    hit_curves: tuple[HitCurve, ...]


@dataclass(frozen=True)
class Pcie:
    """The slot of a GPU as its driver tells it."""

    generation: int
    width: int
    most_generation: int
    most_width: int


@dataclass(frozen=True)
class Memory:
    """Of one tier."""

    where: str
    free_bytes: int
    """After the LLM, the embedder and the arena had taken theirs."""


@dataclass(frozen=True)
class Profile:
    """All of it. What was not measured is empty or None, and ``left_out`` says why."""

    identity: Identity
    quick: bool
    took_s: float
    measured_at: str
    versions: dict[str, str]
    links: tuple[LinkPoint, ...] = ()
    moving: Moving | None = None
    scoring: tuple[ScoringRate, ...] = ()
    joins: Joins | None = None
    coarse_s: Measured | None = None
    embedding: EmbeddingTimes | None = None
    llm: LlmRates | None = None
    index: IndexFigures | None = None
    pcie: Pcie | None = None
    memory: tuple[Memory, ...] = ()
    left_out: tuple[str, ...] = ()
    command: str = field(default="")

    def as_json(self) -> dict[str, Any]:
        """For a file or stdout."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.as_json())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read one.

        Raises:
            ArtifactError: it is missing, no profile, or of another version.
        """
        from pydantic import TypeAdapter, ValidationError

        raw = read_json(path)
        found = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise ArtifactError(
                f"{path} is {found[0]} version {found[1]}, and this telerag reads {FORMAT} version {VERSION}.",
                remedy="Make it again with telerag profile.",
            )
        try:
            return TypeAdapter(cls).validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(
                f"{path} is no valid profile: {where}: {first['msg'].lower()}.",
                remedy="Make it again with telerag profile.",
            ) from error

    def check(self, identity: Identity, path: Path) -> None:
        """Refuse a profile of something else.

        Raises:
            ArtifactError: it differs in anything; names both sides.
        """
        for what, theirs, ours in self.identity.differences(identity):
            raise ArtifactError(
                f"{path} was measured with {what} {theirs}, and here it is {ours}.",
                remedy="Measure this one with telerag profile, or leave out --profile.",
            )


def kept_in(identity: Identity, versions: dict[str, str]) -> Path:
    """Where the profile of this is kept between runs; one made with other versions of the libraries is another."""
    text = json.dumps([asdict(identity), versions], sort_keys=True)
    return cache_folder() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
