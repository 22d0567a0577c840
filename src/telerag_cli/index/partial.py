"""An index folder while it is made: ``INDEX.partial/``, which one process at a time works in, and which gets its name when whole.

Its ``work/`` holds what is needed only until then: the lock, and in ``build.json`` what the index is made from, so that
an interrupted making goes on only with the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import IntArray, TableArray
from telerag_cli.config import Storage, format_bytes
from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.files import checksum, read_json, wrap_os_error, write_json, writing
from telerag_cli.index.artifact import FileInfo, IndexPaths, Manifest
from telerag_cli.progress import Progress, silent


def partial_of(root: Path) -> Path:
    """The folder beside ``root`` in which it is made."""
    return root.with_name(f"{root.name}.partial")


@dataclass(frozen=True)
class Making(ABC):
    """An index to be made: where, and from what."""

    root: Path
    parameters: dict[str, Any]
    """All that decides the index's bytes; a partial one with others is not continued."""

    sources: ClassVar[str] = "embeddings"
    """What it is made from, for messages."""

    @staticmethod
    @abstractmethod
    def parameters_of(manifest: Manifest) -> dict[str, Any]:
        """`parameters` of a finished index."""

    @property
    def partial(self) -> Path:
        """Where the index grows until it is whole."""
        return partial_of(self.root)

    @property
    def begun(self) -> bool:
        """A killed making can be continued."""
        return (self.partial / "work" / "build.json").exists() or IndexPaths(self.partial).manifest.exists()


def finished(making: Making) -> bool:
    """There is an index at ``making.root`` made with these parameters.

    Raises:
        ArtifactError: there is something else.
    """
    root = making.root
    if not root.exists():
        return False
    if not root.is_dir() or (any(root.iterdir()) and not IndexPaths(root).manifest.exists()):
        raise ArtifactError(f"{root} exists and is no index.", remedy="Choose another output or remove it.")
    if not any(root.iterdir()):
        return False
    return making.parameters_of(Manifest.load(IndexPaths(root).manifest)) == making.parameters


def left_bytes(root: Path) -> int:
    """What a killed making of ``root`` has left on the disk.

    Raises:
        TeleragError: it cannot be read.
    """
    partial = partial_of(root)
    try:
        files = [path for path in partial.rglob("*") if path.is_file()] if partial.is_dir() else []
        return sum(path.stat().st_blocks * 512 for path in files)
    except OSError as error:
        raise wrap_os_error(error, root) from error


def free_bytes(path: Path) -> int:
    """What is free on the disk that ``path`` is on, or would be.

    Raises:
        TeleragError: it cannot be found out.
    """
    try:
        existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise wrap_os_error(error, path) from error


def check_disk(path: Path, needed_bytes: int, remedy: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ResourceError: fewer bytes are free than needed.
    """
    free = free_bytes(path)
    if needed_bytes > free:
        raise ResourceError(
            f"{path} needs {format_bytes(needed_bytes)} of disk, and {format_bytes(free)} are free.", remedy=remedy
        )


def _refuse_other(found: dict[str, Any], making: Making, where: Path, verb: str) -> None:
    wanted = making.parameters
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        was = ", ".join(f"{name} {found.get(name)}" for name in other)
        now = ", ".join(f"{name} {wanted[name]}" for name in other)
        raise ArtifactError(
            f"{where} was {verb} with {was}, and this asks for {now}.",
            remedy=f"Use the same {making.sources} and options, another output, or --overwrite.",
        )


@contextlib.contextmanager
def claimed(making: Making, overwrite: bool) -> Iterator[None]:
    """Make the partial folder, or check that it was begun with the same parameters, and keep others out of it.

    Raises:
        ArtifactError: it is something else, or it or the index there is was made with other parameters.
        ResourceError: another process is at work in it.
    """
    root, partial = making.root, making.partial
    if IndexPaths(root).manifest.exists() and not overwrite:
        _refuse_other(making.parameters_of(Manifest.load(IndexPaths(root).manifest)), making, root, "built")
    work = partial / "work"
    if partial.exists() and not making.begun and not _is_barely_begun(partial):
        raise ArtifactError(f"{partial} exists and is no build of ours.", remedy="Remove it or choose another output.")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"Another telerag is building {root} right now.", remedy="Wait for it.") from error
        begun = None
        if IndexPaths(partial).manifest.exists():
            begun = making.parameters_of(Manifest.load(IndexPaths(partial).manifest))
        elif (work / "build.json").exists():
            begun = read_json(work / "build.json")
        if begun is not None and begun != making.parameters and overwrite:
            for path in partial.iterdir():
                if path != work:
                    path.unlink()
            for path in work.iterdir():
                if path.name != "lock":
                    path.unlink()
            begun = None
        if begun is None:
            write_json(work / "build.json", making.parameters)
        else:
            _refuse_other(begun, making, partial, "begun")
        yield


def _is_barely_begun(partial: Path) -> bool:
    """Killed before ``build.json`` was whole: nothing in it but the lock and a temporary file."""
    return all(path.name in ("work", "lock", ".build.json.partial") for path in partial.rglob("*"))


def publish(making: Making) -> None:
    """Drop what was needed for the making, and give the index its name."""
    root = making.root
    shutil.rmtree(making.partial / "work")
    replaced = root.with_name(f".{root.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if root.exists():
        root.rename(replaced)
    making.partial.rename(root)
    if replaced.exists():
        shutil.rmtree(replaced)


def seal(paths: IndexPaths, manifest: Manifest, sums: TableArray, whole: str, progress: Progress = silent) -> None:
    """Save the lists' checksums, sum the other files, and write the manifest, the last file of an index to appear.

    Args:
        paths: the folder.
        manifest: all of it but ``files`` and ``balance``.
        sums: checksum of each list, (nlist,), and
        whole: that of ``lists.bin``, both as `telerag_cli.index.verify.scan_lists` returns them.
        progress: shows that something is done.
    """
    save_array(paths.checksums, sums)
    others = [paths.centroids, paths.offsets, paths.checksums, paths.passages]
    others += [paths.quantizer] if manifest.storage is Storage.INT8 else []
    others += [paths.vectors] if manifest.kept_vectors else []
    with progress("Checking the other files", None):
        files = {path.name: FileInfo(path.stat().st_size, checksum(path)) for path in others}
    files[paths.lists.name] = FileInfo(paths.lists.stat().st_size, whole)
    sizes = np.load(paths.offsets)[:, 0].astype(np.int64)
    replace(manifest, files=dict(sorted(files.items())), balance=balance(sizes)).save(paths.manifest)


def balance(sizes: IntArray) -> dict[str, float]:
    """How even the lists are: vectors in the least, median and largest, empty lists, and Faiss's imbalance factor.

    The factor is ``nlist * sum(size^2) / (sum size)^2``: 1 if all are equal, and the expected cost of a probe of a
    random vector's list over that.
    """
    total = int(sizes.sum())
    return {
        "min": int(sizes.min()),
        "median": float(np.median(sizes)),
        "max": int(sizes.max()),
        "empty": int((sizes == 0).sum()),
        "imbalance": round(float(len(sizes) * (sizes.astype(np.float64) ** 2).sum() / total**2), 4),
    }


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as ``.npy``, atomically."""
    with writing(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array)


@contextlib.contextmanager
def sized(path: Path, size: int) -> Iterator[int]:
    """A descriptor of a file of this many bytes, to be written in any order; what was there stays, the rest is zeros."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at byte ``offset``."""
    data = memoryview(data)
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
