"""Options of the commands whose work Ray can spread over processes and machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import one
from telerag_cli.config import ReplicaConfig
from telerag_cli.errors import UsageError

if TYPE_CHECKING:
    from telerag_cli.distributed.data import RayPool

_RAY = "Several processes or machines"


@dataclass(frozen=True)
class RayOptions:
    """Whether and where Ray runs the work; an address alone says so too."""

    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Spread the work over processes by Ray, which is started for it on this machine. The same bytes come "
            "out.",
            rich_help_panel=_RAY,
        ),
    ] = False
    ray_address: Annotated[str | None, one("ray_address", ReplicaConfig)] = None
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that Ray runs.  \\[default: one for each GPU that is used, or else for as many CPUs as it "
            "has threads]",
            rich_help_panel=_RAY,
        ),
    ] = None

    @property
    def used(self) -> bool:
        """Whether Ray runs the work."""
        return self.ray or self.ray_address is not None

    @contextlib.contextmanager
    def pool(self, *, gpus: bool = False, threads: int | None = None) -> Iterator[RayPool | None]:
        """The workers, inside the block; None without Ray. They use GPUs if the cluster has some, and ``gpus``.

        Raises:
            UsageError: there are workers and no Ray to run them, or the address is invalid.
            ResourceError: Ray is not installed, or there is no cluster.
        """
        if not self.used:
            if self.workers is not None:
                raise UsageError(
                    f"--workers is {self.workers}, and without Ray this process is the only one.",
                    remedy="Add --ray, or leave out --workers.",
                )
            yield None
            return

        from telerag_cli.distributed.data import RayPool
        from telerag_cli.distributed.session import joined

        cpus = max(os.cpu_count() or 1, self.workers or 1)
        # Ray reports workers that died on stdout.
        with console.stdout_reserved(), joined(self.ray_address, cpus=cpus) as cluster:
            pool = RayPool.of(cluster, self.workers, gpus=gpus, threads=threads)
            where = "this machine" if cluster.local else f"{cluster.nodes:,} machine{'s' * (cluster.nodes != 1)}"
            console.say(f"Ray runs {pool.workers:,} worker{'s' * (pool.workers != 1)} on {where}.")
            yield pool
