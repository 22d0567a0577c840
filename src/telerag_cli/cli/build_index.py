"""``telerag build-index``."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.build_config import BuildConfig
from telerag_cli.cli import console
from telerag_cli.cli.ray_options import RayOptions
from telerag_cli.errors import UsageError
from telerag_cli.files import free_bytes
from telerag_cli.setting import AUTO
from telerag_cli.system import available_bytes
from telerag_cli.units import format_bytes, parse_bytes

COLUMNS = ("what", "value")

if TYPE_CHECKING:
    from telerag_cli.index.artifact import Manifest
    from telerag_cli.index.build import BuildPlan


def build_index(
    embeddings: Annotated[Path, typer.Argument(help="Folder made by telerag embed, or Parquet with a vector column.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Index folder to make.")],
    *,
    nlist: Annotated[
        str, typer.Option(help="Number of lists, or auto: about 4 * sqrt(vectors), a power of two.")
    ] = "auto",
    config: BuildConfig,
    memory: Annotated[str, typer.Option(help="For the training sample and blocks of vectors.")] = "2GiB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index, or a build begun otherwise.")
    ] = False,
    ray: RayOptions,
) -> None:
    """Build an IVF index from embeddings, out of core; an interrupted build resumes.

    Prints the index's path on stdout; sizes, list balance and recall@10 on stderr.
    """
    config = replace(config, nlist=_list_count(nlist), memory_bytes=parse_bytes(memory))

    from telerag_cli.index.build import build_index as run
    from telerag_cli.index.build import norms_note, plan_build
    from telerag_cli.index.scoring import faiss_threads

    with console.stdout_reserved():
        if ray.used:  # workers need not have this process's working folder
            embeddings, root = embeddings.absolute(), output.absolute()
        else:
            root = output
        plan = plan_build(embeddings, root, config)
        kept = plan.finished(overwrite=overwrite)
        if kept:
            console.say(f"{output} is already built from these embeddings with these options.")
        else:
            _show_plan(plan)
            if note := norms_note(plan.embeddings, config.metric):
                console.warn(note)
            if config.device == AUTO and plan.gpu is not None:
                console.say(f"k-means runs on cuda:{plan.gpu}, which Faiss finds; --device cpu keeps it off.")
        # The scores of Faiss differ in their last bit with its threads: workers have as many as this process.
        with contextlib.ExitStack() as stack:
            pool = None if kept else stack.enter_context(ray.pool(threads=faiss_threads()))
            index = run(embeddings, root, config, overwrite=overwrite, progress=console.progress, pool=pool, plan=plan)
        console.table("", COLUMNS, index_rows(index.manifest))
    console.emit(str(output))


def _list_count(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--nlist is '{text}', which is neither a number nor auto.", remedy="Write 4096 or auto."
        ) from None


def _show_plan(plan: BuildPlan) -> None:
    needed = [
        ("training sample", "memory", plan.sample_bytes),
        ("block of vectors", "memory", plan.block_bytes),
        ("lists", "disk", plan.lists_bytes),
        ("passages (estimate)", "disk", plan.passages_bytes),
        *([("kept vectors", "disk", plan.vectors_bytes)] if plan.vectors_bytes else []),
        ("assignments, centroids", "disk", plan.work_bytes),
    ]
    vectors = f"{plan.embeddings.rows:,} vectors of {plan.embeddings.dimension} dimensions"
    title = f"{vectors} into {plan.training.nlist:,} lists of {plan.config.storage}"
    console.table(
        title, ["what", "where", "bytes"], [(what, where, format_bytes(size)) for what, where, size in needed]
    )
    resumed = (
        f" A build of the same was begun and goes on; {format_bytes(plan.left_bytes)} are there." if plan.begun else ""
    )
    console.say(
        f"Free: {format_bytes(available_bytes())} of memory, {format_bytes(free_bytes(plan.root))} of disk.{resumed}"
    )


def index_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What a person wants to know of an index, line by line."""
    even = manifest.balance
    recall = ", ".join(
        f"{value:.3f} at {nprobe}"
        for nprobe, value in sorted(manifest.recall_at_10.items(), key=lambda item: int(item[0]))
    )
    # An index that was imported, or made for measuring, had no training here, and no queries held out.
    trained = f"seed {manifest.seed}, trained on {manifest.training_rows:,} vectors ({manifest.trained_on})"
    measured = f"{recall} ({manifest.recall_queries} held-out queries)" if recall else "too few vectors to measure"
    return [
        ("vectors", f"{manifest.ntotal:,} of {manifest.dimension} dimensions, {manifest.storage}, {manifest.metric}"),
        ("lists", f"{manifest.nlist:,}, {trained if manifest.training_rows else 'trained elsewhere'}"),
        (
            "vectors per list",
            f"least {even['min']:,.0f}, median {even['median']:,.0f}, most {even['max']:,.0f}; "
            f"{even['empty']:,.0f} empty; imbalance {even['imbalance']:.2f}",
        ),
        ("bytes", ", ".join(f"{name} {format_bytes(info.bytes)}" for name, info in sorted(manifest.files.items()))),
        ("kept vectors", f"{manifest.kept_vectors}, in row order" if manifest.kept_vectors else "none"),
        ("embedder", manifest.embedder.model or "unknown"),
        ("recall@10 at nprobe", measured if manifest.training_rows else "not measured"),
    ]
