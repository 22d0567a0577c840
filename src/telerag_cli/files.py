"""Writing so that a reader never sees half a file, and checking what was written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from telerag_cli.config import format_bytes
from telerag_cli.errors import ArtifactError, ResourceError

CHUNK_BYTES = 4 << 20


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
        import shutil

        existing = next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))
        free = format_bytes(shutil.disk_usage(existing).free)
        return ResourceError(
            f"The disk is full: {path} could not be written and {free} are free.",
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


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ``$XDG_CACHE_HOME/telerag``, or ``~/.cache/telerag``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "telerag"


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write ``value`` as JSON, atomically; with sorted keys, unless their order means something, so that equal values give equal bytes."""
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
        return json.loads(path.read_text(encoding="utf-8"))
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
