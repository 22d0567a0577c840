"""A pool of workers that a stream of items runs through, by Ray Data.

Ray Data reads from files, whose number it knows; our items come one after another from an iterator of this process. So
a `Datasource` with a single task takes them from a small actor, the feed, which holds those that are under way: if the
task or a worker is lost, Ray does it again and finds its items still there. The task sits behind no CPU of its own, so
Ray Data does not fuse it with the workers' map, and each item is a block by itself, so none waits for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import pickle
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from telerag_cli.distributed.session import Cluster, cause
from telerag_cli.errors import ResourceError

T = TypeVar("T")
R = TypeVar("R")

BLOCK_BYTES = 1
"""Ray Data gathers rows until a block has so many bytes: a row each."""
UNDER_WAY = 2
"""Items that a worker has at once: the one it works on and the next."""
MAX_TRIES = 4
"""Of an item: Ray would begin again for ever what kills its worker each time, as too little memory does."""


def stream(
    items: Iterable[T],
    make_worker: Callable[[], Callable[[T], R]],
    workers: int,
    *,
    cpus_each: float = 1,
    gpus_each: float = 0,
    ahead: int | None = None,
    environment: dict[str, str] | None = None,
) -> Generator[R]:
    """Run items through workers; inside of `telerag_cli.distributed.session.joined`.

    Args:
        items: pickled one by one, and read from no thread but the caller's. What it raises is raised here once the
            results of the items before are out.
        make_worker: called once in each worker's process; pickled, as are the results of what it makes.
        workers: how many.
        cpus_each: CPUs of the cluster that each takes.
        gpus_each: likewise.
        ahead: items that may have been read and whose results are not out; twice as many as workers, and one.
        environment: variables of the workers' processes.

    Yields:
        The results, in the order of the items.

    Raises:
        Exception: what a worker raised, as it raised it. A worker that dies is started again, and its items are done
            again.
        ResourceError: an item's workers died again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    ahead = ahead or UNDER_WAY * workers + 1
    feed = ray.remote(_Feed).options(num_cpus=0, max_concurrency=8).remote()
    source = _Source(iter(items), feed, ahead)
    failed: Exception | None = None
    try:
        source.fill()
        with contextlib.closing(_results(feed, make_worker, workers, cpus_each, gpus_each, environment)) as rows:
            for row in rows:
                result: R = pickle.loads(row["result"])
                source.done(row["number"])
                yield result
                source.fill()
        source.check()
    except RayError as error:
        failed = cause(error)
        if isinstance(error, RayTaskError):
            failed.add_note(f"In a worker: {error}")
    finally:
        ray.kill(feed)
    if failed is not None:
        # Not from inside the handler: Ray's error holds on to the workers, which would live as long as it does.
        gc.collect()
        raise failed


