"""Attack artifacts on disk: flipped bytes and truncations, openings while a publisher swaps, and two writers at once.

What is flipped is opened in child processes, so that a crash or a hang is counted and not suffered. Prints counts; the
exit status is 1 if there was anything but refusals and results that are the same as before.

    scripts/fuzz_artifacts.py --flips 2000 --openings 10000 --rounds 16
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.build_config import BuildConfig, EmbedConfig
from telerag_cli.config import KeptType, Storage
from telerag_cli.corpus.description import DESCRIPTION, FORMAT
from telerag_cli.corpus.embeddings import Embeddings, check_shards
from telerag_cli.corpus.passages import Passage
from telerag_cli.datasets.cache import MANIFEST, Cached, Fetched
from telerag_cli.datasets.catalogue import describe
from telerag_cli.datasets.prepare import prepare
from telerag_cli.embedding.encoder import Encoder, EncoderInfo
from telerag_cli.embedding.job import embed
from telerag_cli.embedding.shards import describe_shard, write_shard
from telerag_cli.errors import TeleragError
from telerag_cli.files import HeldFolder, write_sealed_json
from telerag_cli.index.artifact import Index
from telerag_cli.index.build import build_index
from telerag_cli.index.partial import publish
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.index.verify import verify
from telerag_cli.planning.averages import Averages
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.host import open_host_tier

ROWS, DIMENSION, NLIST, SHARD_ROWS = 1500, 16, 8, 500
HANG_S = 30
CHILD_BYTES = 2 << 30
"""Address space that a child may take beside what it begins with: no flipped number may ask for more."""
GOOD = ("refused", "harmless")

fork = multiprocessing.get_context("fork")


def make_embeddings(folder: Path, seed: int) -> Path:
    """Write a folder of embeddings as ``telerag embed`` does, of made-up passages and vectors."""
    folder.mkdir(parents=True)
    vectors = np.random.default_rng(seed).standard_normal((ROWS, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    header = {"format": FORMAT, "version": 1, "model": f"m{seed}", "dimension": DIMENSION, "dtype": "float32"}
    shards = []
    for number, first in enumerate(range(0, ROWS, SHARD_ROWS)):
        rows = [Passage(f"{seed}-{n}", f"Text {n} of {seed}.", {"n": n}) for n in range(first, first + SHARD_ROWS)]
        path = folder / f"shard-{number:05d}.parquet"
        write_shard(
            path, rows, vectors[first : first + SHARD_ROWS], {**header, "corpus": "made up", "first_row": first}
        )
        shards.append(describe_shard(path))
    write_sealed_json(folder / DESCRIPTION, {**header, "complete": True, "rows": ROWS, "shards": shards})
    return folder


def make_index(embeddings: Path, root: Path) -> Path:
    """Build an index that has every file an index may have."""
    build_index(embeddings, root, BuildConfig(NLIST, storage=Storage.INT8, keep_vectors=KeptType.FLOAT16))
    return root


def read_index(root: Path) -> Any:
    """All that a user gets of an index: results of searches over all lists, and the passages."""
    index = Index.open(root)
    passages = Passages.open(index.held(index.paths.passages), index.manifest.ntotal, index.batch_checksums)
    coarse = Coarse(index.centroids, index.manifest.metric)
    queries: FloatArray = np.eye(DIMENSION, dtype=np.float32)[:4]
    with contextlib.closing(Retriever(index, coarse, open_host_tier(index, coarse, 1 << 20))) as retriever:
        found = retriever.search(queries, 5, NLIST)
    texts = [passages[rows] for rows in found.rows.tolist()]
    return found.scores.tolist(), found.rows.tolist(), texts, index.manifest.embedder, passages[[0, ROWS - 1]]


def sample_index(root: Path) -> Any:
    """Something of each of an index's files, read as they are in use."""
    index = Index.open(root)
    assert index.vectors is not None
    assert index.trained is not None
    small = [index.centroids, index.table, index.trained, index.checksums, index.batch_checksums]
    passages = Passages.open(index.held(index.paths.passages), index.manifest.ntotal, index.batch_checksums)
    with index.held(index.paths.lists).open("rb") as lists:
        first = lists.read(int(index.list_bytes[0]))
    index.check_list(0, np.frombuffer(first, np.uint8))
    kept = index.vectors[np.array([0, ROWS - 1])]
    return (
        index.manifest.source,
        [np.asarray(part).tobytes() for part in (*small, kept)],
        first,
        passages[[0, ROWS - 1]],
    )


def read_embeddings(folder: Path) -> Any:
    """All that an index is built of: vectors and passages."""
    embeddings = Embeddings.open(folder)
    check_shards(embeddings, lambda _count: None)
    vectors = [block.tobytes() for _, block in embeddings.batches(SHARD_ROWS)]
    passages = [batch.to_pydict() for batch in embeddings.passages()]
    told = embeddings.description
    return vectors, passages, embeddings.dimension, [told.get(name) for name in ("model", "prompt", "pooling")]


