"""An index with the embedder of its questions."""

from __future__ import annotations

from dataclasses import dataclass

from telerag_cli.config import DEFAULT_K, DEFAULT_NPROBE, SearchConfig
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.errors import ModelError
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
from telerag_cli.retrieval.retriever import check_search
from telerag_cli.setting import AUTO


@dataclass(frozen=True)
class OpenedIndex:
    """An index with its passages and the embedder of its questions."""

    index: Index
    passages: Passages
    embedder: Encoder


def open_index(index: Index, embedder: str | None, device: str = AUTO) -> OpenedIndex:
    """Open an index's passages and the embedder that its manifest names, or the one named here.

    Raises:
        ArtifactError: the index is damaged.
        ModelError: no embedder is known, or its vectors are of another dimension.
    """
    root = index.paths.root
    passages = Passages.open(index.paths.passages)
    name = embedder or index.manifest.embedder.model
    if name is None:
        raise ModelError(f"{root} does not say which model made its vectors.", remedy="Name it with --embedder.")
    encoder = Encoder.load(name, device=device)
    if encoder.info.dimension != index.manifest.dimension:
        raise ModelError(
            f"{name} makes vectors of {encoder.info.dimension} dimensions, and {root} has {index.manifest.dimension}.",
            remedy="Name the model that made them with --embedder.",
        )
    return OpenedIndex(index, passages, encoder)


def search_depth(index: Index, config: SearchConfig) -> tuple[int, int]:
    """``k`` and ``nprobe`` for this index: those of the settings, or 5 and 32, or all of a smaller index.

    Raises:
        UsageError: the index has fewer passages or lists than the settings ask for.
    """
    k = config.k or min(DEFAULT_K, index.manifest.ntotal)
    nprobe = config.nprobe or min(DEFAULT_NPROBE, index.manifest.nlist)
    check_search(index, k, nprobe)
    return k, nprobe
