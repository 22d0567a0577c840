"""Reading every byte of the lists: their checksums, and what does not match them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from telerag_cli.arrays import TableArray
from telerag_cli.files import CHUNK_BYTES, HeldFile, checksum, read_exactly
from telerag_cli.index.artifact import Index, extent_bytes
from telerag_cli.progress import Advance

OnCodes = Callable[[int, int, bytes], None]
"""Called with a list's number, the place in the list of the first code, and the codes' bytes."""


def scan_lists(
    path: Path | HeldFile, table: TableArray, code_size: int, advance: Advance, on_codes: OnCodes | None = None
) -> tuple[TableArray, str]:
    """Read ``lists.bin`` once, from end to end, a few MiB at a time, and hand whole codes, without padding, on.

    Returns:
        xxh3-64 of each list, padding included, uint64 (nlist,); and the whole file's, as ``xxh3:...``.

    Raises:
        ArtifactError: the file ends early.
    """
    step = max(1, CHUNK_BYTES // code_size) * code_size
    sums = np.empty(len(table), np.uint64)
    whole = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as handle:
        for number, ((size, _, offset), extent) in enumerate(
            zip(table.astype(np.int64).tolist(), extent_bytes(table[:, 1], code_size).tolist(), strict=True)
        ):
            digest = xxhash.xxh3_64()
            position, codes_end, end = offset, offset + size * code_size, offset + extent
            while position < end:
                limit = codes_end if position < codes_end else end
                data = read_exactly(handle.fileno(), min(step, limit - position), position, path)
                digest.update(data)
                whole.update(data)
                if on_codes and position < codes_end:
                    on_codes(number, (position - offset) // code_size, data)
                position += len(data)
            sums[number] = digest.intdigest()
            advance(extent)
    return sums, f"xxh3:{whole.hexdigest()}"


@dataclass(frozen=True)
class Damage:
    """What `verify` found wrong; empty if the index is whole."""

    files: tuple[str, ...]
    lists: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.files or self.lists)


def verify(index: Index, advance: Advance) -> Damage:
    """Compare every byte of an index, of which opening it has checked sizes and the small files, with its checksums."""
    files = []
    for name, info in sorted(index.manifest.files.items()):
        if name != index.paths.lists.name:
            if checksum(index.held(index.paths.root / name)) != info.checksum:
                files.append(name)
            advance(info.bytes)
    lists = index.held(index.paths.lists)
    sums, whole = scan_lists(lists, index.table, index.manifest.code_size, advance)
    if whole != index.manifest.files[index.paths.lists.name].checksum:
        files.append(index.paths.lists.name)
    return Damage(tuple(files), tuple(np.flatnonzero(sums != index.checksums).tolist()))