def whole(root: Path) -> bool:
    """Whether ``telerag inspect --verify`` finds nothing."""
    try:
        return not verify(Index.open(root), lambda _count: None)
    except TeleragError:
        return False


def damages(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Files, a place in each, and the bits to flip there, 0 to cut the file off; every file gets its share."""
    random = np.random.default_rng(seed)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        yield path, int(random.integers(path.stat().st_size)), 0 if number % 10 == 9 else 1 << int(random.integers(8))


def attack(folder: Path, read: Callable[[Path], Any], cases: list[tuple[Path, int, int]], out: Connection) -> None:
    """Send the outcome of each damage; run in a child."""
    expected = read(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CHILD_BYTES, used + CHILD_BYTES))
    out.send("ready")
    for path, place, bits in cases:
        data = path.read_bytes()
        changed = data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :] if bits else data[:place]
        path.write_bytes(changed)
        try:
            outcome = "harmless" if read(folder) == expected else "SILENTLY WRONG"
            if outcome == "harmless" and read is read_index and whole(folder):
                outcome = "NOT FOUND BY --verify"
        except TeleragError:
            outcome = "refused"
        except BaseException as error:  # the kind is what is counted
            outcome = f"TRACEBACK {type(error).__name__}: {error}"[:150]
        path.write_bytes(data)
        out.send(outcome)


def flips(folder: Path, read: Callable[[Path], Any], count: int, seed: int) -> Counter[str]:
    """Damage the files of an artifact one after another, and count what came of it."""
    cases, outcomes = list(damages(folder, count, seed)), Counter[str]()
    while cases:
        backup = folder.with_name("backup")
        shutil.copytree(folder, backup)
        here, there = fork.Pipe()
        child = fork.Process(target=attack, args=(folder, read, cases, there))
        child.start()
        there.close()
        try:
            while cases:
                if not here.poll(HANG_S):
                    raise TimeoutError
                if (outcome := here.recv()) != "ready":
                    outcomes[outcome] += 1
                    report(outcome, cases.pop(0))
        except (EOFError, TimeoutError) as error:
            outcomes["HANG" if isinstance(error, TimeoutError) else "CRASH"] += 1
            report(type(error).__name__, cases.pop(0))
        child.kill()
        child.join()
        shutil.rmtree(folder)
        backup.rename(folder)
    return outcomes


def report(outcome: str, case: tuple[Path, int, int]) -> None:
    """Name what should not have been."""
    if outcome not in GOOD:
        print(f"{outcome}: {case[0].name} byte {case[1]} bits {case[2]}", file=sys.stderr)


def swaps(folder: Path, sources: list[Path], count: int) -> Counter[str]:
    """Open an index so many times while another process swaps two of them without a pause."""
    made = [make_index(source, folder / f"swap{number}") for number, source in enumerate(sources)]
    known = [sample_index(root) for root in made]
    shutil.copytree(made[0], folder / "index")

    def publisher() -> None:
        for root in itertools.cycle([made[1], made[0]]):
            shutil.copytree(root, folder / "next")
            publish(folder / "next", folder / "index")

    process, outcomes, seen = fork.Process(target=publisher, daemon=True), Counter[str](), set()
    first = HeldFolder(folder / "index")
    seen.add(sample_index(folder / "index")[0])
    process.start()
    while not first.replaced():
        time.sleep(0.01)
    seen.add(sample_index(folder / "index")[0])
    for _ in range(count):
        try:
            found = sample_index(folder / "index")
            outcomes["one index" if found in known else "MIXED"] += 1
            seen.add(found[0])
        except Exception as error:  # the kind is what is counted
            outcomes[f"NOT THERE {type(error).__name__}: {error}"[:150]] += 1
    process.kill()
    process.join()
    outcomes[f"(of {len(seen)} different ones)"] += 0
    return outcomes


def together(*writers: Callable[[], object]) -> list[str]:
    """Run writers in processes that begin at one moment; what became of each."""
    start, told = fork.Barrier(len(writers)), fork.SimpleQueue()

    def run(writer: Callable[[], object]) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        start.wait()
        try:
            writer()
            told.put("won")
        except TeleragError as error:
            told.put(f"told: {error.code}")
        except BaseException as error:  # the kind is what is counted
            told.put(f"TRACEBACK {type(error).__name__}: {error}"[:150])

    processes = [fork.Process(target=run, args=(writer,)) for writer in writers]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sorted(told.get() for _ in processes)


def two_writers(
    folder: Path, write: Callable[[int, Path], object], read: Callable[[Path], Any], rounds: int
) -> Counter[str]:
    """Two writers of different things to one place, so many times: what is there is one of the two, whole."""
    known = []
    for number in range(2):
        write(number, folder / f"alone{number}")
        known.append(read(folder / f"alone{number}"))
    outcomes: Counter[str] = Counter()
    for number in range(rounds):
        place = folder / f"two{number}"
        told = together(partial(write, 0, place), partial(write, 1, place))
        outcomes[f"{', '.join(told)}; {'whole' if read(place) in known else 'MIXED'}"] += 1
    return outcomes


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files, without the date of what was prepared."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


class Letters:
    """An encoder that counts letters."""

    info, device, precision, doubts = EncoderInfo("letters", 4, "mean", True, None, 16, "xxh3:0"), "cpu", "float32", ()

    def decide(self, _texts: list[str]) -> None:
        """There is nothing to decide."""

    def encode(self, texts: list[str], _batch: int | None = None, _advance: object = None) -> FloatArray:
        """The numbers of four letters in each text."""
        return np.array([[text.count(letter) for letter in "etn1"] for text in texts], np.float32)


def write_embeddings(number: int, place: Path) -> None:
    """Embed one of two corpora."""
    corpus = [Passage(f"{number}-{n}", f"Text {n} of {number}.") for n in range(200)]
    embed(corpus, place, EmbedConfig(shard_rows=20), encoder=cast("Encoder", Letters()))


def write_prepared(cache: Path, number: int, place: Path) -> None:
    """Prepare the same dataset with one of two limits, from a cache in which it has been fetched."""
    description = cache / "small.toml"
    if not description.exists():
        description.write_text(
            'name = "small"\ntitle = ""\nwhat = ""\nhomepage = ""\nlicence = ""\nkind = "questions"\n'
            'parser = "flashrag"\n'
            'split = "test"\n[[files]]\nname = "a.jsonl"\naddress = "http://127.0.0.1/a.jsonl"\n'
        )
    cached = Cached.of(describe(str(description)), cache)
    data = b"".join(b'{"id": "%d", "question": "Who is %d?", "golden_answers": ["I"]}\n' % (n, n) for n in range(3000))
    if not cached.root.exists():
        cached.root.mkdir(parents=True)
        cached.path(cached.dataset.files[0]).write_bytes(data)
        cached.record(cached.dataset.files[0], Fetched("here", len(data), "0" * 64, "2026-01-01"))
    prepare(cached, None, (1000, 2500)[number], place, lambda _count: None)


def writers_of_averages(folder: Path, rounds: int) -> Counter[str]:
    """Four processes that add to the same averages: nothing is lost."""

    def add(path: Path) -> None:
        averages = Averages(path)
        for _ in range(25):
            averages.observe("stage", "tokens", 1.0)
            averages.save()

    outcomes: Counter[str] = Counter()
    for number in range(rounds):
        path = folder / f"averages{number}.json"
        told = together(*[partial(add, path)] * 4)
        outcomes[f"{', '.join(told)}; {Averages(path)._known['stage tokens'][1]} of 100 kept"] += 1
    return outcomes


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=2000, help="damages, spread evenly over all files")
    parser.add_argument("--openings", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=16, help="rounds of writers at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bad = False
    with tempfile.TemporaryDirectory(prefix="telerag-fuzz-") as name:
        folder, sources = Path(name), []
        for number in range(2):
            sources.append(make_embeddings(folder / f"embeddings{number}", number))
        root = make_index(sources[0], folder / "flipped")
        files = {place: sum(1 for _ in place.iterdir()) for place in (root, sources[0])}
        tasks: dict[str, Callable[[], Counter[str]]] = {}
        for place, read in ((root, read_index), (sources[0], read_embeddings)):
            share = options.flips * files[place] // sum(files.values())
            tasks[f"{share} flips and truncations, {read.__name__}"] = partial(flips, place, read, share, options.seed)
        tasks[f"{options.openings} openings"] = partial(swaps, folder, sources, options.openings)
        writers: dict[str, tuple[Callable[[int, Path], object], Callable[[Path], Any]]] = {
            "index": (lambda number, place: make_index(sources[number], place), read_index),
            "embeddings": (write_embeddings, files_of),
            "prepared": (partial(write_prepared, folder), files_of),
        }
        for what, (write, get) in writers.items():
            (folder / f"writers of {what}").mkdir()
            tasks[f"{options.rounds} rounds of two writers of {what}"] = partial(
                two_writers, folder / f"writers of {what}", write, get, options.rounds
            )
        tasks[f"{options.rounds} rounds of four savers"] = partial(writers_of_averages, folder, options.rounds)
        for what, task in tasks.items():
            began_s, outcomes = time.monotonic(), task()
            bad |= any(word.isupper() and len(word) > 3 for outcome in outcomes for word in outcome.split())
            print(f"{what} ({time.monotonic() - began_s:.0f} s): {dict(outcomes)}", flush=True)
    return int(bad)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # children are forked, and wait for OpenMP's threads, which are not
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    sys.exit(main())
