"""Getting a dataset's files, over HTTP or from a copy, so that nothing is lost by an interruption and nothing wrong is kept.

A file grows beside its final name. What came is kept when the work stops, and the rest is asked for by a range request,
on the condition that it is still the same version. Only a whole file with the right size and checksum gets its name.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import shutil
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote, urlsplit

import httpx2

from telerag_cli import __version__
from telerag_cli.config import DEFAULT_TIMEOUT_S, format_bytes
from telerag_cli.datasets.cache import Begun, Cached, Fetched
from telerag_cli.datasets.catalogue import RemoteFile
from telerag_cli.errors import InputError, ResourceError, TeleragError, UsageError
from telerag_cli.files import wrap_os_error, write_json
from telerag_cli.progress import Progress

CHUNK_BYTES = 1 << 20
CONNECT_S = 15.0
"""Time for a connection to be made."""
AGAIN = "Run the same command again; it goes on where it stopped."

"""Makes a bar of a description and a total in bytes, which is told of further bytes."""
Notice = Callable[[str], None]

_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)$")


@dataclass(frozen=True)
class Copies:
    """Where files are taken from instead of their publisher."""

    given: str | None = None
    """Of one dataset: a folder or an address below which its files lie, or one of the files."""
    mirror: str | None = None
    """Of all datasets: a folder or an address below which each has a folder of its name."""


@dataclass(frozen=True)
class _Version:
    """What a server says of the file it sends."""

    etag: str | None
    last_modified: str | None
    total: int | None

    @property
    def condition(self) -> str | None:
        """For ``If-Range``, which wants an ETag that is equal for equal bytes only, or a date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


def fetch_files(
    cached: Cached,
    files: Sequence[RemoteFile],
    copies: Copies,
    *,
    progress: Progress,
    notice: Notice,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Iterator[tuple[RemoteFile, bool]]:
    """Get files one after the other; those that are there are left alone.

    Args:
        cached: the dataset's folder.
        files: of the dataset.
        copies: where they are taken from.
        progress: makes a bar for each file.
        notice: told when what had come of a file is given up, and why.
        timeout_s: the longest silence of a server.

    Yields:
        Each file once it is whole, and whether it had to be fetched.

    Raises:
        InputError: it cannot be had, stopped coming, or is not the file that was expected.
        ResourceError: there is no room for it, or another process fetches it.
        UsageError: the copy named holds none of the files.
    """
    places = [(file, place_of(cached.dataset.name, file, files, copies)) for file in files]
    wanted = [(file, place) for file, place in places if place is not None]
    with cached.locked():
        for file, place in wanted:
            if cached.has(file):
                yield file, False
                continue
            if isinstance(place, Path):
                sent = _copy(cached, file, place, progress)
            else:
                sent = _Download(cached, file, place, progress, notice, timeout_s).run()
            _accept(cached, file, str(place), sent, progress)
            yield file, True


def place_of(dataset: str, file: RemoteFile, files: Sequence[RemoteFile], copies: Copies) -> str | Path | None:
    """Where a file is taken from: an address, or a path on this machine; None if the copy named is of another file.

    Raises:
        InputError: there is no such file on this machine.
        UsageError: the copy named is of none of the files.
    """
    given, base = copies.given, None
    if given is not None:
        last = unquote((urlsplit(given).path if _is_address(given) else given).rstrip("/").rsplit("/", 1)[-1])
        single = (not _is_address(given) and Path(given).is_file()) or last in {each.name for each in files}
        if single and len(files) > 1 and last not in {each.name for each in files}:
            raise UsageError(
                f"{given} is one file, and {dataset} has {', '.join(each.name for each in files)}.",
                remedy="Name it like the one that it is, or give the folder that holds them.",
            )
        if single:
            base = given if len(files) == 1 or last == file.name else None
            return base if base is None or _is_address(base) else _existing(Path(base), dataset, file)
        base = given
    elif copies.mirror is not None:
        base = f"{copies.mirror.rstrip('/')}/{quote(dataset)}"
    else:
        return file.address
    if _is_address(base):
        return f"{base.rstrip('/')}/{quote(file.name)}"
    return _existing(Path(base) / file.name, dataset, file)


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _existing(path: Path, dataset: str, file: RemoteFile) -> Path:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist, and {dataset} needs {file.name} from there.",
            remedy="Check the path, or leave it away to fetch from the publisher.",
        )
    return path


