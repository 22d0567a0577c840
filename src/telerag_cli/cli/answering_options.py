"""Options of the commands that answer questions, in groups, and what they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telerag_cli.cli.opening import AUTO, Answering, Planned, Searching
from telerag_cli.cli.options import (
    BaseUrlOption,
    CtxSizeOption,
    DeviceOption,
    EmbedderOption,
    FastMemoryOption,
    FlareThresholdOption,
    GeneratorOption,
    GpuMemoryOption,
    HfRepoOption,
    IndexArgument,
    KOption,
    LookaheadOption,
    MaxTokensOption,
    ModelOption,
    NGpuLayersOption,
    NprobeOption,
    PrefetchBudgetOption,
    ProfileOption,
    ReproducibleOption,
    RequirePinnedOption,
    RescoreOption,
    RoundsOption,
    SeedOption,
    SentencesOption,
    SubQuestionsOption,
    TemperatureOption,
    ThreadsOption,
    TierOption,
    TimeoutOption,
    TopPOption,
    tier_options,
)
from telerag_cli.config import DEFAULT_CTX_SIZE, DEFAULT_TIMEOUT_S, GeneratorKind, Lookahead, TierKind

if TYPE_CHECKING:
    from telerag_cli.pipelines.base import Pipeline


@dataclass(frozen=True)
class PipelineOptions:
    """Options of pipelines; None means the pipeline's default."""

    rounds: RoundsOption = None
    sub_questions: SubQuestionsOption = None
    flare_threshold: FlareThresholdOption = None
    sentences: SentencesOption = None

    @property
    def given(self) -> dict[str, Any]:
        """By name."""
        return dict(vars(self))


@dataclass(frozen=True)
class SearchOptions:
    """Which index, how it is searched, and where it is kept."""

    index: IndexArgument
    lookahead: LookaheadOption = Lookahead.REFINED
    nprobe: NprobeOption = None
    k: KOption = None
    rescore: RescoreOption = None
    tier: TierOption = TierKind.AUTO
    fast_memory: FastMemoryOption = None
    gpu_memory: GpuMemoryOption = "auto"
    require_pinned: RequirePinnedOption = False
    embedder: EmbedderOption = None
    device: DeviceOption = "auto"
    profile: ProfileOption = AUTO
    prefetch_budget: PrefetchBudgetOption = None

    @property
    def searching(self) -> Searching:
        """As `open_answering` takes it.

        Raises:
            UsageError: a size is none.
        """
        where = tier_options(self.tier, self.device, self.fast_memory, self.gpu_memory, self.require_pinned)
        return Searching(self.index, self.embedder, where, self.k, self.nprobe, self.rescore)

    def planned(self, *, explain: bool = False, pipeline: Pipeline | None = None) -> Planned:
        """As `open_answering` takes it."""
        return Planned(self.profile, self.prefetch_budget, explain, pipeline)


@dataclass(frozen=True)
class LlmOptionsGiven:
    """Which LLM, and how it writes answers."""

    generator: GeneratorOption = GeneratorKind.LLAMA
    model: ModelOption = None
    hf_repo: HfRepoOption = None
    base_url: BaseUrlOption = None
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S
    ctx_size: CtxSizeOption = DEFAULT_CTX_SIZE
    n_gpu_layers: NGpuLayersOption = 0
    threads: ThreadsOption = None
    reproducible: ReproducibleOption = True
    max_tokens: MaxTokensOption = 128
    temperature: TemperatureOption = 0.0
    top_p: TopPOption = 1.0
    seed: SeedOption = 0

    def answering(self, lookahead: Lookahead, concurrency: int | None, replay: Path | None = None) -> Answering:
        """As `open_answering` takes it."""
        from telerag_cli.engine.llm_plan import LlmOptions

        llm = LlmOptions(
            self.generator,
            self.model,
            self.hf_repo,
            self.base_url,
            self.ctx_size,
            self.n_gpu_layers,
            self.threads,
            self.timeout,
            self.reproducible,
            replay,
        )
        return Answering(llm, concurrency, lookahead, self.max_tokens, self.temperature, self.top_p, self.seed)
