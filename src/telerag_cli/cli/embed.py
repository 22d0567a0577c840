"""``telerag embed``."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from telerag_cli.cli import console
from telerag_cli.cli.ray_options import RayAddressOption, RayOption, WorkersOption, ray_pool
from telerag_cli.config import DEFAULT_EMBEDDER
from telerag_cli.errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    from telerag_cli.distributed.data import RayPool
    from telerag_cli.embedding.job import Makers


def embed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="JSONL, TSV, CSV, Parquet, .txt or .md files, folders of them, or - for JSONL on stdin.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the embeddings; a begun one is resumed.")],
    model: Annotated[
        str, typer.Option(help="A sentence-transformers folder, or a name in the Hugging Face cache or hub.")
    ] = DEFAULT_EMBEDDER,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the stored vectors.")] = "float32",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type to compute in; auto is bfloat16 where it is fast and keeps a cosine of 0.999."),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Passages in a batch, fewer if longer than 64 tokens; default 32, on a GPU 1024."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard_rows: Annotated[int, typer.Option(min=1, help="Passages in a shard, which is the unit of resuming.")] = 8192,
    limit: Annotated[int | None, typer.Option(min=1, help="Embed the first passages only.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that cannot be used, and count them.")
    ] = False,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    workers: WorkersOption = None,
) -> None:
    """Embed a corpus into a folder of Parquet shards; a killed run resumes."""
    from telerag_cli.corpus.readers import count_passages, find_sources, read_passages

    found = find_sources(sources)  # before the seconds that loading a model takes
    remote = ray or ray_address is not None
    if remote and ":" in device:
        raise UsageError(
            f"--device is {device}, and Ray gives each worker a GPU.", remedy="Use --device cuda, auto or cpu."
        )

    from itertools import islice

    from telerag_cli.corpus.chunking import Chunker
    from telerag_cli.embedding.encoder import Encoder
    from telerag_cli.embedding.job import embed_passages

    # With Ray this process only counts tokens, and settles the precision.
    encoder = Encoder.load(model, device="auto" if remote and device == "cuda" else device, dtype=precision)
    bad: list[InputError] = []
    skipped = 0

    def on_bad(error: InputError) -> None:
        nonlocal skipped
        skipped += 1
        if len(bad) < 3:
            bad.append(error)

    passages = read_passages(found, Chunker(encoder.tokenizer, encoder.info.max_tokens), on_bad if skip_bad else None)
    total = count_passages(found)
    if limit is not None:
        total = limit if total is None else min(total, limit)
    started = time.perf_counter()
    try:
        with (
            ray_pool(ray, ray_address, workers, gpus=device != "cpu") as pool,
            console.progress("Embedding", total, unit="passages") as advance,
        ):
            report = embed_passages(
                islice(passages, limit),
                encoder,
                output,
                source=", ".join(sources),
                dtype=dtype,
                shard_rows=shard_rows,
                batch_size=batch_size,
                advance=advance,
                makers=_makers(pool, model, device, batch_size) if pool else None,
            )
    finally:
        if skipped:
            examples = "; ".join(error.message for error in bad)
            console.warn(
                f"left out {skipped:,} bad line{'s' * (skipped != 1)}: {examples}{' ...' * (skipped > len(bad))}"
            )
    seconds = time.perf_counter() - started
    place = f"{report.rows:,} passages in {report.shards:,} shard{'s' * (report.shards != 1)} in {output}"
    if report.embedded:
        kept = report.rows - report.embedded
        computed_on = f"{pool.workers:,} worker{'s' * (pool.workers != 1)}" if pool else encoder.device
        console.say(
            f"Embedded {report.embedded:,} passages in {seconds:.1f} s ({report.embedded / seconds:,.1f} passages/s, "
            f"{report.precision} on {computed_on}){f', kept {kept:,} from before' * bool(kept)}: {place}."
        )
    else:
        console.say(f"Already complete: {place}.")
    console.emit(str(output))


def _makers(pool: RayPool, model: str, device: str, batch_size: int | None) -> Makers:
    """Shards made by the workers of a pool."""
    from telerag_cli.embedding.job import ShardMaker, ShardTask

    if device == "cuda" and not pool.gpus_each:
        raise ResourceError("cuda was asked for and Ray finds no GPU on its machines.", remedy="Use --device cpu.")
    folder = Path(model).expanduser()
    maker = ShardMaker(
        str(folder.resolve()) if folder.is_dir() else model, "cuda" if pool.gpus_each else "cpu", batch_size
    )

    def makers(tasks: Iterable[ShardTask]) -> Generator[int]:
        # Workers need not have this process's working folder.
        return pool((replace(task, path=task.path.absolute()) for task in tasks), maker)

    return makers
