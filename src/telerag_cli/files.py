"""Files that a reader never sees half-written or mixed with others, errors of the disk in words, and checksums."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import xxhash

from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.text import TextError, parse_json
from telerag_cli.units import format_bytes

CHUNK_BYTES = 4 << 20
END_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
"""No JSON file that we write is larger."""
CHECKSUM = "checksum"
"""Key under which a sealed JSON file holds the checksum of the rest of it."""
PARTIAL = ".partial"


class HeldFile(os.PathLike[str]):
    """A file held open. As a path it opens the same file again, whatever has its name by then; as text it is its path.

    Its descriptor is closed when nobody has this object any more.
    """

    def __init__(self, path: Path, folder: int | None = None) -> None:
        """Open a file for reading; with ``folder``, a descriptor, the file of this name in that folder.

        Raises:
            ArtifactError: there is no such file, or it is a pipe, a device or a folder.
            ResourceError: it cannot be read.
        """
        self.path = path
        try:
            # Without waiting: a pipe in the place of a file would hold us for ever.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self.descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
        except OSError as error:
            raise wrap_os_error(error, path) from error
        weakref.finalize(self, os.close, self.descriptor)
        if not stat.S_ISREG(self.stat().st_mode):
            raise ArtifactError(f"{path} is not a regular file.", remedy="Restore it or make the artifact again.")

    def __fspath__(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"

    def __str__(self) -> str:
        return str(self.path)

    def open(self, mode: Literal["rb"], buffering: int = -1) -> IO[bytes]:
        """Open it again, as `pathlib.Path.open` does."""
        return Path(self).open(mode, buffering)

    def stat(self) -> os.stat_result:
        """What the system knows of it."""
        return os.fstat(self.descriptor)

    @property
    def size(self) -> int:
        """Bytes of the file now."""
        return self.stat().st_size


class HeldFolder:
    """A folder held open: its files are those of one folder, whatever gets its name meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            OSError: there is no such folder, or it cannot be read.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def open(self, name: str) -> HeldFile:
        """Open one of its files, as `HeldFile` does."""
        return HeldFile(self.path / name, self._descriptor)

    def has(self, name: str) -> bool:
        """Whether there is something of this name in it."""
        return os.access(name, os.F_OK, dir_fd=self._descriptor)

    def replaced(self) -> bool:
        """Whether its path names another folder now, or none."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return True


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``path``, which need not exist, against other writers; the hold ends with the process, however it ends.

    ``wait`` waits for another writer instead of refusing; it is for what takes milliseconds to write.

    Raises:
        ResourceError: another process writes it, or its folder cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        while True:
            descriptor = os.open(lock, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                    break
            except FileNotFoundError:
                pass  # the one who had it has removed it, and the next one makes another
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except BlockingIOError as error:
        raise ResourceError(f"Another telerag is writing {path} right now.", remedy="Wait for it.") from error
    except OSError as error:
        raise wrap_os_error(error, path) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Hold ``path`` against other writers, and replace it as `replacing` does.

    Raises:
        ResourceError: another process writes ``path``, the disk is full, or the folder cannot be written; nothing is
            left behind.
    """
    with exclusive(path), replacing(path) as temporary:
        yield temporary


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path``; on success it is flushed to disk and renamed onto ``path``.

    What killed writers of ``path`` have left is removed. Of several writers the last one wins, whole.

    Raises:
        ResourceError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        for other in path.parent.iterdir():
            if other.name.startswith(f".{path.name}.") and other.name.endswith(PARTIAL):
                _remove_stale(other)
        temporary, descriptor = _make_temporary(path)
        try:
            yield temporary
            os.fsync(descriptor)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as error:
        raise wrap_os_error(error, path) from error


def _make_temporary(path: Path) -> tuple[Path, int]:
    """A new file of a name that nobody can foresee, and its descriptor, which holds it: its writer is alive."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(temporary.stat(), os.fstat(descriptor)):
                return temporary, descriptor
        os.close(descriptor)  # it was taken for a stale one in the moment before it was held


def _remove_stale(temporary: Path) -> None:
    with contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError):
        if temporary.is_symlink():
            temporary.unlink()
            return
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that what was renamed there stays renamed when the machine stops."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EROFS, errno.EOPNOTSUPP):  # some cannot, and need not
            raise
    finally:
        os.close(descriptor)


def wrap_os_error(error: OSError, path: Path | HeldFile) -> ResourceError | ArtifactError:
    """The sentence for an ``OSError`` met while reading or writing ``path``."""
    if error.errno == errno.ENOSPC:
        return ResourceError(
            f"The disk is full: {path} could not be written and {format_bytes(free_bytes(Path(str(path))))} are free.",
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
        _make_parents(path)
    with replacing(path) as temporary:
        temporary.write_bytes(_json_bytes(value, sort_keys))


def update_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Write what ``change`` makes of the value in a JSON file, of None without one; no other update comes between.

    The folder is made if it is missing.

    Raises:
        ArtifactError: the file is not JSON.
    """
    _make_parents(path)
    with exclusive(path, wait=True), replacing(path) as temporary:
        temporary.write_bytes(_json_bytes(change(read_json(path) if path.exists() else None)))


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrap_os_error(error, path.parent) from error


def _json_bytes(value: Any, sort_keys: bool = True) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode()


def read_json(path: Path | HeldFile) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing or not JSON, or larger than any that we write.
    """
    return _parsed(_read_small(path), path)


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as `write_json` does, with the checksum of its text in it."""
    with replacing(path) as temporary:
        temporary.write_bytes(_sealed(value))


def read_sealed_json(path: Path | HeldFile) -> Any:
    """Read what `write_sealed_json` wrote, without the checksum; a file that has none is read as it is.

    Raises:
        ArtifactError: it is missing or not JSON, or one of its bytes is not as it was written.
    """
    data = _read_small(path)
    value = _parsed(data, path)
    if isinstance(value, dict) and CHECKSUM in value:
        held = value.pop(CHECKSUM)
        if data != (sealed := _sealed(value)):
            found = _parsed(sealed, path)[CHECKSUM]
            raise ArtifactError(
                f"{path} is damaged: it holds the checksum {held}, and what it says has {found}.",
                remedy="Restore the file or make the artifact again.",
            )
    return value


def _sealed(value: dict[str, Any]) -> bytes:
    return _json_bytes({**value, CHECKSUM: f"xxh3:{xxhash.xxh3_64_hexdigest(_json_bytes(value))}"})


def _read_small(path: Path | HeldFile) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise wrap_os_error(error, path) from error
    if len(data) > MAX_JSON_BYTES:
        raise ArtifactError(
            f"{path} is larger than {format_bytes(MAX_JSON_BYTES)}, and no JSON that telerag writes is.",
            remedy="Restore the file or make the artifact again.",
        )
    return data


def _parsed(data: bytes, path: Path | HeldFile) -> Any:
    try:
        return parse_json(data)
    except TextError as error:
        raise ArtifactError(f"{path} is not JSON: {error}.", remedy="Build the artifact again.") from error


def checksum(path: Path | HeldFile) -> str:
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


def read_exactly(descriptor: int, count: int, offset: int, path: Path | HeldFile) -> bytes:
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
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        if size is not None:
            os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)
