"""A pool of Ray actors that a stream of items runs through, so that shards and blocks are made in many processes."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from telerag_cli.distributed.session import Cluster, cause
from telerag_cli.errors import ResourceError

T = TypeVar("T")
R = TypeVar("R")

UNDER_WAY = 2
"""Items that a worker has at once: the present and the next one."""
MAX_TRIES = 4
"""Tries of an item: without a bound Ray would go on for ever with one that kills its worker, as for lack of memory."""


@dataclass(frozen=True)
class RayPool:
    """Workers of a cluster; called, it runs items through them."""

    workers: int
    cpus_each: float = 1
    gpus_each: float = 0
    environment: dict[str, str] | None = None
    """Variables of the workers' processes."""

    @classmethod
    def of(cls, cluster: Cluster, workers: int | None, *, gpus: bool, threads: int | None = None) -> RayPool:
        """Return as many workers as asked for, or one for each GPU, or else for as many CPUs as each has threads.

        More workers than there are GPUs or CPUs share them; ``threads`` of None stands for as many as it has CPUs.
        """
        total = cluster.gpus if gpus else 0
        each = min(threads or 1, cluster.node_cpus)
        count = workers or total or max(1, cluster.cpus // each)
        cpus = cluster.cpus / count
        if cluster.local and threads is None:
            each = max(1, int(cpus))  # of one machine, all of it is for them
        environment = None if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return cls(count, min(each, cpus), 1 / -(-count // total) if total else 0.0, environment)

    def __call__(self, items: Iterable[T], make_worker: Callable[[], Callable[[T], R]]) -> Generator[R]:
        """Run items through the workers, inside of `joined`; yield the results in the order of the items.

        Items are pickled one by one, and read from no thread but the caller's, at most two for each worker and one
        ahead of the results. An error of theirs is raised once the results of the items before are out.
        ``make_worker``, which is pickled, is called once in each worker's process. A worker that dies is started again,
        and its items are done again.

        Raises:
            Exception: what a worker raised, as it raised it.
            ResourceError: an item's workers died again and again.
        """
        import ray
        from ray import cloudpickle
        from ray.exceptions import RayActorError, RayError, RayTaskError

        actor = ray.remote(_Worker).options(
            num_cpus=self.cpus_each,
            num_gpus=self.gpus_each,
            max_restarts=-1,
            max_task_retries=MAX_TRIES - 1,
            runtime_env={"env_vars": self.environment or {}},
        )
        made = cloudpickle.dumps(make_worker)
        workers = [actor.remote(made) for _ in range(self.workers)]
        coming: deque[tuple[Any, int]] = deque()
        """References to results, in order, and the numbers of the workers that make them."""
        source: Iterator[T] | None = iter(items)
        error: Exception | None = None
        try:
            while coming or source is not None:
                while source is not None and len(coming) <= UNDER_WAY * self.workers:
                    try:
                        item = cloudpickle.dumps(next(source))
                    except StopIteration:
                        source = None
                    except Exception as raised:  # results of the items before it are still to come
                        source, error = None, raised
                    else:
                        free = _least_busy(self.workers, coming)
                        coming.append((workers[free].work.remote(item), free))
                if coming:
                    result: R = pickle.loads(ray.get(coming.popleft()[0]))
                    yield result
        except RayActorError as lost:
            raise ResourceError(
                f"Workers died {MAX_TRIES} times at the same piece of work, as they do when memory is short.",
                remedy="Use fewer --workers, and run the same command again.",
            ) from lost
        except RayError as failed:
            found = cause(failed)
            if isinstance(failed, RayTaskError):
                found.add_note(f"In a worker: {failed}")
            raise found from None
        finally:
            for worker in workers:
                ray.kill(worker)
        if error is not None:
            raise error


class _Worker:
    """The actor."""

    def __init__(self, make: bytes) -> None:
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def work(self, item: bytes) -> bytes:
        """The result of an item; both are pickled."""
        from ray import cloudpickle

        # Not in __init__: what is raised there reaches the caller as text only.
        if self._work is None:
            self._work = pickle.loads(self._make)()
        data: bytes = cloudpickle.dumps(self._work(pickle.loads(item)))
        return data


def _least_busy(workers: int, coming: Iterable[tuple[Any, int]]) -> int:
    import ray

    references = [reference for reference, _number in coming]
    done = set(ray.wait(references, num_returns=len(references), timeout=0)[0]) if references else set()
    busy = [number for reference, number in coming if reference not in done]
    return min(range(workers), key=busy.count)
