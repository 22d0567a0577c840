"""Where the index will lie and be scored: which tier, the memory it takes where, and opening it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from telerag_cli.config import DEFAULT_FAST_MEMORY, TierConfig, TierKind
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse
from telerag_cli.progress import Progress
from telerag_cli.system import available_bytes
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tiers.tier import FastTier
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

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
    from telerag_cli.tiers.cuda.gpu import find_gpu, gpu_number

    try:
        gpu = find_gpu(config.device)
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
            f"--fast-memory has no part in --tier {config.tier}.", remedy="Give --gpu-memory, or use --tier host."
        )
    if config.tier is TierKind.SIMULATED:
        from telerag_cli.tiers.cuda.simulated import SimulatedGpu

        return SimulatedGpu(bytes_per_s=config.simulated_link_bytes_per_s)
    if config.device == "cpu":
        raise UsageError("--device cpu has no GPU for --tier cuda.", remedy="Leave one of them out.")
    from telerag_cli.tiers.cuda.gpu import find_gpu

    return find_gpu(config.device)


def _plan_host(index: Index, config: TierConfig, why: str) -> PlannedTier:
    for name, given in (
        ("--gpu-memory", config.gpu_memory_bytes is not None),
        ("--require-pinned", config.require_pinned),
    ):
        if given:
            raise UsageError(
                f"{name} has no part in the host tier ({why}).", remedy="Leave it out, or use --tier cuda."
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
