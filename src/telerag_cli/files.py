"""Files that a reader never sees half-written, errors of the disk in words, and checksums."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.text import parse_json
from telerag_cli.units import format_bytes

CHUNK_BYTES = 4 << 20
END_BYTES = 1 << 20


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and renamed onto ``path``.

    Raises:
        ResourceError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise wrap_os_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def wrap_os_error(error: OSError, path: Path) -> ResourceError | ArtifactError:
    """The sentence for an ``OSError`` met while reading or writing ``path``."""
    if error.errno == errno.ENOSPC:
        return ResourceError(
            f"The disk is full: {path} could not be written and {format_bytes(free_bytes(path))} are free.",
            remedy="Free space and run the same command again; what is finished is kept.",
        )
    if error.errno in (errno.EFBIG, errno.EDQUOT):
        return ResourceError(
            f"{path} could not be written: {error.strerror}, which is a limit set for this user or file system.",
            remedy="Raise it or choose another output; finished parts are kept and the same command resumes.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"{path} cannot be used: {error.strerror}.", remedy="Choose a path you may use.")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return ArtifactError(f"{path} does not exist or is not a folder.", remedy="Check the path.")
    return ResourceError(f"{path}: {error.strerror or error}.", remedy="Check the path and the device.")


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that ``path`` is on, or would be on.

    Raises:
        TeleragError: the disk cannot be asked.
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


def cache_folder() -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/telerag``, or ``~/.cache/telerag``.

    Raises:
        ResourceError: this user has no home, as in many containers.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "telerag"
    except RuntimeError as error:
        raise ResourceError(
            "This user has no home folder, and so no cache.", remedy="Set XDG_CACHE_HOME or HOME to a folder."
        ) from error


def write_json(path: Path, value: Any, *, sort_keys: bool = True, parents: bool = False) -> None:
    """Write ``value`` as JSON, atomically; with ``parents`` its folder is made.

    Keys are sorted, so that equal values give equal bytes, unless their order means something.
    """
    if parents:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise wrap_os_error(error, path.parent) from error
    with writing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing or not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise wrap_os_error(error, path) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}.", remedy="Build the artifact again.") from error


def checksum(path: Path) -> str:
    """xxh3-64 of a file's bytes, as ``xxh3:<16 hex digits>``."""
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as handle:
        while block := handle.read(CHUNK_BYTES):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def ends_of(path: Path) -> tuple[int, bytes]:
    """The size of a file in bytes, and its first and last MiB: what tells files apart without reading all of them."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        first = handle.read(END_BYTES)
        handle.seek(max(0, size - END_BYTES))
        return size, first + handle.read(END_BYTES)


def read_exactly(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    """Read ``count`` bytes at byte ``offset``; ``path`` is named in the error.

    Raises:
        ArtifactError: the file ends before.
    """
    data = os.pread(descriptor, count, offset)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), offset + len(data))
        if not more:
            raise ArtifactError(
                f"{path} ends at byte {offset + len(data):,}, and {offset + count:,} were expected.",
                remedy="Restore the file or build the index again.",
            )
        data += more
    return data


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at byte ``offset``."""
    data = memoryview(data)
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def sized(path: Path, size: int | None = None) -> Iterator[int]:
    """Open a file for writing in any order, made ``size`` bytes long: what was there stays, the rest is zeros.

    Yields:
        The file's descriptor.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if size is not None:
            os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)
