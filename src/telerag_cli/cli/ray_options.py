"""Options of the commands whose work Ray can spread over processes and machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.errors import UsageError

if TYPE_CHECKING:
    from telerag_cli.distributed.data import RayPool

_RAY = "Several processes or machines"
RayOption = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Spread the work over processes by Ray, which is started for it on this machine. The same bytes come out.",
        rich_help_panel=_RAY,
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT|auto",
        help="Spread it over a Ray cluster that is running, joined from one of its machines. All of them must see the "
        "files by the same absolute paths, so these lie on a shared file system, and have the same telerag.  "
        "\\[default: none]",
        rich_help_panel=_RAY,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that Ray runs.  \\[default: one for each GPU that is used, or else for as many CPUs as it has "
        "threads]",
        rich_help_panel=_RAY,
    ),
]


@contextlib.contextmanager
def ray_pool(
    ray: bool, address: str | None, workers: int | None, *, gpus: bool = False, threads: int | None = None
) -> Iterator[RayPool | None]:
    """The workers that the options ask for, inside the block; None if they ask for none.

    Args:
        ray: ``--ray``; an address implies it.
        address: ``--ray-address``.
        workers: ``--workers``.
        gpus: they use GPUs, if the cluster has some.
        threads: as in `telerag_cli.distributed.data.RayPool.of`.

    Raises:
        UsageError: there are workers and no Ray to run them, or the address is invalid.
        ResourceError: Ray is not installed, or there is no cluster.
    """
    if not ray and address is None:
        if workers is not None:
            raise UsageError(
                f"--workers is {workers}, and without Ray this process is the only one.",
                remedy="Add --ray, or leave out --workers.",
            )
        yield None
        return

    from telerag_cli.distributed.data import RayPool
    from telerag_cli.distributed.session import joined

    # Ray reports workers that died on stdout.
    with console.stdout_reserved(), joined(address, cpus=max(os.cpu_count() or 1, workers or 1)) as cluster:
        pool = RayPool.of(cluster, workers, gpus=gpus, threads=threads)
        where = "this machine" if cluster.local else f"{cluster.nodes:,} machine{'s' * (cluster.nodes != 1)}"
        console.say(f"Ray runs {pool.workers:,} worker{'s' * (pool.workers != 1)} on {where}.")
        yield pool
