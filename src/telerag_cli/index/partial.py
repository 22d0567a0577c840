"""An index folder while it is made: ``INDEX.partial/``, which one process works in and which gets its name when whole.

Every way to make an index resumes in the same manner. A stage's files appear whole, or grow beside a checkpoint that
says how far they are good; what is there is not made again. ``work/`` holds what is needed only meanwhile: the
checkpoints, and in ``build.json`` what the index is made from, so that a killed run goes on only with the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import IntArray, TableArray
from telerag_cli.config import Storage
from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.files import (
    check_disk,
    checksum,
    exclusive,
    read_json,
    replacing,
    sync_folder,
    wrap_os_error,
    write_json,
)
from telerag_cli.index.artifact import FileInfo, IndexPaths, Manifest
from telerag_cli.index.npy import row_checksums
from telerag_cli.index.passages import batch_checksums
from telerag_cli.progress import Progress, silent

RECORDED = {
    "embeddings": "source",
    "files": "source",
    "source": "source",
    "rows": "ntotal",
    "dimension": "dimension",
    "metric": "metric",
    "storage": "storage",
    "nlist": "nlist",
    "seed": "seed",
    "training rows": "training_rows",
    "training device": "trained_on",
    "kept vectors": "kept_vectors",
    "embedder": "embedder.model",
    "version": "created_by",
}
"""Where the manifest of a finished index records each of `Draft.parameters`."""


def partial_of(root: Path) -> Path:
    """The folder beside ``root`` in which it is made."""
    return root.with_name(f"{root.name}.partial")


@dataclass(frozen=True)
class Draft:
    """An index to be made: where, and from what."""

    root: Path
    parameters: dict[str, Any]
    """All that decides the index's bytes, by the names in `RECORDED`; a run begun with others is not continued."""
    needed_bytes: int
    """Bytes of disk that all of it takes until it is finished."""

    made_from: ClassVar[str] = "embeddings"

    @property
    def partial(self) -> Path:
        """The folder in which the index grows until it is whole."""
        return partial_of(self.root)

    @property
    def paths(self) -> IndexPaths:
        """The files of the index while it grows."""
        return IndexPaths(self.partial)

    @property
    def work(self) -> Path:
        """The folder of what is needed only meanwhile."""
        return self.partial / "work"

    @property
    def begun(self) -> bool:
        """Whether a killed run can be continued."""
        return (self.work / "build.json").exists() or self.paths.manifest.exists()

    @property
    def left_bytes(self) -> int:
        """Bytes on disk that a killed run has left; raises TeleragError if the folder cannot be read."""
        try:
            return sum(path.stat().st_blocks * 512 for path in self.partial.rglob("*") if path.is_file())
        except OSError as error:
            raise wrap_os_error(error, self.root) from error

    def finished(self, *, overwrite: bool = False) -> bool:
        """Whether the index is there, made with these parameters, and is not to be replaced.

        Raises:
            ArtifactError: ``root`` is something else, or an index of other parameters that is not to be replaced.
        """
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            return False
        manifest = IndexPaths(self.root).manifest
        if not manifest.exists():
            raise ArtifactError(
                f"{self.root} exists and is not an index.", remedy="Choose another output or remove it."
            )
        if not overwrite:
            self._refuse_other(self._recorded(manifest), self.root, "built")
        return not overwrite

    @contextlib.contextmanager
    def claimed(self, *, overwrite: bool = False, remedy: str) -> Iterator[None]:
        """Hold the partial folder, new or begun with the same parameters; give the index its name afterwards.

        ``overwrite`` starts over if it was begun with other parameters; ``remedy`` is for a disk that is too small.

        Raises:
            ArtifactError: the folder is something else, or was begun with other parameters.
            ResourceError: another process is at work in it or has just finished, or the disk cannot hold what is still
                to be written.
        """
        check_disk(self.root, self.needed_bytes - self.left_bytes, remedy)
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(self.root):
                if not overwrite and self.finished():
                    raise ResourceError(f"Another telerag has just built {self.root}.", remedy="Run it again.")
                if self.partial.exists() and not self.begun and not self._is_barely_begun():
                    raise ArtifactError(
                        f"{self.partial} exists and is not an unfinished index.",
                        remedy="Remove it or choose another output.",
                    )
                self.work.mkdir(parents=True, exist_ok=True)
                self._begin(overwrite)
                yield
                shutil.rmtree(self.work)
                publish(self.partial, self.root)
        except OSError as error:
            raise wrap_os_error(error, self.partial) from error

    def _begin(self, overwrite: bool) -> None:
        build = self.work / "build.json"
        begun = None
        if self.paths.manifest.exists():
            begun = self._recorded(self.paths.manifest)
        elif build.exists():
            begun = read_json(build)
        if begun is not None and (begun == self.parameters or not overwrite):
            self._refuse_other(begun, self.partial, "begun")
            return
        for path in (*self.partial.iterdir(), *self.work.iterdir()):
            if path != self.work:
                path.unlink()
        write_json(build, self.parameters)

    def _recorded(self, path: Path) -> dict[str, Any]:
        manifest = Manifest.load(path)
        return {name: attrgetter(RECORDED[name])(manifest) for name in self.parameters}

    def _refuse_other(self, found: dict[str, Any], where: Path, verb: str) -> None:
        wanted = self.parameters
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            was, now = (", ".join(f"{name} {_shown(values.get(name))}" for name in other) for values in (found, wanted))
            raise ArtifactError(
                f"{where} was {verb} with {was}, and this asks for {now}.",
                remedy=f"Use the same {self.made_from} and options, another output, or --overwrite.",
            )

    def _is_barely_begun(self) -> bool:
        """Killed before ``build.json`` was whole: nothing in it but what belongs to writing that."""
        return all(path.name == "work" or path.name.startswith(".build.json.") for path in self.partial.rglob("*"))


