"""Names for the types of NumPy arrays."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
TableArray = npt.NDArray[np.uint64]
"""Size and capacity in vectors and byte offset of each list, shape (nlist, 3)."""
