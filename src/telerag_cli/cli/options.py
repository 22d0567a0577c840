"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.config import (
    DEFAULT_FAST_MEMORY,
    DEFAULT_GENERATOR,
    DEFAULT_MICRO_BATCH,
    GeneratorKind,
    Lookahead,
    PipelineName,
    PlacementName,
    ScheduleName,
    TierKind,
    parse_bytes,
)
from telerag_cli.errors import ResourceError

if TYPE_CHECKING:
    from telerag_cli.engine.tier_plan import TierOptions

IndexArgument = Annotated[
    Path, typer.Argument(help="The index folder, made by telerag build-index.", metavar="INDEX", show_default=False)
]
KOption = Annotated[
    int | None,
    typer.Option(
        "-k", min=1, help="Passages to retrieve.  \\[default: 5, or all of a smaller index]", show_default=False
    ),
]
NprobeOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Lists to probe for each query.  \\[default: 32, or all of a smaller index]", show_default=False
    ),
]
_TIER = "Where the index is kept"
TierOption = Annotated[
    TierKind,
    typer.Option(
        help="host: lists come from disk to RAM. cuda: from host memory to a GPU. auto: cuda if there is a GPU and the index "
        "fits the host's memory. simulated: cuda without a GPU, to try it out.",
        rich_help_panel=_TIER,
    ),
]
FastMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help=f"Size of the arena in RAM (host tier), like 512MiB or 2GB.  \\[default: {DEFAULT_FAST_MEMORY}]",
        show_default=False,
        rich_help_panel=_TIER,
    ),
]
GpuMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE|auto",
        help="Size of the arena on the GPU (cuda tier); auto is what the LLM leaves, less a reserve.",
        rich_help_panel=_TIER,
    ),
]
RequirePinnedOption = Annotated[
    bool,
    typer.Option(
        "--require-pinned", help="Refuse host memory that cannot be page-locked (cuda tier).", rich_help_panel=_TIER
    ),
]
RescoreOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Candidates a result that are scored again from the vectors that the index keeps.  "
        "\\[default: 4 if it keeps them, else 0]",
        show_default=False,
    ),
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        help="The model that embeds questions.  \\[default: the one that made the index]",
        show_default=False,
        metavar="NAME|PATH",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="The GPU for the embedder, the cuda tier and the LLM's layers: auto, cuda:N; cpu keeps the first two off it."
    ),
]

_PLAN = "The plan"
ProfileOption = Annotated[
    str,
    typer.Option(
        metavar="FILE|auto|none",
        help="What telerag profile measured. auto: what is kept of this index on this machine, measured quickly if there is "
        "none; none: go without, and predict nothing.",
        rich_help_panel=_PLAN,
    ),
]
PrefetchBudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most that lookahead may move before a retrieval.  \\[default: as much as there is time and room for]",
        show_default=False,
        rich_help_panel=_PLAN,
    ),
]

PipelineOption = Annotated[PipelineName, typer.Option(help="How questions are answered; see docs/pipelines.md.")]
LookaheadOption = Annotated[Lookahead, typer.Option(help="What predicts the lists to move while the LLM writes.")]
RoundsOption = Annotated[
    int | None, typer.Option(min=1, help="Rounds of iterative and iter_retgen.  \\[default: 3]", show_default=False)
]
SubQuestionsOption = Annotated[
    int | None, typer.Option(min=1, help="Most sub-questions of subquestion.  \\[default: 3]", show_default=False)
]
FlareThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="flare looks up what has tokens less probable than this.  \\[default: 0.4]",
        show_default=False,
    ),
]
SentencesOption = Annotated[
    int | None, typer.Option(min=1, help="Most sentences that flare writes.  \\[default: 4]", show_default=False)
]

