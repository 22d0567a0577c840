"""A dataset's folder in the cache: its files as they were fetched, what is known of each, and what was made of them.

NAME/FILE              as its publisher has it
NAME/FILE.part         what has come of it so far, and beside it FILE.part.json: from where, and of which version
NAME/source.json       from where and when each file came, its size and its checksums
NAME/prepared/         what `telerag data prepare` made
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from telerag_cli.datasets.catalogue import Dataset, RemoteFile
from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.files import cache_folder, read_json, wrap_os_error, write_json

PREPARED = "prepared"
MANIFEST = "prepared.json"
CORPUS, QUESTIONS, QRELS = "corpus.jsonl", "questions.jsonl", "qrels.tsv"


@dataclass(frozen=True)
class Fetched:
    """What ``source.json`` says of a file."""

    address: str
    """From where it came."""
    bytes: int
    sha256: str
    date: str
    """ISO 8601, UTC."""
    md5: str | None = None
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class Begun:
    """What is noted of a file that is on its way, so that the rest is asked for of the same version only."""

    address: str
    etag: str | None
    last_modified: str | None
    bytes: int | None
    """Of the whole file, if the server told."""


@dataclass(frozen=True)
class PreparedFile:
    """A file that was made, with what is needed to check it."""

    rows: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What ``prepared.json`` says: what was made, and of what."""

    dataset: str
    split: str | None
    limit: int | None
    sources: dict[str, str]
    """SHA-256 by file."""
    files: dict[str, PreparedFile]
    left_out: int
    """Entries that could not be used, and passages without any text."""
    date: str

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """What `save` wrote, or None if nothing was prepared there.

        Raises:
            ArtifactError: it is damaged.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        raw = read_json(path)
        try:
            return cls(**{**raw, "files": {name: PreparedFile(**each) for name, each in raw["files"].items()}})
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {error}.", remedy="Run telerag data prepare again.") from error


@dataclass(frozen=True)
class Cached:
    """A dataset and its folder."""

    dataset: Dataset
    root: Path

    @classmethod
    def of(cls, dataset: Dataset, cache_dir: Path | None = None) -> Cached:
        """Its folder below ``cache_dir``, or below the user's cache."""
        return cls(dataset, (cache_dir or cache_folder() / "datasets") / dataset.name)

    def path(self, file: RemoteFile) -> Path:
        """Where a file lies once it is whole."""
        return self.root / file.name

    def partial(self, file: RemoteFile) -> Path:
        """Where it grows."""
        return self.root / f"{file.name}.part"

    def note(self, file: RemoteFile) -> Path:
        """Where it is noted what it is that grows."""
        return self.root / f"{file.name}.part.json"

    @property
    def prepared(self) -> Path:
        """Where it is prepared if nobody says where."""
        return self.root / PREPARED

    def sources(self) -> dict[str, Fetched]:
        """What was fetched, by file.

        Raises:
            ArtifactError: ``source.json`` is damaged.
        """
        path = self.root / "source.json"
        if not path.exists():
            return {}
        raw = read_json(path)
        try:
            return {name: Fetched(**each) for name, each in raw["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is damaged: {error}.", remedy="Remove it and fetch the dataset again."
            ) from error

    def record(self, file: RemoteFile, fetched: Fetched) -> None:
        """Note that a file is about to be whole."""
        files = {name: asdict(each) for name, each in self.sources().items()}
        files[file.name] = asdict(fetched)
        write_json(self.root / "source.json", {"dataset": self.dataset.name, "files": files})

    def begun(self, file: RemoteFile) -> tuple[int, Begun | None]:
        """Bytes that have come of a file, and of which version; nothing if it cannot be told of which."""
        part = self.partial(file)
        if not (part.exists() and self.note(file).exists()):
            return 0, None
        try:
            return part.stat().st_size, Begun(**read_json(self.note(file)))
        except (ArtifactError, TypeError):  # torn: then it begins anew
            return 0, None

    def has(self, file: RemoteFile) -> bool:
        """Whether it is there, of the size that was noted; `telerag data check` reads it."""
        known = self.sources().get(file.name)
        path = self.path(file)
        return known is not None and path.is_file() and path.stat().st_size == known.bytes

    def fetching(self, split: str | None) -> str:
        """The command that fetches what a split needs, and no more."""
        single = split is None or len(self.dataset.files) == 1
        return f"telerag data fetch {self.dataset.name}{'' if single else f' --split {split}'}"

    def state(self) -> str:
        """In a word or two, for a list: absent, partial n%, fetched, prepared, damaged."""
        try:
            return self._state()
        except ArtifactError:
            return "damaged"

    def _state(self) -> str:
        manifest = Manifest.load(self.prepared)
        if manifest is not None:
            parts = [part for part in (manifest.split, f"first {manifest.limit:,}" if manifest.limit else None) if part]
            return f"prepared ({', '.join(parts)})" if parts else "prepared"
        whole = [file for file in self.dataset.files if self.has(file)]
        if len(whole) == len(self.dataset.files):
            return "fetched"
        begun = [file for file in self.dataset.files if file not in whole and self.begun(file)[0]]
        if begun:
            return self._progress(whole, begun)
        return f"fetched ({', '.join(file.split or file.name for file in whole)})" if whole else "absent"

    def _progress(self, whole: list[RemoteFile], begun: list[RemoteFile]) -> str:
        come = total = 0
        for file in [*whole, *begun]:
            size, note = self.begun(file) if file in begun else (self.path(file).stat().st_size, None)
            expected = size if file in whole else (note.bytes if note and note.bytes else file.size)
            if expected is None:
                return "partial"
            come, total = come + size, total + expected
        return f"partial {min(99, 100 * come // max(total, 1))}%"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder.

        Raises:
            ResourceError: another one does, or the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("w")
        except OSError as error:
            raise wrap_os_error(error, self.root) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResourceError(
                    f"Another telerag is at work in {self.root}.", remedy="Wait for it, or give another --cache-dir."
                ) from None
            yield
