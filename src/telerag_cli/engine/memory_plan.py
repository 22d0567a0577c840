"""Which tier and which LLM, the memory that they take where, and opening them; planned before it is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from telerag_cli.config import (
    DEFAULT_FAST_MEMORY,
    MAX_CONCURRENT,
    EngineConfig,
    GeneratorKind,
    LlmConfig,
    TierConfig,
    TierKind,
)
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generator
from telerag_cli.progress import Progress
from telerag_cli.system import available_bytes
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tiers.tier import FastTier
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

ALL_LAYERS = -1
MIN_SLOTS = 4
"""Requests that are written at once, memory permitting, even for one question: some pipelines ask several things
together, and a slot that is free keeps a prompt's beginning for the next."""

Row = tuple[str, str, str]
"""Of a byte plan: what, where, how much."""


@dataclass(frozen=True)
class PlannedTier:
    """A tier that can be opened."""

    kind: TierKind
    name: str
    """Kind and device, by which a profile knows it."""
    why: str
    rows: list[Row]
    """Its part of the byte plan."""
    ram_bytes: int
    gpu_bytes: int
    """What it takes of either memory; of the GPU's 0 if it takes what others leave."""
    open: Callable[[Coarse, Tracer | None, Progress, JoinRates | None], FastTier]
    """Take the memory; raises ResourceError if there is not enough. Rates that are known need not be measured."""
    gpu: Gpu | None = None


def plan_tier(index: Index, config: TierConfig) -> PlannedTier:
    """Choose the tier and say what memory it takes.

    Raises:
        UsageError: options contradict each other.
        ResourceError: a device was asked for and is not there.
    """
    if config.tier is TierKind.AUTO:
        gpu, why = _usable_gpu(index, config)
    elif config.tier is TierKind.HOST:
        gpu, why = None, "as asked"
    else:
        gpu, why = _named_gpu(config), "as asked"
    if gpu is None:
        return _plan_host(index, config, why)
    return _plan_cuda(index, config, gpu, why)


def plan_device(config: TierConfig) -> tuple[Gpu | None, str]:
    """The GPU that a tier would be on, if any, without an index to put there; and the tier's name.

    Raises:
        UsageError: options contradict each other.
        ResourceError: a device was asked for and is not there.
    """
    gpu: Gpu | None = None
    if config.tier is TierKind.AUTO:
        with contextlib.suppress(ResourceError):
            gpu = None if config.device == "cpu" else _found(config.device)
    elif config.tier is not TierKind.HOST:
        gpu = _named_gpu(config)
    return gpu, _tier_name(config.tier, gpu)


def device_number(device: str) -> int:
    """Of the GPU that ``auto`` or ``cuda:N`` means.

    Raises:
        UsageError: it is no GPU's name.
    """
    from telerag_cli.tiers.cuda.gpu import gpu_number

    return gpu_number(device) or 0


def _found(device: str) -> Gpu:
    from telerag_cli.tiers.cuda.gpu import find_gpu

    return find_gpu(device)


def _tier_name(kind: TierKind, gpu: Gpu | None) -> str:
    """By which a profile knows it."""
    if gpu is None:
        return TierKind.HOST.value
    return gpu.name if kind is TierKind.SIMULATED else f"{TierKind.CUDA}: {gpu.name}"


def _usable_gpu(index: Index, config: TierConfig) -> tuple[Gpu | None, str]:
    """The GPU that ``auto`` takes, if any, and the reason."""
    if config.device == "cpu":
        return None, "--device cpu"
    if config.fast_memory_bytes is not None:
        return None, "--fast-memory"
    from telerag_cli.tiers.cuda.gpu import gpu_number

    try:
        gpu = _found(config.device)
    except ResourceError:
        if gpu_number(config.device) is not None or config.gpu_memory_bytes is not None:
            raise
        return None, "no GPU found"
    lists, free = int(index.list_bytes.sum()), available_bytes()
    if lists > free:
        return None, f"the lists take {format_bytes(lists)}, and {format_bytes(free)} of host memory are free"
    return gpu, f"{gpu.name} found"


def _named_gpu(config: TierConfig) -> Gpu:
    if config.fast_memory_bytes is not None:
        raise UsageError(
            f"--fast-memory cannot be combined with --tier {config.tier}.",
            remedy="Give --gpu-memory, or use --tier host.",
        )
    if config.tier is TierKind.SIMULATED:
        from telerag_cli.tiers.cuda.simulated import SimulatedGpu

        return SimulatedGpu(bytes_per_s=config.simulated_link_bytes_per_s)
    if config.device == "cpu":
        raise UsageError("--device cpu has no GPU for --tier cuda.", remedy="Leave one of them out.")
    return _found(config.device)


