"""The form of a profile: what ``telerag profile`` measures. Times are seconds, sizes bytes, rates bytes per second."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from telerag_cli.errors import ArtifactError, invalid_fields
from telerag_cli.files import cache_folder, read_json, write_json

FORMAT, VERSION = "telerag-profile", 1
AGAIN = "Make it again with telerag profile."


@dataclass(frozen=True)
class Measured:
    """Median and quartiles of a figure that was measured several times."""

    value: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Summarize at least one measurement."""
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
    """Kind of the tier, and its device if it has one."""
    index: str
    """Size of the index and checksum of its lists."""
    model: str
    """The LLM, where it runs, and with how many threads."""
    embedder: str

    def differences(self, other: Identity) -> list[tuple[str, str, str]]:
        """Return (field, this one's value, the other's) for every field in which they differ."""
        pairs = ((entry.name, getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self))
        return [(name, _shown(ours), _shown(theirs)) for name, ours, theirs in pairs if ours != theirs]


def _shown(value: object) -> str:
    return ", ".join(value) or "none" if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class LinkPoint:
    """Rate of a link with ``depth`` transfers of one size in flight."""

    link: str
    """``disk`` or ``PCIe``."""
    way: str
    """Such as ``O_DIRECT``, or ``pinned, to the GPU``."""
    nbytes: int
    depth: int
    bytes_per_s: Measured


@dataclass(frozen=True)
class Moving:
    """Lists of the index moved by its tier, as lookahead moves them; bytes per second."""

    alone: Measured
    while_decoding: Measured
    """While the LLM writes one text."""
    decoding_slowed: float
    """Time the LLM needs for a token while lists are moved, over that alone."""


@dataclass(frozen=True)
class ScoringRate:
    """Rate at which lists are scored for one query in one place: ``latency + bytes / rate``."""

    place: str
    """``arena``, or ``in place`` for the slow tier's memory."""
    storage: str
    bytes_per_s: Measured
    latency_s: float


@dataclass(frozen=True)
class LossPoint:
    """A join with a part of its lists in fast memory."""

    missed_share: float
    """Of the bytes probed."""
    loss: float
    """Share of the shorter of scoring hits and handling misses that the longer does not hide: 0 if they do not disturb
    each other, 1 if they take turns."""


@dataclass(frozen=True)
class Joins:
    """Joins of replayed queries, with all, none and a part of their lists in fast memory."""

    fixed_s: float
    """Time whatever is probed; most of it is the coarse quantizer's."""
    hit_bytes_per_s: Measured
    """Lists in fast memory that are scored."""
    missed_bytes_per_s: Measured
    """Other lists, moved and scored as they arrive, or scored in place."""
    losses: tuple[LossPoint, ...]
    """Ascending."""
    both_ends_slowed: float
    """Time of moving and scoring in place side by side over that alone; 1 where misses can only be moved."""


@dataclass(frozen=True)
class PrefillPoint:
    """Time to the first token after a prompt of so many tokens."""

    tokens: int
    took_s: Measured


@dataclass(frozen=True)
class DecodePoint:
    """Time for one token of each of ``width`` texts that are written together."""

    width: int
    step_s: Measured


@dataclass(frozen=True)
class LlmRates:
    """Speed of the LLM; points ascend."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    """After short prompts."""
    decode_context: int
    """Mean number of tokens before the texts of ``decode``."""
    context_step_s: float
    """What a token of context adds to each step of its text."""


@dataclass(frozen=True)
class EmbeddingTimes:
    """Times of embedding."""

    query_s: Measured
    sketch_s: Measured
    """The approximate embedding with which lookahead starts and is refined."""
    sketch_costs_llm_s: float
    """What one of those, made while the LLM writes, adds to the LLM's time."""


@dataclass(frozen=True)
class HitPoint:
    """Effect of lookahead; all are shares of the bytes that a query probes."""

    budget: float
    """What the link can move in the window."""
    hit: float
    """What is in fast memory when the query arrives."""
    moved: float
    """What was moved; less than the budget where nothing more was worth it."""


@dataclass(frozen=True)
class HitCurve:
    """Hits by budget for one kind of lookahead, from replayed questions, starting with an empty arena."""

    lookahead: str
    points: tuple[HitPoint, ...]


@dataclass(frozen=True)
class Probed:
    """Mean bytes that a query probes, padding included."""

    nprobe: int
    nbytes: float


@dataclass(frozen=True)
class IndexFigures:
    """What depends on the index alone, whatever the machine."""

    nlist: int
    mean_list_bytes: float
    nprobe: int
    """Of the hit curves."""
    replayed: int
    """Number of questions replayed."""
    replayed_from: str
    probed: tuple[Probed, ...]
    hit_curves: tuple[HitCurve, ...]


@dataclass(frozen=True)
class Pcie:
    """A GPU's slot, as its driver reports it."""

    generation: int
    width: int
    most_generation: int
    most_width: int


@dataclass(frozen=True)
class Memory:
    """Free memory of a tier, after the LLM, the embedder and the arena took theirs."""

    where: str
    free_bytes: int


@dataclass(frozen=True)
class Profile:
    """A whole profile. What was not measured is empty or None, and ``left_out`` says why."""

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
    command: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it for a file or stdout."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        write_json(path, self.as_json(), parents=True)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read one.

        Raises:
            ArtifactError: it is missing, is not a profile, or has another version.
        """
        from pydantic import TypeAdapter, ValidationError

        raw = read_json(path)
        found = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise ArtifactError(
                f"{path} is {found[0]} version {found[1]}, and this telerag reads {FORMAT} version {VERSION}.",
                remedy=AGAIN,
            )
        try:
            return TypeAdapter(cls).validate_python(raw)
        except ValidationError as error:
            raise invalid_fields(f"{path} is not a valid profile", error, AGAIN) from error

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
    """Return where this profile is kept between runs; one made with other versions of the libraries is another."""
    text = json.dumps([asdict(identity), versions], sort_keys=True)
    return cache_folder() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