def publish(made: Path, root: Path) -> None:
    """Give a finished folder its name; another folder of that name is exchanged with it at once, and then removed.

    On file systems that cannot exchange, nothing has the name for a moment.

    Raises:
        OSError: it cannot be renamed.
    """
    sync_folder(made)
    replaced = root.with_name(f".{root.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if root.exists():
        if _exchange(made, root):
            made.rename(replaced)
        else:
            root.rename(replaced)
            made.rename(root)
    else:
        made.rename(root)
    sync_folder(root.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names by ``renameat2``; False where the system or the file system has no such call."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    here = ctypes.c_int(-100)  # AT_FDCWD
    if library.renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(2)) == 0:  # RENAME_EXCHANGE
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _shown(value: Any) -> Any:
    return "none" if value in ("", None) else value


def seal(paths: IndexPaths, manifest: Manifest, sums: TableArray, whole: str, progress: Progress = silent) -> None:
    """Save the checksums of lists, batches of passages and kept vectors, sum the files, and write the manifest last.

    The manifest lacks ``files`` and ``balance`` still. `telerag_cli.index.verify.scan_lists` returns ``sums`` and
    ``whole``, the checksums of each list and of ``lists.bin``.
    """
    save_array(paths.checksums, sums)
    with progress("Summing passages", None):
        save_array(paths.batch_checksums, batch_checksums(paths.passages))
    if manifest.kept_vectors:
        with progress("Summing vectors", None):
            save_array(paths.row_checksums, row_checksums(paths.vectors))
    others = [paths.centroids, paths.offsets, paths.checksums, paths.passages, paths.batch_checksums]
    others += [paths.quantizer] if manifest.storage is Storage.INT8 else []
    others += [paths.vectors, paths.row_checksums] if manifest.kept_vectors else []
    with progress("Checking the other files", None):
        files = {path.name: FileInfo(path.stat().st_size, checksum(path)) for path in others}
    files[paths.lists.name] = FileInfo(paths.lists.stat().st_size, whole)
    sizes = np.load(paths.offsets)[:, 0].astype(np.int64)
    replace(manifest, files=dict(sorted(files.items())), balance=_balance(sizes)).save(paths.manifest)


def _balance(sizes: IntArray) -> dict[str, float]:
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
    with replacing(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write named arrays as ``.npz``, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays)
