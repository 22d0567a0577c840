"""Which LLM writes, how many questions it writes for at once, and the memory that takes; planned before it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from telerag_cli.config import MAX_CONCURRENT, EngineConfig, GeneratorKind, LlmConfig
from telerag_cli.engine.tier_plan import PlannedTier, Row
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.llm.base import Generator
from telerag_cli.planning.formulas import memory_left_bytes
from telerag_cli.system import available_bytes
from telerag_cli.units import format_bytes

ALL_LAYERS = -1
MIN_SLOTS = 4
"""Requests that are written at once, memory permitting, even for one question: some pipelines ask several things
together, and a slot that is free keeps a prompt's beginning for the next."""


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

    Args:
        config: which model, and the questions at once; by default as many as half of the memory left holds contexts
            for, at most 16. ``device`` names the GPU that the LLM's layers go to, if any do.
        tier: what the index will take of the memory that is free; None if there is none.
        notice: takes what a user should know of a server.
        sharers: processes that plan to share this machine's memory, this one included.

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
                f"{name} {value} has no part in --generator openai.", remedy="Leave it out; the server decides."
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
            f"--base-url {config.base_url} has no part in --generator llama.cpp.", remedy="Add --generator openai."
        )
    # The CPU is for embedder and index then; the LLM's layers are sent to a GPU by an option of their own.
    gpu = "auto" if config.device == "cpu" else config.device
    path = resolve_model(config.model, config.hf_repo)
    model = LlamaModel(path, gpu_layers=config.n_gpu_layers, gpu=gpu_number(gpu))
    context_tokens = min(config.ctx_size, model.trained_tokens)
    slot_bytes = model.context_bytes(context_tokens)
    free_bytes = memory_left_bytes(_free_bytes(config, tier, gpu) // sharers, model.weights_bytes)
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
        return memory_left_bytes(available_bytes(), tier.ram_bytes if tier else 0)
    from telerag_cli.tiers.cuda.gpu import find_gpu

    return memory_left_bytes(find_gpu(gpu).free_bytes(), tier.gpu_bytes if tier else 0)
