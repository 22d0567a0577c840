"""Settings of what is made once, embeddings and an index: a branch of its own of the tree in `telerag_cli.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from telerag_cli.config import DEFAULT_EMBEDDER, KeptType, Metric, Storage
from telerag_cli.errors import UsageError
from telerag_cli.setting import AUTO, Config, Setting

Precision = Literal["float32", "bfloat16", "float16"]
"""Type in which an embedder computes."""


@dataclass(frozen=True)
class EmbedConfig(Config):
    """How a corpus is embedded."""

    model: Annotated[str, Setting("A sentence-transformers folder, or a name in the Hugging Face cache or hub.")] = (
        DEFAULT_EMBEDDER
    )
    dtype: Annotated[Literal["float32", "float16"], Setting("Type of the stored vectors.")] = "float32"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Setting("Type to compute in; auto is bfloat16 where it is fast and keeps a cosine of 0.999."),
    ] = "auto"
    batch_size: Annotated[
        int | None, Setting("Passages in a batch, fewer if longer than 64 tokens; default 32, on a GPU 1024.", min=1)
    ] = None
    device: Annotated[str, Setting("auto, cpu, cuda or cuda:N.")] = AUTO
    shard_rows: Annotated[int, Setting("Passages in a shard, which is the unit of resuming.", min=1)] = 8192
    limit: Annotated[int | None, Setting("Embed the first passages only.", min=1)] = None
    text_column: Annotated[
        str | None, Setting("Column of texts.", default="text, contents, page_content, body, ...")
    ] = None
    id_column: Annotated[str | None, Setting("Column of ids.", default="id, _id, docid, ..., else file and line")] = (
        None
    )


@dataclass(frozen=True)
class BuildConfig(Config):
    """How an index is built. Vectors cannot be kept beside ``float32`` lists, which hold them already."""

    nlist: int | None = None
    """Number of lists; None: `telerag_cli.index.train.auto_nlist`."""
    metric: Annotated[Metric, Setting("Inner product or squared L2.")] = Metric.IP
    storage: Annotated[Storage, Setting("How vectors are kept in the lists.")] = Storage.FLOAT32
    keep_vectors: Annotated[
        KeptType | None,
        Setting(
            "Keep the vectors in row order too: searches then score their best candidates again from them.",
            default="not kept",
        ),
    ] = None
    seed: Annotated[int, Setting("Of the sample and of k-means.", min=0)] = 0
    memory_bytes: int = 2 << 30
    """Memory for the training sample and blocks of vectors; the libraries themselves take some 200 MB beside it."""
    device: Annotated[str, Setting("Where k-means runs: auto, cpu, cuda or cuda:N.")] = AUTO
    column: Annotated[str | None, Setting("The vector column, if there are several.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_vectors and self.storage is Storage.FLOAT32:
            raise UsageError(
                f"--keep-vectors {self.keep_vectors} was asked for with --storage float32, whose lists hold the "
                "vectors themselves.",
                remedy="Leave --keep-vectors out, or choose --storage float16 or int8.",
            )