class _Download:
    """One file over HTTP."""

    def __init__(
        self, cached: Cached, file: RemoteFile, address: str, progress: Progress, notice: Notice, timeout_s: float
    ) -> None:
        self._cached, self._file, self._address = cached, file, address
        self._progress, self._notice, self._timeout_s = progress, notice, timeout_s
        self._part, self._note = cached.partial(file), cached.note(file)

    def run(self) -> _Version:
        """Fetch what is missing."""
        timeout = httpx2.Timeout(self._timeout_s, connect=min(CONNECT_S, self._timeout_s))
        # A compressed transfer would make ranges and lengths those of the compressed bytes.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"telerag/{__version__}"}
        with httpx2.Client(follow_redirects=True, timeout=timeout, headers=headers, verify=_trust()) as client:
            try:
                have, begun = self._cached.begun(self._file)
                if begun is not None and begun.address != self._address:
                    have, begun = self._give_up(have, f"it came from {begun.address}"), None
                if have and begun is not None:
                    known = _Version(begun.etag, begun.last_modified, begun.bytes)
                    if have == known.total:
                        return known
                    if (version := self._resume(client, have, known)) is not None:
                        return version
                return self._from_the_start(client)
            except (httpx2.TransportError, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
                raise self._broken(error) from error

    def _resume(self, client: httpx2.Client, have: int, known: _Version) -> _Version | None:
        """Fetch the rest; None if only the whole will do."""
        headers = {"Range": f"bytes={have}-"}
        if known.condition:
            headers["If-Range"] = known.condition
        with client.stream("GET", self._address, headers=headers) as response:
            version = _version(response)
            if response.status_code == 206:
                found = _RANGE.match(response.headers.get("Content-Range", ""))
                start = int(found[1]) if found and found[1] else None
                if start == have and _same(version, known):
                    self._receive(response, "ab", have, version)
                    return version
                reason = f"the server sent bytes from {start}" if start != have else "it has changed at its source"
            elif response.status_code == 200:
                changed = not _same(version, known)
                reason = "it has changed at its source" if changed else "the server cannot send a part of it"
                self._give_up(have, reason)
                self._receive(response, "wb", 0, version)
                return version
            elif response.status_code == 416:
                reason = "it is shorter at its source now"
            else:
                raise self._refused(response)
        self._give_up(have, reason)
        return None

    def _from_the_start(self, client: httpx2.Client) -> _Version:
        with client.stream("GET", self._address) as response:
            if response.status_code != 200:
                raise self._refused(response)
            version = _version(response)
            self._receive(response, "wb", 0, version)
            return version

    def _receive(self, response: httpx2.Response, mode: str, have: int, version: _Version) -> None:
        self._check_size(version.total)
        encoding = response.headers.get("Content-Encoding", "identity")
        # Some servers name the packing of a .gz file so, which is then the file itself.
        if encoding != "identity" and not self._file.name.endswith(".gz"):
            raise InputError(
                f"{self._address} comes packed as {encoding}, and was asked for as it is.",
                remedy="Take it from elsewhere with --from.",
            )
        expected = version.total if version.total is not None else self._file.size
        _need_room(self._cached.root, (expected or 0) - have, self._file)
        if mode == "wb":
            self._part.unlink(missing_ok=True)
            begun = Begun(self._address, version.etag, version.last_modified, version.total)
            write_json(self._note, asdict(begun))
        with self._progress(self._file.name, expected) as advance:
            advance(have)
            try:
                with self._part.open(mode) as handle:
                    for block in response.iter_raw():  # as it comes, so that nothing is lost when it stops
                        handle.write(block)
                        advance(len(block))
            except OSError as error:
                raise wrap_os_error(error, self._part) from error
        come, whole = (self._part.stat().st_size, version.total if version.total is not None else self._file.bytes)
        if whole is not None and come < whole:  # a server that tells no length may close without a word
            raise self._stopped(f"{come:,} of {whole:,} bytes came")

    def _check_size(self, total: int | None) -> None:
        if None not in (total, self._file.bytes) and total != self._file.bytes:
            raise InputError(
                f"{self._address} has {total:,} bytes, and {self._file.name} should have {self._file.bytes:,}.",
                remedy="Take it from elsewhere with --from.",
            )

    def _give_up(self, have: int, reason: str) -> int:
        self._notice(
            f"{self._file.name} is fetched anew, and {format_bytes(have)} that had come are given up: {reason}."
        )
        return 0

    def _broken(self, error: Exception) -> TeleragError:
        have = self._part.stat().st_size if self._part.exists() else 0
        why = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, httpx2.TimeoutException):
            why = f"no answer within {self._timeout_s:g} s"
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return InputError(
                f"{self._address} cannot be reached: {why}.",
                remedy="Check the network, or take the file from a copy with --from or --mirror.",
            )
        if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
            return InputError(
                f"'{self._address}' is no address to fetch from: {why}.",
                remedy="Give one that begins with http:// or https://.",
            )
        return self._stopped(f"{format_bytes(have)} came ({why})")

    def _stopped(self, what: str) -> InputError:
        return InputError(f"{self._address} stopped before its end: {what}.", remedy=AGAIN)

    def _refused(self, response: httpx2.Response) -> InputError:
        place = str(response.url)
        by_way = f" (by way of {place})" if place != self._address else ""
        return InputError(
            f"{self._address}{by_way} answers {response.status_code} {response.reason_phrase}".rstrip() + ".",
            remedy="It may have moved: see the dataset's homepage, and name a copy with --from or --mirror.",
        )