_LLM = "The LLM"
GeneratorOption = Annotated[
    GeneratorKind,
    typer.Option(help="llama.cpp in this process, or any server with OpenAI's API.", rich_help_panel=_LLM),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"A GGUF file, or the server's name for its model.  \\[default: {DEFAULT_GENERATOR}, or the only one served]",
        metavar="GGUF|NAME",
        show_default=False,
        rich_help_panel=_LLM,
    ),
]
HfRepoOption = Annotated[
    str | None,
    typer.Option(
        help="A Hugging Face repository instead, like user/model:Q4_K_M.",
        metavar="USER/MODEL[:QUANT]",
        show_default=False,
        rich_help_panel=_LLM,
    ),
]
BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        help="Address of the server, like http://127.0.0.1:8000/v1; its key is taken from OPENAI_API_KEY.",
        metavar="URL",
        show_default=False,
        rich_help_panel=_LLM,
    ),
]
TimeoutOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds for which a server may send nothing.", rich_help_panel=_LLM)
]
CtxSizeOption = Annotated[
    int, typer.Option(min=64, help="Tokens that a prompt and its answer may have together.", rich_help_panel=_LLM)
]
NGpuLayersOption = Annotated[
    int, typer.Option(min=-1, help="Layers of the LLM to put on a GPU, -1 for all.", rich_help_panel=_LLM)
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads of the LLM.  \\[default: one a core]", show_default=False, rich_help_panel=_LLM
    ),
]
ReproducibleOption = Annotated[
    bool,
    typer.Option(
        "--reproducible/--no-reproducible",
        help="Whether a text is kept from depending on what is written beside it, as far as the weights allow: on a CPU, with "
        "Q4_0, Q4_1 and Q8_0. Without, prompts are read quicker.",
        rich_help_panel=_LLM,
    ),
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_LLM)]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="0 always takes the likeliest token.", rich_help_panel=_LLM)
]
TopPOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability.", rich_help_panel=_LLM
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="For sampling at temperatures above 0.", rich_help_panel=_LLM)]

_SCHEDULE = "Many questions, many replicas"
ScheduleOption = Annotated[
    ScheduleName,
    typer.Option(
        help="Which questions run together: similar ones, which share what they move, or as they arrive.",
        rich_help_panel=_SCHEDULE,
    ),
]
BatchSizeOption = Annotated[
    int, typer.Option(min=1, help="Questions that the scheduler looks at together.", rich_help_panel=_SCHEDULE)
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Questions that run together.  \\[default: {DEFAULT_MICRO_BATCH}, less if the arena or the LLM has room for fewer]",
        show_default=False,
        rich_help_panel=_SCHEDULE,
    ),
]
MaxWaitOption = Annotated[
    float, typer.Option(min=0.0, help="Seconds that a question waits for company at most.", rich_help_panel=_SCHEDULE)
]
PlacementOption = Annotated[
    PlacementName,
    typer.Option(
        help="Which replica takes which questions: cache-aware moves least; the others are for comparison.",
        rich_help_panel=_SCHEDULE,
    ),
]
ReplicasOption = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="LLMs that answer side by side, each with a GPU or a share of the processors; auto: one for each GPU. More than one "
        "needs Ray.",
        rich_help_panel=_SCHEDULE,
    ),
]


def tier_options(
    tier: TierKind, device: str, fast_memory: str | None, gpu_memory: str, require_pinned: bool
) -> TierOptions:
    """What the options say of where the index is kept.

    Raises:
        UsageError: a size is none.
    """
    from telerag_cli.engine.tier_plan import TierOptions

    return TierOptions(
        tier,
        device,
        None if fast_memory is None else parse_bytes(fast_memory),
        None if gpu_memory == "auto" else parse_bytes(gpu_memory),
        require_pinned,
    )


def check_trace(trace: Path | None) -> None:
    """Refuse a trace file that could not be written at the end.

    Raises:
        ResourceError: its folder does not exist.
    """
    if trace and not trace.parent.is_dir():
        raise ResourceError(
            f"The trace cannot be written: {trace.parent} is no folder.", remedy="Choose another --trace."
        )
