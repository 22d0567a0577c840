"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

IndexArgument = Annotated[
    Path,
    typer.Argument(
        help="The index folder, made by telerag build-index.", metavar="INDEX", show_default=False
    ),
]
KOption = Annotated[
    int | None,
    typer.Option(
        "-k",
        min=1,
        help="Passages to retrieve.  \\[default: 5, or all of a smaller index]",
        show_default=False,
    ),
]
NprobeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Lists to probe for each query.  \\[default: 32, or all of a smaller index]",
        show_default=False,
    ),
]
FastMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="Size of the arena: the RAM that lists are kept in, like 512MiB or 2GB."
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
DeviceOption = Annotated[str, typer.Option(help="Where the embedder runs: auto, cpu or cuda:N.")]