@dataclass(frozen=True)
class Pool:
    """Workers of a cluster; called, it runs items through them."""

    workers: int
    cpus_each: float
    gpus_each: float
    environment: dict[str, str] | None = None

    @classmethod
    def of(cls, cluster: Cluster, workers: int | None, *, gpus: bool, threads: int | None = None) -> Pool:
        """As many workers as asked for, or one for each GPU, or else for each CPU, or for so many CPUs as it has threads.

        Args:
            cluster: what `telerag_cli.distributed.session.joined` says; inside of it.
            workers: how many; more than there are GPUs or CPUs share them.
            gpus: they use the GPUs that there are.
            threads: of a worker, whatever it takes; None: as many as it has CPUs.
        """
        total = cluster.gpus if gpus else 0
        most = _fewest_cpus()
        each = min(threads or 1, most)
        count = workers or total or max(1, cluster.cpus // each)
        cpus = cluster.cpus / count
        if cluster.local and threads is None:
            each = max(1, int(cpus))  # of one machine, all of it is for them
        environment = None if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return cls(count, min(each, cpus), 1 / -(-count // total) if total else 0.0, environment)

    def __call__(self, items: Iterable[T], make_worker: Callable[[], Callable[[T], R]]) -> Generator[R]:
        """`stream` of the items through these workers."""
        return stream(
            items,
            make_worker,
            self.workers,
            cpus_each=self.cpus_each,
            gpus_each=self.gpus_each,
            environment=self.environment,
        )


def _fewest_cpus() -> int:
    """CPUs of the smallest machine that has any: a worker that needs more might be placed nowhere, and be waited for."""
    import ray

    return min(
        (int(cpus) for node in ray.nodes() if node["Alive"] and (cpus := node["Resources"].get("CPU", 0)) >= 1),
        default=1,
    )


class _Feed:
    """An actor: items by number, each kept until its result is out."""

    def __init__(self) -> None:
        self._items: dict[int, bytes] = {}
        self._first = 0
        self._end: int | None = None
        self._tries: dict[int, int] = {}
        self._changed = asyncio.Condition()

    async def add(self, items: dict[int, bytes], end: int | None) -> None:
        async with self._changed:
            self._items.update(items)
            self._end = end
            self._changed.notify_all()

    async def forget(self, number: int) -> None:
        """Results up to this one are out."""
        for passed in range(self._first, number + 1):
            self._items.pop(passed, None)
            self._tries.pop(passed, None)
        self._first = number + 1

    async def begun(self, number: int) -> int:
        """How often the item was begun, this time included."""
        self._tries[number] = self._tries.get(number, 0) + 1
        return self._tries[number]

    async def get(self, number: int) -> bytes | None:
        """The item, waited for; None after the last; empty if its result is out, which a task that begins again asks too."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._items or number < self._first or number == self._end)
            return None if number == self._end else self._items.get(number, b"")


class _Source(Generic[T]):
    """The caller's items on their way to the feed, never more of them than `ahead`."""

    def __init__(self, items: Iterator[T], feed: Any, ahead: int) -> None:
        self._items, self._feed, self._ahead = items, feed, ahead
        self._read = self._out = 0
        self._ended = False
        self._error: Exception | None = None

    def fill(self) -> None:
        import ray
        from ray import cloudpickle

        while not self._ended and self._read - self._out < self._ahead:
            try:
                added = {self._read: cloudpickle.dumps(next(self._items))}
                self._read += 1
            except StopIteration:
                added, self._ended = {}, True
            except Exception as error:  # results of the items before it are still to come
                added, self._ended, self._error = {}, True, error
            ray.get(self._feed.add.remote(added, self._read if self._ended else None))

    def done(self, number: int) -> None:
        assert number == self._out, f"result {number} came, and {self._out} was to come"
        self._out += 1
        self._feed.forget.remote(number)

    def check(self) -> None:
        """Raise what the items raised."""
        if self._error is not None:
            raise self._error
        assert self._ended
        assert self._out == self._read


class _Worker:
    """What Ray Data makes in each process of the pool."""

    def __init__(self, make: bytes, feed: Any) -> None:
        self._make, self._feed = make, feed
        self._work: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        tries = ray.get(self._feed.begun.remote(row["number"]))
        if tries > MAX_TRIES:
            raise ResourceError(
                f"Workers died {MAX_TRIES} times at the same piece of work, as they do for want of memory.",
                remedy="Use fewer --workers, and run the same command again.",
            )
        # Not in __init__: what is raised there reaches the caller as text only.
        if self._work is None:
            self._work = pickle.loads(self._make)()
        item = row["item"]
        result = self._work(pickle.loads(item)) if item else None
        return {"number": row["number"], "result": _dumps(result)}


def _dumps(value: Any) -> bytes:
    from ray import cloudpickle

    data: bytes = cloudpickle.dumps(value)
    return data


def _results(
    feed: Any,
    make_worker: Callable[[], Callable[[T], R]],
    workers: int,
    cpus_each: float,
    gpus_each: float,
    environment: dict[str, str] | None,
) -> Generator[dict[str, Any]]:
    """Rows of ``number`` and ``result`` in the order of the items."""
    import pyarrow as pa
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs, it raises
    with _unwarned():
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.target_min_block_size = 0

    def read() -> Iterator[pa.Table]:
        number = 0
        while (item := ray.get(feed.get.remote(number))) is not None:
            yield pa.table({"number": [number], "item": pa.array([item], pa.large_binary())})
            number += 1

    class Items(Datasource):  # type: ignore[misc]
        def get_name(self) -> str:
            return "items"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]

    items = ray.data.read_datasource(Items(), override_num_blocks=1, num_cpus=0)
    done = items.map(
        _Worker,
        fn_constructor_args=(_dumps(make_worker), feed),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=UNDER_WAY),
        num_cpus=cpus_each,
        num_gpus=gpus_each or None,
        runtime_env={"env_vars": environment} if environment else None,
    )
    rows = iter(done.iter_rows())
    with _unwarned():  # it begins here, and warns of how many items there are, which it cannot know
        first = next(rows, None)
    if first is not None:
        yield first
        yield from rows


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Let Ray warn of its own defaults, where warnings may be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