@cache
def _trust() -> ssl.SSLContext:
    """Made once: reading the certificates takes longer than fetching a small file."""
    return httpx2.create_ssl_context()


def _version(response: httpx2.Response) -> _Version:
    headers = response.headers
    total = headers.get("Content-Length")
    if response.status_code != 200:
        found = _RANGE.match(headers.get("Content-Range", ""))
        total = found[2] if found else None
    encoded = headers.get("Content-Encoding", "identity") != "identity"
    known = total is not None and total.isdigit() and not encoded
    return _Version(headers.get("ETag"), headers.get("Last-Modified"), int(total) if known and total else None)


def _same(now: _Version, before: _Version) -> bool:
    """Whether nothing that both answers tell differs, and they tell something."""
    pairs = [(now.etag, before.etag), (now.last_modified, before.last_modified), (now.total, before.total)]
    told = [(a, b) for a, b in pairs if a is not None and b is not None]
    return bool(told) and all(a == b for a, b in told)


def _copy(cached: Cached, file: RemoteFile, place: Path, progress: Progress) -> _Version:
    part = cached.partial(file)
    try:
        total = place.stat().st_size
        if file.bytes is not None and total != file.bytes:
            raise InputError(
                f"{place} has {total:,} bytes, and {file.name} should have {file.bytes:,}.",
                remedy="Take it from elsewhere with --from.",
            )
        _need_room(cached.root, total, file)
        cached.note(file).unlink(missing_ok=True)
        with progress(file.name, total) as advance, place.open("rb") as source, part.open("wb") as target:
            for block in _blocks(source):
                target.write(block)
                advance(len(block))
    except OSError as error:
        raise wrap_os_error(error, Path(error.filename) if error.filename else part) from error
    return _Version(None, None, total)


def _accept(cached: Cached, file: RemoteFile, place: str, version: _Version, progress: Progress) -> None:
    """Check what came, note it, and give it its name."""
    part = cached.partial(file)
    try:
        size = part.stat().st_size
        with progress(f"Checking {file.name}", size) as advance:
            sums = checksums(part, advance, md5=file.md5 is not None)
        wrong = mismatch(file, size, sums)
        if wrong:
            part.unlink()
            cached.note(file).unlink(missing_ok=True)
            raise InputError(
                f"{place} is not {file.name}: {wrong}; it was not kept.",
                remedy="Fetch it again, or take it from elsewhere with --from.",
            )
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        cached.record(
            file, Fetched(place, size, sums["sha256"], now, sums.get("md5"), version.etag, version.last_modified)
        )
        part.replace(cached.path(file))
        cached.note(file).unlink(missing_ok=True)
    except OSError as error:
        raise wrap_os_error(error, part) from error


def mismatch(file: RemoteFile, size: int, sums: dict[str, str]) -> str | None:
    """How a file differs from its description, with both values, or None."""
    if file.bytes is not None and size != file.bytes:
        return f"it has {size:,} bytes, and {file.bytes:,} are expected"
    for name, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is not None and sums[name] != expected:
            return f"its {name} is {sums[name]}, and {expected} is expected"
    return None


def checksums(path: Path, advance: Callable[[int], None], *, md5: bool) -> dict[str, str]:
    """SHA-256 of a file's bytes, and MD5 if wanted, by name."""
    digests = {"sha256": hashlib.sha256()}
    if md5:
        digests["md5"] = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as handle:
        for block in _blocks(handle):
            for digest in digests.values():
                digest.update(block)
            advance(len(block))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _blocks(handle: IO[bytes]) -> Iterator[bytes]:
    while block := handle.read(CHUNK_BYTES):
        yield block


def _need_room(folder: Path, wanted: int, file: RemoteFile) -> None:
    with contextlib.suppress(OSError):  # a file system that does not tell
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise ResourceError(
                f"{file.name} needs {format_bytes(wanted)} more, and {format_bytes(free)} are free in {folder}.",
                remedy="Free space, or name another folder with --cache-dir.",
            )
