"""A dataset's folder in the cache: its files as they were fetched, and what was made of them.

NAME/FILE              as its publisher has it
NAME/FILE.part         what has arrived so far, and beside it FILE.part.json: from where, and which version
NAME/source.json       from where and when each file came, its size and its checksums
NAME/prepared/         what `telerag data prepare` made
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from telerag_cli.datasets.catalogue import Dataset, RemoteFile
from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.files import cache_folder, read_json, wrap_os_error, write_json

MANIFEST = "prepared.json"
CORPUS, QUESTIONS, QRELS = "corpus.jsonl", "questions.jsonl", "qrels.tsv"


T = TypeVar("T")


def _read(kind: type[T], path: Path, remedy: str) -> T | None:
    """Return what a file of notes says, or None if there is no such file."""
    if not path.exists():
        return None
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged.", remedy=remedy) from error


@dataclass(frozen=True)
class Fetched:
    """What ``source.json`` says of a file."""

    address: str
    bytes: int
    sha256: str
    date: str
    """ISO 8601, UTC."""


@dataclass(frozen=True)
class Begun:
    """What ``FILE.part.json`` says of a file that is on its way, so that only the same version of it is continued."""

    address: str
    condition: str | None = None
    """The server's ETag or date, for ``If-Range``."""
    bytes: int | None = None
    """Size of the whole file, if the server says."""
    sha256: str | None = None
    """SHA-256 of the whole file, if the server says."""


@dataclass(frozen=True)
class PreparedFile:
    """A file that was made, with what is needed to check it."""

    rows: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class PreparedManifest:
    """What ``prepared.json`` says: what was made, and from what."""

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
        """Write it atomically."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> PreparedManifest | None:
        """Read what `save` wrote; None if nothing was prepared there.

        Raises:
            ArtifactError: it is damaged.
        """
        return _read(cls, folder / MANIFEST, "Run telerag data prepare again.")


@dataclass(frozen=True)
class _Sources:
    dataset: str
    files: dict[str, Fetched]


@dataclass(frozen=True)
class Cached:
    """A dataset and its folder."""

    dataset: Dataset
    root: Path

    @classmethod
    def of(cls, dataset: Dataset, cache_dir: Path | None = None) -> Cached:
        """Return the dataset's folder below ``cache_dir``, or below the user's cache."""
        return cls(dataset, (cache_dir or cache_folder() / "datasets") / dataset.name)

    def path(self, file: RemoteFile) -> Path:
        """Return where a complete file is."""
        return self.root / file.name

    def partial(self, file: RemoteFile) -> Path:
        """Return where a file grows."""
        return self.root / f"{file.name}.part"

    def note(self, file: RemoteFile) -> Path:
        """Return where `Begun` of a growing file is kept."""
        return self.root / f"{file.name}.part.json"

    @property
    def prepared(self) -> Path:
        """Folder in which it is prepared by default."""
        return self.root / "prepared"

    def sources(self) -> dict[str, Fetched]:
        """Return what was fetched, by file name.

        Raises:
            ArtifactError: ``source.json`` is damaged.
        """
        found = _read(_Sources, self.root / "source.json", "Remove it and fetch the dataset again.")
        return found.files if found else {}

    def record(self, file: RemoteFile, fetched: Fetched) -> None:
        """Note a file that is about to be complete."""
        write_json(
            self.root / "source.json", asdict(_Sources(self.dataset.name, {**self.sources(), file.name: fetched}))
        )

    def begun(self, file: RemoteFile) -> tuple[int, Begun | None]:
        """Return how many bytes of a file have arrived, and of which version; nothing if the version is unknown."""
        part = self.partial(file)
        try:
            begun = _read(Begun, self.note(file), "")
        except ArtifactError:  # torn: it starts over
            begun = None
        return (part.stat().st_size, begun) if begun and part.exists() else (0, None)

    def has(self, file: RemoteFile) -> bool:
        """Say whether a file is there in the size that was noted; `telerag data check` reads its bytes."""
        known = self.sources().get(file.name)
        path = self.path(file)
        return known is not None and path.is_file() and path.stat().st_size == known.bytes

    def fetch_command(self, split: str | None) -> str:
        """Return the command that fetches what a split needs, and no more."""
        single = split is None or len(self.dataset.files) == 1
        return f"telerag data fetch {self.dataset.name}{'' if single else f' --split {split}'}"

    def state(self) -> str:
        """Return the state in a word or two: absent, partial n%, fetched, prepared or damaged."""
        try:
            manifest = PreparedManifest.load(self.prepared)
            complete = [file for file in self.dataset.files if self.has(file)]
        except ArtifactError:
            return "damaged"
        if manifest is not None:
            parts = [manifest.split, f"first {manifest.limit:,}" if manifest.limit else None]
            return f"prepared ({', '.join(filter(None, parts))})" if any(parts) else "prepared"
        if len(complete) == len(self.dataset.files):
            return "fetched"
        begun = [(*self.begun(file), file.size) for file in self.dataset.files if file not in complete]
        on_the_way = [(size, (note and note.bytes) or expected) for size, note, expected in begun if size]
        if on_the_way:
            arrived, total = (sum(each or 0 for each in column) for column in zip(*on_the_way, strict=True))
            known = all(expected for _, expected in on_the_way)
            return f"partial {min(99, 100 * arrived // total)}%" if known else "partial"
        return f"fetched ({', '.join(file.split or file.name for file in complete)})" if complete else "absent"

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
