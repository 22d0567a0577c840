"""An index with the embedder of its questions."""

from __future__ import annotations

from dataclasses import dataclass

from telerag_cli.embedding.encoder import Encoder
from telerag_cli.errors import ModelError
from telerag_cli.index.artifact import Index
from telerag_cli.index.passages import Passages
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