def _plan_host(index: Index, config: TierConfig, why: str) -> PlannedTier:
    for name, given in (
        ("--gpu-memory", config.gpu_memory_bytes is not None),
        ("--require-pinned", config.require_pinned),
    ):
        if given:
            raise UsageError(
                f"{name} cannot be combined with the host tier ({why}).", remedy="Leave it out, or use --tier cuda."
            )
    lists = int(index.list_bytes.sum())
    arena_bytes = config.fast_memory_bytes
    if arena_bytes is None:
        arena_bytes = parse_bytes(DEFAULT_FAST_MEMORY)

    def open_tier(coarse: Coarse, tracer: Tracer | None, _progress: Progress, _rates: JoinRates | None) -> FastTier:
        return open_host_tier(index, coarse, arena_bytes, cache=config.cache, tracer=tracer)

    rows = [
        ("index lists", "disk", format_bytes(lists)),
        ("arena", "RAM", format_bytes(min(arena_bytes, lists))),
        _centroids(index),
    ]
    return PlannedTier(TierKind.HOST, _tier_name(TierKind.HOST, None), why, rows, min(arena_bytes, lists), 0, open_tier)


def _plan_cuda(index: Index, config: TierConfig, gpu: Gpu, why: str) -> PlannedTier:
    from telerag_cli.tiers.cuda.scoring import workspace_bytes
    from telerag_cli.tiers.cuda.tier import open_cuda_tier

    lists = int(index.list_bytes.sum())
    given = config.gpu_memory_bytes

    def open_tier(coarse: Coarse, tracer: Tracer | None, progress: Progress, rates: JoinRates | None) -> FastTier:
        with progress("Reading lists into host memory", lists, unit="bytes") as advance:
            return open_cuda_tier(
                index,
                coarse,
                gpu,
                given,
                require_pinned=config.require_pinned,
                cache=config.cache,
                advance=advance,
                rates=rates,
                tracer=tracer,
            )

    arena = f"what is left, at most {format_bytes(lists)}" if given is None else format_bytes(min(given, lists))
    rows = [
        ("index lists", "RAM, page-locked", format_bytes(lists)),
        ("arena", gpu.name, arena),
        ("scoring", gpu.name, format_bytes(workspace_bytes(index))),
        _centroids(index),
        ("free", gpu.name, format_bytes(gpu.free_bytes())),
    ]
    kind = TierKind.SIMULATED if config.tier is TierKind.SIMULATED else TierKind.CUDA
    on_device = 0 if given is None else min(given, lists) + workspace_bytes(index)
    return PlannedTier(kind, _tier_name(kind, gpu), why, rows, lists, on_device, open_tier, gpu)


def _centroids(index: Index) -> Row:
    return ("centroids", "RAM", format_bytes(2 * index.centroids.nbytes))


@dataclass(frozen=True)
class PlannedLlm:
    """An LLM that can be opened."""

    concurrency: int
    """Questions to answer at once."""
    rows: list[Row]
    """Its part of the byte plan."""
    open: Callable[[], Generator]
    """Take the memory; raises ResourceError if there is not enough."""
    name: str
    """Model, place and threads, by which a profile knows it."""
    kind: GeneratorKind = GeneratorKind.LLAMA


