"""Whether what was fetched and what was prepared is still what it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from telerag_cli.datasets.cache import Cached, Manifest
from telerag_cli.datasets.catalogue import RemoteFile
from telerag_cli.datasets.fetch import checksums, mismatch
from telerag_cli.files import checksum, wrap_os_error
from telerag_cli.progress import Advance


@dataclass(frozen=True)
class Finding:
    """What was found of one file."""

    file: str
    says: str
    """In words, with both values if something is wrong."""
    wrong: bool = False


def bytes_to_read(cached: Cached, folder: Path) -> int:
    """How much `check` will read, for a bar."""
    manifest = Manifest.load(folder)
    prepared = [] if manifest is None else [folder / name for name in manifest.files]
    paths = [*(cached.path(file) for file in cached.dataset.files), *prepared]
    return sum(path.stat().st_size for path in paths if path.is_file())


def check(cached: Cached, folder: Path, advance: Advance) -> list[Finding]:
    """Read everything and compare it with the description, ``source.json`` and ``prepared.json``.

    Args:
        cached: the dataset's folder.
        folder: where it was prepared.
        advance: told of bytes that were read.

    Raises:
        ArtifactError: ``source.json`` or ``prepared.json`` is damaged.
        ResourceError: a file cannot be read.
    """
    found = [_fetched(cached, file, advance) for file in cached.dataset.files]
    if not any(cached.path(file).exists() for file in cached.dataset.files):
        found = [Finding(each.file, each.says, True) for each in found]
    manifest = Manifest.load(folder)
    if manifest is None:
        return found
    if manifest.dataset != cached.dataset.name:
        return [
            *found,
            Finding(str(folder), f"was prepared of {manifest.dataset}, and not of {cached.dataset.name}", True),
        ]
    return [
        *found,
        *(_prepared(folder / name, manifest, name, advance) for name in manifest.files),
        *_outdated(cached, manifest, folder),
    ]


def _fetched(cached: Cached, file: RemoteFile, advance: Advance) -> Finding:
    path, known = cached.path(file), cached.sources().get(file.name)
    if not path.exists():
        have, begun = cached.begun(file)
        if have:
            total = f" of {begun.bytes:,}" if begun and begun.bytes else ""
            return Finding(file.name, f"only {have:,}{total} bytes have come", True)
        return Finding(
            file.name, "is noted in source.json, and missing" if known else "has not been fetched", known is not None
        )
    if known is None:
        return Finding(file.name, "is there, and source.json does not know of it", True)
    try:
        size = path.stat().st_size
        sums = checksums(path, advance, md5=file.md5 is not None)
    except OSError as error:
        raise wrap_os_error(error, path) from error
    if wrong := mismatch(file, size, sums):
        return Finding(file.name, wrong, True)
    if size != known.bytes:
        return Finding(file.name, f"has {size:,} bytes, and {known.bytes:,} were fetched", True)
    if sums["sha256"] != known.sha256:
        return Finding(file.name, f"its sha256 is {sums['sha256']}, and was {known.sha256} when it was fetched", True)
    published = (
        "the publisher's checksum" if file.sha256 or file.md5 else "what was fetched; its publisher gives no checksum"
    )
    return Finding(file.name, f"agrees with {published}")


def _prepared(path: Path, manifest: Manifest, name: str, advance: Advance) -> Finding:
    made = manifest.files[name]
    if not path.is_file():
        return Finding(str(path), "is missing", True)
    size = path.stat().st_size
    if size != made.bytes:
        return Finding(str(path), f"has {size:,} bytes, and {made.bytes:,} were written", True)
    found = checksum(path)
    advance(size)
    if found != made.checksum:
        return Finding(str(path), f"its checksum is {found}, and was {made.checksum} when it was written", True)
    return Finding(str(path), f"whole, {made.rows:,} entries")


def _outdated(cached: Cached, manifest: Manifest, folder: Path) -> list[Finding]:
    known = cached.sources()
    return [
        Finding(
            str(folder), f"was made of {name} with sha256 {digest}, and that of {known[name].sha256} is there now", True
        )
        for name, digest in manifest.sources.items()
        if name in known and known[name].sha256 != digest
    ]
