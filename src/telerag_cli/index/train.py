"""Training: how many lists, which rows to learn from, on which device, the centroids and the ranges of ``int8``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import Metric
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.units import format_bytes

POINTS_PER_CENTROID = 64
"""Training vectors per list; more gained nothing in recall or balance that was worth the time."""
MIN_POINTS_PER_CENTROID = 39
"""What Faiss asks for; ``auto`` never goes below it."""
HELD_OUT_QUERIES = 256
ITERATIONS = 10


@dataclass(frozen=True)
class TrainingPlan:
    """How many lists, and how many rows to train on and to hold out as queries."""

    nlist: int
    training_rows: int
    queries: int


def auto_nlist(rows: int) -> int:
    """The power of two nearest ``4 * sqrt(rows)``, from 1 to ``rows / 39``, as many as Faiss asks for to train."""
    wanted: int = 2 ** round(math.log2(4 * math.sqrt(rows)))
    most: int = 2 ** int(math.log2(max(1, rows // MIN_POINTS_PER_CENTROID)))
    return min(wanted, most)


def plan_training(rows: int, dimension: int, nlist: int | None, sample_bytes: int) -> TrainingPlan:
    """Choose sizes so that the training sample stays within ``sample_bytes``.

    ``nlist`` is as asked for; None means `auto_nlist`, halved until the sample suffices.

    Raises:
        UsageError: more lists than vectors, or than the sample's memory holds vectors.
    """
    holds = sample_bytes // (4 * dimension)
    if nlist is None:
        nlist = auto_nlist(rows)
        while nlist > 1 and holds < MIN_POINTS_PER_CENTROID * nlist:
            nlist //= 2
    if nlist < 1 or nlist > rows:
        raise UsageError(
            f"{nlist:,} lists were asked for, and there are {rows:,} vectors.",
            remedy=f"Choose --nlist between 1 and {rows:,}, or auto.",
        )
    if holds < nlist:
        raise UsageError(
            f"{nlist:,} lists need at least as many training vectors, and the {format_bytes(sample_bytes)} that "
            f"--memory leaves for them hold {holds:,}.",
            remedy="Raise --memory or lower --nlist.",
        )
    queries = min(HELD_OUT_QUERIES, rows // 10, rows - nlist)
    return TrainingPlan(nlist, min(rows - queries, POINTS_PER_CENTROID * nlist, holds), queries)


def draw_rows(rows: int, plan: TrainingPlan, seed: int) -> tuple[IntArray, IntArray]:
    """Row numbers of the training sample and of the held-out queries, disjoint, uniform, each in increasing order."""
    drawn = np.random.default_rng(seed).choice(rows, plan.training_rows + plan.queries, replace=False)
    return np.sort(drawn[plan.queries :]), np.sort(drawn[: plan.queries])


def find_gpu(device: str, library: Any = faiss) -> int | None:
    """The number of the GPU that k-means shall run on, or None for the CPU; ``library`` is the ``faiss`` module.

    ``device`` is ``auto`` (the first GPU if Faiss finds one), ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    Raises:
        UsageError: the device is none of these.
        ResourceError: a GPU was asked for, and Faiss has no support for GPUs or does not find that one.
    """
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"'{device}' is not a device.", remedy="Use auto, cpu, cuda or cuda:N.")
    if device == "cpu":
        return None
    supported = hasattr(library, "StandardGpuResources")
    count = library.get_num_gpus() if supported else 0
    if device == "auto":
        return 0 if count else None
    if not supported:
        raise ResourceError(
            f"{device} was asked for, and faiss-cpu {library.__version__} is installed, which has no GPU support.",
            remedy="Install the other wheel of the same module, pip uninstall faiss-cpu && "
            "pip install 'telerag-cli[gpu]', or use --device cpu.",
        )
    if not count:
        raise ResourceError(
            f"{device} was asked for, and faiss-gpu {library.__version__} is installed and finds no GPU.",
            remedy="Check the driver with nvidia-smi, or use --device cpu.",
        )
    if int(number or 0) >= count:
        raise ResourceError(
            f"{device} was asked for, and Faiss finds {count} GPU{'s' * (count != 1)}, "
            f"the last of which is cuda:{count - 1}.",
            remedy="Name one that is there, or use --device cpu.",
        )
    return int(number or 0)


def train_centroids(sample: FloatArray, nlist: int, metric: Metric, seed: int, gpu: int | None = None) -> FloatArray:
    """Centroids (nlist, dimension) by Faiss's k-means; for inner product on the sphere, as ``IndexIVF`` does.

    A ``gpu``, from `find_gpu`, rounds otherwise than the CPU does.

    Raises:
        KeyboardInterrupt: Ctrl-C while Faiss was at it.
        ResourceError: the GPU cannot do it; its memory is taken, say.
    """
    kmeans = faiss.Kmeans(
        sample.shape[1],
        nlist,
        niter=ITERATIONS,
        seed=seed,
        spherical=metric is Metric.IP,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )
    try:
        if gpu is not None:  # the option of Kmeans itself is how many GPUs, not which
            kmeans.index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, kmeans.index)
        kmeans.train(sample)
    except RuntimeError as error:  # Faiss's own answer to Ctrl-C
        if "interrupt" in str(error):
            raise KeyboardInterrupt from error
        if gpu is not None:
            raise ResourceError(
                f"k-means cannot run on cuda:{gpu}: {' '.join(str(error).split())}.",
                remedy="Free the GPU's memory, or start over with --device cpu --overwrite.",
            ) from error
        raise
    return np.ascontiguousarray(kmeans.centroids, np.float32)


def train_ranges(sample: FloatArray) -> FloatArray:
    """Faiss's ``SQ8`` minima and ranges, float32 (2 * dimension,)."""
    quantizer = faiss.ScalarQuantizer(sample.shape[1], faiss.ScalarQuantizer.QT_8bit)
    quantizer.train(sample)
    trained: FloatArray = faiss.vector_to_array(quantizer.trained)
    return trained
