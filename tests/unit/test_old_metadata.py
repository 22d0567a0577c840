"""Metadata that was written before JSON was checked."""

import json

import pyarrow as pa
import pytest

from expect import fails
from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.errors import ArtifactError
from telerag_cli.index.passages import Passages, write_passages


def opened(path, metadata):
    batch = pa.record_batch([["a"], ["text"], [metadata]], schema=PASSAGE_SCHEMA)
    list(write_passages([batch], path))
    return Passages.open(path)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_is_no_number_is_null(tmp_path, number):
    (passage,) = opened(tmp_path / "passages.arrow", f'{{"x": {number}, "y": 1.5}}')[[0]]
    assert passage.metadata == {"x": None, "y": 1.5}
    json.dumps(passage.metadata, allow_nan=False)


@pytest.mark.parametrize("metadata", ['{"x": ' + "[" * 600 + "]" * 600 + "}", "[1]", "{"])
def test_what_cannot_be_written_is_damaged(tmp_path, metadata):
    passages = opened(tmp_path / "passages.arrow", metadata)
    with fails(ArtifactError, "Row 0"):
        passages[[0]]