def plan_llm(
    config: EngineConfig, tier: PlannedTier | None, notice: Callable[[str], None], sharers: int = 1
) -> PlannedLlm:
    """Choose how many questions to answer at once and say what memory that takes.

    By default there are as many as half of the memory left holds contexts for, at most 16. ``device`` names the GPU
    that the LLM's layers go to, if any do. ``notice`` takes what a user should know of a server. ``sharers`` processes
    plan to share this machine's memory, this one included.

    Raises:
        UsageError: options contradict each other.
        ModelError: there is no such model.
        ResourceError: the contexts do not fit the memory.
    """
    if config.generator is GeneratorKind.OPENAI:
        planned = _plan_endpoint(config, config.concurrency or MAX_CONCURRENT // 2, notice)
    else:
        planned = _plan_llama(config, tier, sharers)
    if config.replay is None:
        return planned
    replay = config.replay

    def open_replay() -> Generator:
        from telerag_cli.llm.replay import Replay

        return Replay(replay, planned.open())

    return PlannedLlm(planned.concurrency, planned.rows, open_replay, planned.name)


def _plan_endpoint(config: LlmConfig, concurrency: int, notice: Callable[[str], None]) -> PlannedLlm:
    if config.base_url is None:
        raise UsageError(
            "--generator openai needs the server's address.", remedy="Give --base-url, like http://127.0.0.1:8000/v1."
        )
    for name, value in (
        ("--hf-repo", config.hf_repo),
        ("--n-gpu-layers", config.n_gpu_layers),
        ("--threads", config.threads),
    ):
        if value:
            raise UsageError(
                f"{name} {value} cannot be combined with --generator openai.",
                remedy="Leave it out; the server decides.",
            )
    if config.replay is not None:
        raise UsageError("--replay needs a model in this process for its time.", remedy="Leave out --generator openai.")
    base_url = config.base_url

    def open_endpoint() -> Generator:
        from telerag_cli.llm.endpoint import Endpoint

        return Endpoint(
            base_url,
            config.model,
            context_tokens=config.ctx_size,
            parallel=max(concurrency, MIN_SLOTS),
            timeout_s=config.timeout,
            notice=notice,
        )

    name = f"LLM {config.model or ''}".rstrip()
    return PlannedLlm(
        concurrency,
        [(name, base_url, "")],
        open_endpoint,
        f"{config.model or 'the one served'} at {base_url}",
        GeneratorKind.OPENAI,
    )


def _plan_llama(config: EngineConfig, tier: PlannedTier | None, sharers: int) -> PlannedLlm:
    from telerag_cli.llm.llama_model import LlamaModel
    from telerag_cli.llm.llamacpp import LlamaCpp
    from telerag_cli.llm.models import resolve_model
    from telerag_cli.tiers.cuda.gpu import gpu_number

    if config.base_url is not None:
        raise UsageError(
            f"--base-url {config.base_url} cannot be combined with --generator llama.cpp.",
            remedy="Add --generator openai.",
        )
    # The CPU is for embedder and index then; the LLM's layers are sent to a GPU by an option of their own.
    gpu = "auto" if config.device == "cpu" else config.device
    path = resolve_model(config.model, config.hf_repo)
    model = LlamaModel(path, gpu_layers=config.n_gpu_layers, gpu=gpu_number(gpu))
    context_tokens = min(config.ctx_size, model.trained_tokens)
    slot_bytes = model.context_bytes(context_tokens)
    free_bytes = _free_bytes(config, tier, gpu) // sharers - model.weights_bytes
    fitting = max(1, min(MAX_CONCURRENT, free_bytes // 2 // slot_bytes))
    at_once = config.concurrency or fitting
    slots = max(at_once, min(fitting, MIN_SLOTS))
    if slots * slot_bytes > free_bytes:
        raise ResourceError(
            f"{slots} contexts of {context_tokens:,} tokens take {format_bytes(slots * slot_bytes)} and "
            f"{format_bytes(max(free_bytes, 0))} of memory are free.",
            remedy="Lower --concurrency, --ctx-size or "
            f"{'--gpu-memory' if tier and tier.gpu_bytes else '--fast-memory'}.",
        )
    where = "GPU" if config.n_gpu_layers else "RAM"
    rows = [
        (f"LLM {model.name}", where, format_bytes(model.weights_bytes)),
        (f"LLM context, {slots} x {context_tokens:,} tokens", where, format_bytes(slots * slot_bytes)),
    ]
    return PlannedLlm(
        at_once,
        rows,
        lambda: LlamaCpp(
            model,
            context_tokens=context_tokens,
            parallel=slots,
            threads=config.threads,
            reproducible=config.reproducible,
        ),
        f"{model.name} ({model.weights_bytes:,} bytes), {_where(config)}",
    )


def _where(config: LlmConfig) -> str:
    on_gpu = {0: "on the CPU", ALL_LAYERS: "all layers on the GPU"}.get(
        config.n_gpu_layers, f"{config.n_gpu_layers} layers on the GPU"
    )
    return f"{on_gpu}, {config.threads or 'all'} threads{'' if config.reproducible else ', not reproducible'}"


def _free_bytes(config: LlmConfig, tier: PlannedTier | None, gpu: str) -> int:
    """Memory for weights and contexts, where they will be: on a GPU only if all layers are to go there."""
    if config.n_gpu_layers != ALL_LAYERS:
        return available_bytes() - (tier.ram_bytes if tier else 0)
    return _found(gpu).free_bytes() - (tier.gpu_bytes if tier else 0)
