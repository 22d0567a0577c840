"""Fetching a dataset's files, over HTTP or from a copy: interruptions lose nothing, and a wrong file is not kept.

A file grows beside its final name. What arrived is kept when the work stops, and the rest is requested as a range on
the condition that the file is still the same. Only a complete file of the right size and checksum gets its name.
(Pooch starts over after an interruption, and `huggingface_hub` does not notice that a file changed meanwhile.)
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import httpx2

from telerag_cli import __version__
from telerag_cli.config import DEFAULT_TIMEOUT_S
from telerag_cli.datasets.cache import Begun, Cached, Fetched
from telerag_cli.datasets.catalogue import RemoteFile
from telerag_cli.errors import InputError, ResourceError, UsageError
from telerag_cli.files import wrap_os_error, write_json
from telerag_cli.progress import Advance, Progress
from telerag_cli.units import format_bytes

CHUNK_BYTES = 1 << 20
UNSURE = 2
"""Times a rounded size that are still taken for it."""
RESERVE_BYTES = 256 << 20
"""Left free on the disk by a file of which nobody says how long it is."""
CONNECT_S = 15.0
REMEDY = "Run the same command again, it continues where it stopped; or take a copy with --from or --mirror."


def fetch_files(
    cached: Cached,
    files: Sequence[RemoteFile],
    source: str | None = None,
    mirror: str | None = None,
    *,
    progress: Progress,
    notice: Callable[[str], None],
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Iterator[tuple[RemoteFile, bool]]:
    """Get files of a dataset, and yield each with whether it had to be fetched; those that are there are left alone.

    Instead of their publisher's, the addresses can be one ``source``, which is one of the files or a folder or address
    below which they are, or a ``mirror``, below which each dataset has a folder of its name. ``notice`` is called with
    a sentence when what had arrived of a file is discarded; a server may be silent for ``timeout_s``.

    Raises:
        InputError: a file cannot be had, stopped coming, or is not the one expected.
        ResourceError: there is no room for it, or another process fetches it.
        UsageError: the source is a file, and none of these.
    """
    base = source or (f"{mirror.rstrip('/')}/{quote(cached.dataset.name)}" if mirror else None)
    places = [_place_of(file, files, base, cached.dataset.name, whole=source is not None) for file in files]
    with cached.locked():
        for file, place in zip(files, places, strict=True):
            if place is None:
                continue
            missing = not cached.has(file)
            if missing:
                try:
                    if isinstance(place, Path):
                        _copy(cached, file, place, progress)
                    else:
                        _Download(cached, file, place, progress, notice).run(timeout_s)
                    _accept(cached, file, str(place), progress)
                except OSError as error:
                    raise wrap_os_error(error, Path(error.filename or cached.partial(file))) from error
            yield file, missing


def _place_of(
    file: RemoteFile, files: Sequence[RemoteFile], base: str | None, dataset: str, *, whole: bool
) -> str | Path | None:
    """Return the address or path of a file: below ``base``, or ``base`` itself; None if that is another file."""
    if base is None:
        return file.address
    remote = base.startswith(("http://", "https://"))
    last = unquote((urlsplit(base).path if remote else base).rstrip("/").rsplit("/", 1)[-1])
    names = [each.name for each in files]
    place = f"{base.rstrip('/')}/{quote(file.name) if remote else file.name}"
    if whole and (last in names or (not remote and Path(base).is_file())):
        if len(files) > 1 and last not in names:
            raise UsageError(
                f"{base} is one file, and {dataset} has {', '.join(names)}.",
                remedy="Name it after the one that it is, or give the folder that holds them.",
            )
        if len(files) > 1 and last != file.name:
            return None
        place = base
    if not remote and not Path(place).is_file():
        raise InputError(
            f"{place} does not exist, and {dataset} needs {file.name} from there.",
            remedy="Check the path, or leave it out to fetch from the publisher.",
        )
    return place if remote else Path(place)


class _Download:
    """One file over HTTP."""

    def __init__(
        self, cached: Cached, file: RemoteFile, address: str, progress: Progress, notice: Callable[[str], None]
    ) -> None:
        self._cached, self._file, self._address = cached, file, address
        self._progress, self._notice = progress, notice
        self._part = cached.partial(file)

    def run(self, timeout_s: float) -> None:
        timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
        # A compressed transfer would make ranges and lengths those of the compressed bytes.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"telerag/{__version__}"}
        have, begun = self._cached.begun(self._file)
        if begun is not None and begun.address != self._address:
            have = self._discard(have, f"it came from {begun.address}")
        elif begun is not None and not (begun.condition or self._file.sha256 or self._file.md5):
            have = self._discard(have, "neither the server nor the publisher tells one version from another")
        if begun is not None and have and have == begun.bytes:
            return
        try:
            with httpx2.Client(follow_redirects=True, timeout=timeout, headers=headers) as client:
                self._get(client, have, begun.condition if begun else None)
        except (httpx2.TransportError, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
            timed_out = isinstance(error, httpx2.TimeoutException)
            raise self._failed(f"no answer within {timeout_s:g} s" if timed_out else str(error)) from error

    def _get(self, client: httpx2.Client, have: int, condition: str | None) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and condition:
            headers["If-Range"] = condition
        with client.stream("GET", self._address, headers=headers) as response:
            status = response.status_code
            continues = re.match(rf"bytes {have}-", response.headers.get("Content-Range", "")) is not None
            if status == 200 or (status == 206 and have and continues):
                if have and status == 200:
                    have = self._discard(have, "the file changed, or its server cannot send a part of it")
                self._receive(response, have)
                return
            if not have or status not in (206, 416):
                place = str(response.url)
                redirected = f" (by way of {place})" if place != self._address else ""
                raise self._failed(f"the server answers {status} {response.reason_phrase}{redirected}")
        self._get(client, self._discard(have, "the server has other bytes now"), None)

    def _receive(self, response: httpx2.Response, have: int) -> None:
        file, headers = self._file, response.headers
        encoding = headers.get("Content-Encoding", "identity")
        # Some servers announce the compression of a .gz file so, which is then the file itself.
        if encoding != "identity" and not file.name.endswith(".gz"):
            raise self._failed(f"it is sent compressed as {encoding}, although it was requested as it is")
        length = headers.get("Content-Length")
        total = have + int(length) if length and encoding == "identity" else None
        _check_size(self._address, total, file)
        expected = total or file.size
        _need_room(self._cached.root, (expected or 0) - have, file)
        etag = headers.get("ETag")
        if not have:
            # If-Range takes a date, or an ETag that is equal for equal bytes only.
            condition = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
            self._part.unlink(missing_ok=True)
            write_json(
                self._cached.note(file), asdict(Begun(self._address, condition, total, _linked_sha256(response)))
            )
        most = total or file.bytes or (file.about_bytes and UNSURE * file.about_bytes)
        with self._progress(file.name, expected, unit="bytes") as advance, self._part.open("ab") as handle:
            advance(have)
            for block in response.iter_raw():  # as it arrives, so that nothing is lost when it stops
                if most and handle.tell() + len(block) > most:
                    handle.truncate(0)
                    raise InputError(
                        f"{self._address} sends more than {most:,} bytes, and {file.name} should have "
                        f"{total or file.size:,}.",
                        remedy="Take it from elsewhere with --from.",
                    )
                if not most:
                    _need_room(self._cached.root, RESERVE_BYTES, file)
                handle.write(block)
                advance(len(block))
        if self._part.stat().st_size < (total or file.bytes or 0):  # a server without lengths may close silently
            raise self._failed(f"{total or file.bytes:,} are expected")

    def _discard(self, have: int, reason: str) -> int:
        if have:
            self._notice(f"{self._file.name} is fetched anew, {format_bytes(have)} are discarded: {reason}.")
        return 0

    def _failed(self, why: str) -> InputError:
        have = self._part.stat().st_size if self._part.exists() else 0
        return InputError(f"{self._address}: {have:,} bytes arrived: {why.rstrip('.')}.", remedy=REMEDY)


def _copy(cached: Cached, file: RemoteFile, place: Path, progress: Progress) -> None:
    total = place.stat().st_size
    _check_size(str(place), total, file)
    _need_room(cached.root, total, file)
    cached.note(file).unlink(missing_ok=True)
    with (
        progress(file.name, total, unit="bytes") as advance,
        place.open("rb") as source,
        cached.partial(file).open("wb") as target,
    ):
        while block := source.read(CHUNK_BYTES):
            target.write(block)
            advance(len(block))


def _accept(cached: Cached, file: RemoteFile, address: str, progress: Progress) -> None:
    """Check what arrived, note it, and give it its name."""
    part, note = cached.partial(file), cached.note(file)
    size, begun = part.stat().st_size, cached.begun(file)[1]
    with progress(f"Checking {file.name}", size, unit="bytes") as advance:
        sums = checksums(part, advance)
    wrong = mismatch(file, size, sums)
    if not wrong and begun and begun.sha256 not in (None, sums["sha256"]):
        wrong = f"its sha256 is {sums['sha256']}, and the server says {begun.sha256}"
    if wrong:
        part.unlink()
        note.unlink(missing_ok=True)
        raise InputError(
            f"{address} is not {file.name}: {wrong}; it was not kept.",
            remedy="Fetch it again, or take it from elsewhere with --from.",
        )
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cached.record(file, Fetched(address, size, sums["sha256"], now))
    part.replace(cached.path(file))
    note.unlink(missing_ok=True)


def _linked_sha256(response: httpx2.Response) -> str | None:
    """The SHA-256 that the Hugging Face hub gives where it redirects to a large file."""
    found = [each.headers.get("X-Linked-ETag", "").strip('"') for each in (*response.history, response)]
    return next((etag for etag in found if re.fullmatch("[0-9a-f]{64}", etag)), None)


def mismatch(file: RemoteFile, size: int, sums: dict[str, str]) -> str | None:
    """Say how a file differs from its description, with both values; None if it does not."""
    if file.bytes is not None and size != file.bytes:
        return f"it has {size:,} bytes, and {file.bytes:,} are expected"
    for name, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is not None and sums[name] != expected:
            return f"its {name} is {sums[name]}, and {expected} is expected"
    return None


def checksums(path: Path, advance: Advance) -> dict[str, str]:
    """Return the SHA-256 and the MD5 of a file's bytes, by name."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb", buffering=0) as handle:
        while block := handle.read(CHUNK_BYTES):
            for digest in digests.values():
                digest.update(block)
            advance(len(block))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _check_size(place: str, total: int | None, file: RemoteFile) -> None:
    if None not in (total, file.bytes) and total != file.bytes:
        raise InputError(
            f"{place} has {total:,} bytes, and {file.name} should have {file.bytes:,}.",
            remedy="Take it from elsewhere with --from.",
        )


def _need_room(folder: Path, wanted: int, file: RemoteFile) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise ResourceError(
            f"{file.name} needs {format_bytes(wanted)} more, and {format_bytes(free)} are free in {folder}.",
            remedy="Free space, or name another folder with --cache-dir.",
        )
