"""Arrays in ``.npy`` files of an index: taken only as what the manifest says, and never more than the file holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from telerag_cli.arrays import IntArray
from telerag_cli.errors import ArtifactError
from telerag_cli.files import HeldFile, read_exactly

BLOCK_ROWS = 4096
AGAIN = "Restore the file or build the index again."


def read_array(file: HeldFile, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Read an array of this type and shape.

    Raises:
        ArtifactError: the file holds something else, or ends early.
    """
    with file.open("rb") as handle:
        _pass_header(file, handle, dtype, shape)
        array = np.fromfile(handle, dtype, math.prod(shape))
    if len(array) < math.prod(shape):
        raise ArtifactError(f"{file} ends after {len(array):,} of {math.prod(shape):,} numbers.", remedy=AGAIN)
    return array.reshape(shape)


class ArrayRows:
    """The rows of a matrix in a file, each read when it is asked for, so that a file cut short is only an error."""

    def __init__(
        self, file: HeldFile, dtype: np.dtype[Any], shape: tuple[int, int], checksums: ArrayRows | None = None
    ) -> None:
        """Check the header; ``checksums``, uint64 (n, 1), are xxh3-64 of each row, if there are any.

        Raises:
            ArtifactError: the file holds something else than a matrix of this type and shape.
        """
        self.dtype, self.shape = dtype, shape
        self._file, self._checksums = file, checksums
        with file.open("rb") as handle:
            _pass_header(file, handle, dtype, shape)
            self._start = handle.tell()

    def __getitem__(self, rows: IntArray) -> npt.NDArray[Any]:
        """The rows of these numbers, shape (len(rows), dimension).

        Raises:
            ArtifactError: there is no such row, it cannot be read, or it is not as it was written.
        """
        nbytes = self.shape[1] * self.dtype.itemsize
        found = np.empty((len(rows), nbytes), np.uint8)
        sums = self._checksums[rows][:, 0].tolist() if self._checksums else None
        for place, row in enumerate(rows.tolist()):
            if not 0 <= row < self.shape[0]:
                raise ArtifactError(f"{self._file} has {self.shape[0]:,} rows, and a list names row {row:,}.")
            data = read_exactly(self._file.descriptor, nbytes, self._start + row * nbytes, self._file)
            if sums and xxhash.xxh3_64_intdigest(data) != sums[place]:
                raise ArtifactError(f"Row {row:,} of {self._file} is not as it was written.", remedy=AGAIN)
            found[place] = np.frombuffer(data, np.uint8)
        return found.view(self.dtype)


def row_checksums(path: Path) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each row of a matrix in a file, uint64 (n, 1)."""
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    sums = np.empty((len(matrix), 1), np.uint64)
    for low in range(0, len(matrix), BLOCK_ROWS):
        block = np.ascontiguousarray(matrix[low : low + BLOCK_ROWS])
        sums[low : low + len(block), 0] = [xxhash.xxh3_64_intdigest(row.data) for row in block]
    return sums


def _pass_header(file: HeldFile, handle: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    try:
        if (version := np.lib.format.read_magic(handle)) != (1, 0):
            raise ValueError(f"its version is {version}")
        found_shape, by_column, found = np.lib.format.read_array_header_1_0(handle)
    except Exception as error:  # NumPy reads it as Python's own syntax, and passes on whatever that raises
        raise ArtifactError(f"{file} cannot be read as an array: {error}.", remedy=AGAIN) from error
    if (found, found_shape) != (dtype, shape) or by_column:
        raise ArtifactError(
            f"{file} is {found} {found_shape}, and the manifest asks for {dtype} {shape}.", remedy=AGAIN
        )
    held, wanted = file.size, handle.tell() + math.prod(shape) * dtype.itemsize
    if held != wanted:
        raise ArtifactError(f"{file} has {held:,} bytes, and its array takes {wanted:,}.", remedy=AGAIN)
