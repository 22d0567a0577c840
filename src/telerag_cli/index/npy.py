"""Arrays in ``.npy`` files of an index: taken only as what the manifest says, and never more than the file holds."""

from __future__ import annotations

import math
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import IntArray
from telerag_cli.errors import ArtifactError
from telerag_cli.files import HeldFile, read_exactly

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

    def __init__(self, file: HeldFile, dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
        """Check the header.

        Raises:
            ArtifactError: the file holds something else than a matrix of this type and shape.
        """
        self.dtype, self.shape = dtype, shape
        self._file = file
        with file.open("rb") as handle:
            _pass_header(file, handle, dtype, shape)
            self._start = handle.tell()

    def __getitem__(self, rows: IntArray) -> npt.NDArray[Any]:
        """The rows of these numbers, shape (len(rows), dimension).

        Raises:
            ArtifactError: there is no such row, or it cannot be read.
        """
        nbytes = self.shape[1] * self.dtype.itemsize
        found = np.empty((len(rows), nbytes), np.uint8)
        for place, row in enumerate(rows.tolist()):
            if not 0 <= row < self.shape[0]:
                raise ArtifactError(f"{self._file} has {self.shape[0]:,} rows, and a list names row {row:,}.")
            data = read_exactly(self._file.descriptor, nbytes, self._start + row * nbytes, self._file)
            found[place] = np.frombuffer(data, np.uint8)
        return found.view(self.dtype)


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
